"""The loss of a student is its divergence from the teacher, or its relative error, and that of its stages."""

import pytest
import torch
from torch import Tensor, nn

from batude_fx.support.inputs import Inputs
from batude_fx.training.recipe import Distillation
from batude_fx.training.teacher import Teacher
from tests.toy_networks import VariedNet

_IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _loss(original: nn.Module, student: nn.Module, *, stages: float = 0.0, classifies: bool = True) -> float:
    settings = Distillation(weight=1, temperature=1, stages=stages)
    teacher = Teacher(original, Inputs((_IMAGES[:1],)), settings, classifies=classifies)
    with torch.no_grad(), teacher.observe(student) as outputs:
        return float(teacher.loss(_IMAGES, teacher.run(student, _IMAGES), outputs))


class _Gives(nn.Module):
    """Gives the same row for every image."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.tensor(values))

    def forward(self, x: Tensor) -> Tensor:
        return self.row.expand(len(x), -1)


def test_scores_and_probabilities_have_the_same_divergence() -> None:
    p, q = torch.tensor([0.98, 0.01, 0.01]), torch.tensor([0.01, 0.98, 0.01])
    expected = float((p * (p / q).log()).sum())
    assert _loss(_Gives(*p.tolist()), _Gives(*q.tolist())) == pytest.approx(expected, rel=1e-5)
    scores = [(values.log() + 3).tolist() for values in (p, q)]
    assert _loss(_Gives(*scores[0]), _Gives(*scores[1])) == pytest.approx(expected, rel=1e-5)


def test_other_outputs_and_stages_count_by_their_relative_error() -> None:
    assert _loss(_Gives(1.0, 3.0), _Gives(1.0, 5.0), classifies=False) == pytest.approx(2.0)
    torch.manual_seed(0)
    original, other = VariedNet().eval(), VariedNet().eval()
    assert _loss(original, original, stages=1) == pytest.approx(0, abs=1e-6)
    plain, doubled = (_loss(original, other, stages=weight) for weight in (1, 2))
    assert doubled - plain == pytest.approx(plain - _loss(original, other), rel=1e-3)
