"""Spectra: the factors of full rank are exact, and losses equal the error of the cut weights."""

import pytest
import torch
from torch import Tensor

from batude_fx.tucker.decomposition import Factors, mode_product
from batude_fx.tucker.metric import Metric, ModeMetric
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import Spectrum, metric_spectrum, weight_spectrum


def _tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _moment(groups: int, channels: int, seed: int) -> Tensor:
    spread = torch.logspace(0, -0.5, channels, dtype=torch.float64)
    samples = _tensor(groups, 4 * channels, channels, seed=seed) * spread
    return samples.mT @ samples / samples.shape[1]


def _dense(factors: Factors) -> Tensor:
    if factors.core is None:
        assert factors.factor_in is not None
        assert factors.factor_out is not None
        return factors.factor_out @ factors.factor_in.mT
    dense = factors.core
    if factors.factor_out is not None:
        dense = mode_product(dense, factors.factor_out, 0)
    return dense if factors.factor_in is None else mode_product(dense, factors.factor_in, 1)


def _metric(weight: Tensor, *, pointwise: bool) -> Metric:
    """Return the metric of inputs and gradients that have given moments and are uncorrelated between positions."""
    groups, c_out, c_in, *_ = weight.shape
    covariance, sensitivity = _moment(groups, c_in, 1), _moment(groups, c_out, 2)
    flat = weight.reshape(groups, c_out, c_in, -1)
    out = ModeMetric(torch.einsum("goik,gij,gpjk->gop", flat, covariance, flat), sensitivity)
    in_ = ModeMetric(covariance, torch.einsum("goik,gop,gpjk->gij", flat, sensitivity, flat))
    if not pointwise:
        return Metric(out, in_)
    return Metric(out, None) if c_out <= c_in else Metric(None, in_)


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize(("c_out", "c_in"), [(6, 10), (10, 6)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_factors_at_the_largest_ranks_are_exact(
    kernel: tuple[int, ...], c_out: int, c_in: int, calibrated: bool
) -> None:
    weight = _tensor(2, c_out, c_in, *kernel)
    pointwise = kernel != (3, 3)
    spectrum = (
        metric_spectrum(_metric(weight, pointwise=pointwise))
        if calibrated
        else weight_spectrum(weight, pointwise=pointwise)
    )
    full = min(c_out, c_in) if pointwise else None
    ranks = Ranks(full or c_out, full or c_in)
    torch.testing.assert_close(_dense(spectrum.factors(weight, ranks)).view_as(weight), weight, atol=1e-10, rtol=0)
    assert spectrum.loss().out[-1] == 0
    assert (spectrum.loss().out[:-1] >= spectrum.loss().out[1:]).all()


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_parts_have_equal_norms_whatever_the_metric(kernel: tuple[int, int]) -> None:
    weight, pointwise = _tensor(2, 6, 10, *kernel), kernel == (1, 1)
    metric = _metric(weight, pointwise=pointwise)
    skewed = Metric(metric.out and ModeMetric(metric.out.covariance, 1e6 * metric.out.sensitivity), metric.in_)
    ranks = Ranks(4, 4)
    plain, scaled = (metric_spectrum(m).factors(weight, ranks) for m in (metric, skewed))
    torch.testing.assert_close(_dense(scaled), _dense(plain))
    parts = [part for part in (scaled.factor_in, scaled.core, scaled.factor_out) if part is not None]
    for part in parts[1:]:
        torch.testing.assert_close(part.norm(), parts[0].norm())


def test_a_group_that_no_image_activates_leaves_the_others_their_scale() -> None:
    weight = _tensor(2, 6, 10, 3, 3)
    metric = _metric(weight, pointwise=False)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
    modes = [ModeMetric(mode.covariance, mode.sensitivity * mask) for mode in (metric.out, metric.in_) if mode]
    factors = metric_spectrum(Metric(*modes)).factors(weight, Ranks(4, 6))
    norms = [part.flatten(1).norm(dim=1) for part in vars(factors).values() if part is not None]
    for norm in norms[1:]:
        torch.testing.assert_close(norm, norms[0])
    active = metric_spectrum(Metric(*(ModeMetric(mode.covariance[1:], mode.sensitivity[1:]) for mode in modes)))
    torch.testing.assert_close(_dense(factors)[1:], _dense(active.factors(weight[1:], Ranks(4, 6))))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_directions_do_not_depend_on_the_scale_of_the_outputs(scale: float) -> None:
    weight = _tensor(1, 6, 10, 3, 3).float()
    metric = _metric(weight.double(), pointwise=False)
    modes = [ModeMetric(mode.covariance.float(), mode.sensitivity.float()) for mode in (metric.out, metric.in_) if mode]
    scaled = [ModeMetric(mode.covariance, mode.sensitivity * scale) for mode in modes]
    plain, other = (metric_spectrum(Metric(*pair)).factors(weight, Ranks(4, 6)) for pair in (modes, scaled))
    torch.testing.assert_close(_dense(other), _dense(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("c_out", "c_in"), [(7, 9), (9, 7)])
def test_the_loss_of_a_linear_site_is_the_expected_squared_change_of_the_output(c_out: int, c_in: int) -> None:
    weight = _tensor(1, c_out, c_in)
    spectrum = metric_spectrum(_metric(weight, pointwise=True))
    for rank in (1, 3, 6):
        error = _dense(spectrum.factors(weight, Ranks(rank, rank))) - weight
        expected = torch.einsum("goi,gij,gpj,gop->", error, _moment(1, c_in, 1), error, _moment(1, c_out, 2)) / 2
        # The metric is damped, which adds a little to every direction.
        assert spectrum.loss().out[rank] == pytest.approx(expected.item(), rel=0.2)


def test_weights_only_losses_are_discarded_energy() -> None:
    weight = _tensor(1, 8, 5, 3, 3)
    spectrum = weight_spectrum(weight, pointwise=False)
    for rank in (1, 4, 7):
        tail = torch.linalg.svdvals(weight[0].flatten(1))[rank:].square().sum() / weight.square().sum()
        assert spectrum.loss().out[rank] == pytest.approx(tail.item())


def test_a_metric_beats_the_plain_weights_where_inputs_are_correlated() -> None:
    weight = _tensor(1, 16, 12, 3, 3)
    metric = _metric(weight, pointwise=False)
    inputs = _tensor(200, 12, seed=5) * torch.logspace(0, -2, 12, dtype=torch.float64)

    def error(spectrum: Spectrum) -> float:
        change = (_dense(spectrum.factors(weight, Ranks(16, 6))) - weight)[0, :, :, 1, 1]
        return float((inputs @ change.mT).norm())

    assert error(metric_spectrum(metric)) < 0.5 * error(weight_spectrum(weight, pointwise=False))
