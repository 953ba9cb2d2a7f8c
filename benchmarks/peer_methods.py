"""How each tool halves the flops of a network, as its own documentation does it; one function a row of `peers`.

Every function takes (model, photos, keep) and returns the compressed network. Where a tool has no flop budget but one
number that sets its size, that number is found by bisection before the clock runs: `prepare` gives the call to time.
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
from batude_fx.support.timing import time_networks

IMAGE = torch.zeros(1, 3, 224, 224)
SCORED = 32  # photos that tools which evaluate candidates look at
_STEPS = 7  # of the bisection

Call = Callable[[], nn.Module]


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        prepare: Model, photos and the share of flops to keep, to the call that is timed.
        data: What it sees: "nothing", "procedural images" or "photos".
        package: What its environment holds besides the project's own, the tool first; None where nothing.
    """

    prepare: Callable[[nn.Module, Tensor, float], Call]
    data: str
    package: str | None = None


def ours(model: nn.Module, photos: Tensor, keep: float, *, calibration: str | None) -> Call:
    """`compress` as it stands in the README."""
    images: Any = photos if calibration == "photos" else calibration
    return partial(batude_fx.compress, model, keep, calibration=images)


def ours_latency(model: nn.Module, photos: Tensor, keep: float) -> Call:
    """As fast, measured, as the calibrated row, for one image; no times of layers are known yet."""
    os.environ["BATUDE_FX_CACHE"] = mkdtemp()
    flops_row = batude_fx.compress(model, keep, calibration=photos)
    dense, small = time_networks([model, flops_row], (IMAGE,), turns=21)
    limit = Budget(latency=small / dense)
    return partial(batude_fx.compress, model, limit, calibration=photos, round_to="auto")


def torch_pruning(model: nn.Module, _: Tensor, keep: float) -> Call:
    """Its magnitude pruner over groups, one shot, channels in multiples of 8."""
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
    """Spatial SVD, ratios per layer by its greedy search; candidates are scored by agreement with the original."""
    from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters as Parameters

    wanted = _classes(model, photos)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    greedy = GreedySelectionParameters(target_comp_ratio=keep, num_comp_ratio_candidates=10)
    automatic = Parameters.AutoModeParams(greedy, modules_to_ignore=[stem])

    def score(network: nn.Module, _iterations: int | None = None, *_cuda: bool, **_more: bool) -> float:
        return float((_classes(network, photos) == wanted).float().mean())

    def call() -> nn.Module:
        small, _ = ModelCompressor.compress_model(
            model, score, 1, tuple(IMAGE.shape), CompressionScheme.spatial_svd, CostMetric.mac,
            Parameters(Parameters.Mode.auto, automatic),
        )  # fmt: skip
        return small  # type: ignore[no-any-return]

    return call


def modelopt(model: nn.Module, photos: Tensor, keep: float) -> Call:
    """FastNAS; candidates are scored by agreement with the original, batch-norms follow the photos."""
    import modelopt.torch.prune

    wanted = _classes(model, photos)
    batches = list(zip(torch.split(photos[:SCORED], 8), torch.split(wanted, 8), strict=True))

    def score(network: nn.Module) -> float:
        return float((_classes(network, photos) == wanted).float().mean())

    def call() -> nn.Module:
        small, _ = modelopt.torch.prune.prune(
            copy_model(model), mode="fastnas", constraints={"flops": f"{100 * keep:g}%"}, dummy_input=IMAGE,
            config={"data_loader": batches, "score_func": score, "collect_func": lambda batch: batch[0]},
        )  # fmt: skip
        return small  # type: ignore[no-any-return]

    return call


def tensorly_torch(model: nn.Module, _: Tensor, keep: float) -> Call:
    """Tucker over the channels of every convolution, the same share of parameters everywhere."""
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
    """Tucker-2 of every convolution larger than 1x1, the same share of ranks everywhere."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer

    def at(share: float) -> nn.Module:
        small: nn.Module = Conv_Decomposer().decompose(model, percent_removed=1 - share)
        return small

    return _largest(at, model, keep)


def _largest(at: Callable[[float], nn.Module], model: nn.Module, keep: float) -> Call:
    """The call with the largest share that stays within the flops; or the smallest one."""
    most = keep * count_flops(model, (IMAGE,))
    low, high = 0.02, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if count_flops(at(middle), (IMAGE,)) <= most else (low, middle)
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
