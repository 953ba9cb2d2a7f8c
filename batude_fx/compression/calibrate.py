"""The two verbs: `plan` decides the ranks under a budget, `compress` also builds the network that has them."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from batude_fx.budget import rank_options
from batude_fx.calibration.batch_norm import renormalize, running_statistics
from batude_fx.calibration.images import BatchReservoir, Images, Inputs, image_batches
from batude_fx.calibration.statistics import average_metrics, statistics
from batude_fx.calibration.synthetic_inputs import SYNTHETIC_DRAWS, falls_back_to_noise, synthetic_batches
from batude_fx.compression.rank_search import SiteCandidate
from batude_fx.graph.sites import ConvSite
from batude_fx.support.progress import track
from batude_fx.tucker.dense_layers import canonical_weight
from batude_fx.tucker.spectra import Metric, metric_spectrum, weight_spectrum

Calibration = Images | Literal["synthetic"] | None


def calibration_label(calibration: Calibration, inputs: Inputs) -> str:
    """What a plan says of its calibration, one of the four texts of `Plan.calibration`."""
    if calibration is None:
        return "weights only"
    if not isinstance(calibration, str):
        return "images"
    return "synthetic noise" if falls_back_to_noise(inputs) else "synthetic"


def measure(
    model: nn.Module, sites: Sequence[ConvSite], calibration: Calibration, inputs: Inputs
) -> tuple[dict[str, Metric], tuple[Inputs, ...], dict[str, Tensor]]:
    """The metric of every site, and what the compressed network is matched on: batches, and batch-norm statistics."""
    if calibration is None or not sites:
        return {}, (), {}
    procedural = BatchReservoir(synthetic_batches(model, inputs))
    if isinstance(calibration, str):
        metrics, norms = _synthetic(model, sites, procedural, draws=SYNTHETIC_DRAWS)
        return metrics, tuple(procedural.kept), norms
    own = BatchReservoir(track(image_batches(calibration, inputs), "calibrating"))
    metrics = statistics(model, sites, own)
    if not falls_back_to_noise(inputs):  # a few images are not all that there is, but noise tells nothing of the rest
        metrics = average_metrics(metrics, _synthetic(model, sites, procedural, draws=1)[0])
    return metrics, tuple(own.kept), {}


def _synthetic(
    model: nn.Module, sites: Sequence[ConvSite], procedural: BatchReservoir, *, draws: int
) -> tuple[dict[str, Metric], dict[str, Tensor]]:
    """Metrics of a network whose batch-norms know these images, and their statistics."""
    batches = list(procedural)
    shown = track(batches, "calibrating, synthetic images")
    adapted = renormalize(model, batches)
    return statistics(adapted, sites, shown, draws=draws), running_statistics(adapted)


def decompose(
    model: nn.Module,
    sites: Mapping[str, ConvSite],
    options: Mapping[str, rank_options.RankOptions],
    measured: Mapping[str, Metric],
) -> dict[str, SiteCandidate]:
    """Every site with its options, judged by the spectrum of its weight; with a progress bar."""
    names = track(list(sites), "decomposing")
    return {name: _candidate(model, sites[name], options[name], measured.get(name)) for name in names}


def _candidate(
    model: nn.Module, site: ConvSite, options: rank_options.RankOptions, measured: Metric | None
) -> SiteCandidate:
    weight = canonical_weight(model.get_submodule(site.name))
    spectrum = metric_spectrum(measured) if measured else weight_spectrum(weight, pointwise=site.is_pointwise)
    return SiteCandidate(site, options.with_losses(spectrum.loss()), spectrum)
