"""The original network as the teacher of a compressed one: of its outputs, and of the outputs of its stages.

Sources: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531, section 2; for the stages, A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR
2015, https://arxiv.org/abs/1412.6550, without a layer in between, as both networks have the same shapes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batude_fx.deploy.fold import fold
from batude_fx.graph.stages import find_stages
from batude_fx.quality.comparison import log_probabilities, output_tensors
from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs
from batude_fx.training.recipe import Distillation

_LEAST_VARIANCE = 1e-12  # of a teacher's output that does not vary


class Teacher:
    """The original network in eval mode, with its batch-norms folded.

    Args:
        original: The network, which is left as it is.
        inputs: Arguments of one run.
        settings: What is taught: the temperature, and the weight of the stages.
        classifies: Whether its only output is logits (n, classes); the errors of other outputs are relative.

    Attributes:
        network: The folded copy.
    """

    def __init__(self, original: nn.Module, inputs: Inputs, settings: Distillation, *, classifies: bool = True) -> None:
        self.network = fold(original, inputs).requires_grad_(requires_grad=False)
        self.inputs, self.settings, self.classifies = inputs, settings, classifies
        self._stages = find_stages(self.network, inputs) if settings.stages else []

    def run(self, network: nn.Module, images: Tensor) -> object:
        """Return the outputs of a network for a copy of the images, as networks may work on their inputs in place."""
        return self.inputs.with_tensor(images.clone()).run(network)

    @contextmanager
    def observe(self, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Yield a dict that holds the outputs of the stages after a run of the network in the block."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, _args: object, _kwargs: object, output: Tensor) -> None:
            outputs[name] = output

        with observe_calls({name: network.get_submodule(name) for name in self._stages}, after=keep):
            yield outputs

    def loss(self, images: Tensor, outputs: object, stages: Mapping[str, Tensor]) -> Tensor:
        """Return how far a student is from the teacher: the sum over its outputs and its stages.

        Args:
            images: (n, C, H, W), or whatever the networks take.
            outputs: What the student gives for them.
            stages: The outputs of its stages, from `observe`.

        Returns:
            The loss, ().
        """
        with torch.no_grad(), self.observe(self.network) as expected_stages:
            expected = self.run(self.network, images)
        loss = torch.zeros((), device=images.device)
        given = dict(output_tensors(outputs))
        for name, answer in output_tensors(expected):
            if self.classifies:
                scores = log_probabilities(given[name].float()), log_probabilities(answer.float())
                loss = loss + distillation_loss(*scores, self.settings.temperature)
            elif answer.is_floating_point():
                loss = loss + _relative_error(given[name], answer)
        for name, answer in expected_stages.items():
            loss = loss + self.settings.stages * _relative_error(stages[name], answer)
        return loss


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the student's predictions from the teacher's, at a temperature.

    With p = softmax(teacher / T) and q = softmax(student / T), the loss is T^2 KL(p || q), in the mean over images. The
    gradient of KL(p || q) by the student's logits is (q - p) / T. For large T, q - p is itself proportional to 1 / T,
    since softmax(x / T) is linear in x / T there, so that the gradient shrinks as 1 / T^2. The factor T^2 undoes this:
    the weight of the loss relative to the cross-entropy keeps its meaning when T changes.

    Args:
        student_logits: (n, classes), or logarithms of probabilities.
        teacher_logits: (n, classes), likewise.
        temperature: The T above; a larger one brings out the similarities that the teacher sees between classes.
    """
    student_log_probs = F.log_softmax(student_logits / temperature, 1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, 1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the mean squared difference, divided by the variance of what is expected."""
    expected = expected.float()
    return F.mse_loss(actual.float(), expected) / expected.var(correction=0).clamp_min(_LEAST_VARIANCE)
