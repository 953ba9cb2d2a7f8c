"""How each tool halves the flops of a network, used as in its documentation; one function per row of `peers`.

Every function takes (model, photos, keep) and returns the call to time, which returns the compressed network. If a tool
has no flop budget but one number that sets the size of the network, this number is found by bisection beforehand.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

import batude_fx
from batude_fx import Budget
from batude_fx.graph.flops import count_flops
from batude_fx.graph.surgery import copy_model
from batude_fx.support.inputs import Inputs
from batude_fx.support.timing import time_networks

IMAGE = torch.zeros(1, 3, 224, 224)
SCORED = 32  # photos for tools that evaluate candidates
_STEPS = 7  # of the bisection

Call = Callable[[], nn.Module]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        prepare: Maps model, photos and the share of flops to keep to the call that is timed.
        data: What the tool gets: "nothing", "procedural images" or "photos".
        package: Packages that its environment holds besides the project's own, the tool first; None for none.
    """

    prepare: Callable[[nn.Module, Tensor, float], Call]
    data: str
    package: str | None = None


def ours(model: nn.Module, photos: Tensor, keep: float, *, calibration: str | None) -> Call:
    """`compress`, as in the README."""
    images: Any = photos if calibration == "photos" else calibration
    return partial(batude_fx.compress, model, keep, calibration=images)


def ours_latency(model: nn.Module, photos: Tensor, keep: float) -> Call:
    """A latency limit equal to the measured time of the calibrated row for one image; times layers anew."""
    os.environ["BATUDE_FX_CACHE"] = mkdtemp()
    flops_row = batude_fx.compress(model, keep, calibration=photos)
    dense, small = time_networks([model, flops_row], Inputs((IMAGE,)), turns=21)
    limit = Budget(latency=small / dense)
    return partial(batude_fx.compress, model, limit, calibration=photos, round_to="auto")


def torch_pruning(model: nn.Module, _: Tensor, keep: float) -> Call:
    """Torch-Pruning's magnitude pruner over groups in one shot, channels in multiples of 8."""
    import torch_pruning

    def at(share: float) -> nn.Module:
        small = copy_model(model)
        last = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
        torch_pruning.pruner.MagnitudePruner(
            small, IMAGE, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=1 - share,
            ignored_layers=[last], round_to=8,
        ).step()  # fmt: skip
        return small

    return _largest(at, model, keep)


def aimet(model: nn.Module, photos: Tensor, keep: float) -> Call:
    """AIMET's spatial SVD with its greedy search for ratios; candidates are scored by agreement with the original."""
    from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters as Parameters

    original_classes = _classes(model, photos)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    greedy = GreedySelectionParameters(target_comp_ratio=keep, num_comp_ratio_candidates=10)
    automatic = Parameters.AutoModeParams(greedy, modules_to_ignore=[stem])

    def score(network: nn.Module, _iterations: int | None = None, *_cuda: bool, **_more: bool) -> float:
        return float((_classes(network, photos) == original_classes).float().mean())

    def call() -> nn.Module:
        small, _ = ModelCompressor.compress_model(
            model, score, 1, tuple(IMAGE.shape), CompressionScheme.spatial_svd, CostMetric.mac,
            Parameters(Parameters.Mode.auto, automatic),
        )  # fmt: skip
        return small  # type: ignore[no-any-return]

    return call


def modelopt(model: nn.Module, photos: Tensor, keep: float) -> Call:
    """ModelOpt's FastNAS; candidates are scored by agreement with the original, batch-norms are updated on photos."""
    import modelopt.torch.prune

    original_classes = _classes(model, photos)
    batches = list(zip(torch.split(photos[:SCORED], 8), torch.split(original_classes, 8), strict=True))

    def score(network: nn.Module) -> float:
        return float((_classes(network, photos) == original_classes).float().mean())

    def call() -> nn.Module:
        small, _ = modelopt.torch.prune.prune(
            copy_model(model), mode="fastnas", constraints={"flops": f"{100 * keep:g}%"}, dummy_input=IMAGE,
            config={"data_loader": batches, "score_func": score, "collect_func": lambda batch: batch[0]},
        )  # fmt: skip
        return small  # type: ignore[no-any-return]

    return call


def tensorly_torch(model: nn.Module, _: Tensor, keep: float) -> Call:
    """tensorly-torch's Tucker over the channels of every convolution, at the same share of parameters."""
    import tltorch

    def at(share: float) -> nn.Module:
        small = copy_model(model)
        for name, layer in list(small.named_modules()):
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
                parent, _, child = name.rpartition(".")
                factorized = tltorch.FactorizedConv.from_conv(
                    layer, rank=share, factorization="tucker", implementation="factorized",
                    decomposition_kwargs={"init": "svd"},
                )  # fmt: skip
                setattr(small.get_submodule(parent), child, factorized)
        return small

    return _largest(at, model, keep)


def fasterai(model: nn.Module, _: Tensor, keep: float) -> Call:
    """fasterai's Tucker-2 of every convolution larger than 1x1, at the same share of ranks."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    def at(share: float) -> nn.Module:
        small: nn.Module = Conv_Decomposer().decompose(model, percent_removed=1 - share)
        return small

    return _largest(at, model, keep)


def _largest(at: Callable[[float], nn.Module], model: nn.Module, keep: float) -> Call:
    """Return the call with the largest share that stays within the flops, or with the smallest share if none does."""
    most = keep * count_flops(model, Inputs((IMAGE,)))
    low, high = 0.02, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if count_flops(at(middle), Inputs((IMAGE,))) <= most else (low, middle)
    return partial(at, low)


@torch.no_grad()
def _classes(model: nn.Module, photos: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(batch).argmax(1) for batch in torch.split(photos[:SCORED], 8)])


METHODS = {
    "batude_fx, weights only": Method(partial(ours, calibration=None), "nothing"),
    "batude_fx, synthetic": Method(partial(ours, calibration="synthetic"), "procedural images"),
    "batude_fx, calibrated": Method(partial(ours, calibration="photos"), "photos"),
    "batude_fx, latency": Method(ours_latency, "photos"),
    "Torch-Pruning": Method(torch_pruning, "nothing"),
    "tensorly-torch": Method(tensorly_torch, "nothing", "tensorly-torch==0.5.0"),
    "fasterai": Method(fasterai, "nothing", "fasterai==0.4.1"),
    "AIMET spatial SVD": Method(aimet, "photos", "aimet-torch==2.42.0"),
    "ModelOpt FastNAS": Method(modelopt, "photos", "nvidia-modelopt==0.47.0 torchprofile==0.0.4"),
}
