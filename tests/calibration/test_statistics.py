"""The statistics of calibration against plain formulas, on networks small enough to keep all activations."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import oas
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batude_fx.calibration.statistics import average_metrics, shrink, statistics
from batude_fx.errors import CalibrationError
from batude_fx.support.inputs import Inputs
from batude_fx.tucker.metric import Metric, ModeMetric
from batude_fx.tucker.ranks import Ranks
from batude_fx.tucker.spectra import metric_spectrum
from tests.toy_networks import site_of, small_net


def _statistics(net: nn.Sequential, images: Tensor) -> dict[str, object]:
    sites = [site_of(name, net[int(name)]) for name in ("0", "3")]
    return dict(statistics(net, sites, [Inputs((batch,)) for batch in torch.split(images, 4)]))


def _oas(vectors: Tensor) -> Tensor:
    """scikit-learn's shrunk covariance of (n, C)."""
    return torch.from_numpy(oas(vectors.detach().double().numpy())[0])


@given(st.integers(2, 40), st.integers(1, 20), st.integers(0, 2**31))
def test_shrinkage_is_that_of_scikit_learn(count: int, channels: int, seed: int) -> None:
    samples = torch.randn(2, count, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    samples = samples * torch.logspace(0, -3, channels, dtype=torch.float64)
    centred = samples - samples.mean(1, keepdim=True)
    found = shrink(centred.mT @ centred / count, count)
    torch.testing.assert_close(found, torch.stack([_oas(group) for group in samples]))


def test_shrinkage_keeps_zeros_and_scales_with_its_input() -> None:
    assert not shrink(torch.zeros(1, 3, 3), 10).any()
    moment = torch.diag(torch.tensor([1.0, 2.0, 3.0]))[None]
    torch.testing.assert_close(shrink(1e20 * moment, 10), 1e20 * shrink(moment, 10))


def test_losses_from_few_images_hold_for_other_images() -> None:
    """A classifier's layer sees one vector an image, here fewer than channels: losses must hold for other images."""
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) * torch.logspace(0, -1, 64)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).eval()
    site = site_of("0", net[0], positions=1)
    images, others = (torch.randn(count, 64) @ mixing.T for count in (32, 2000))
    spectrum = metric_spectrum(statistics(net, [site], [Inputs((images,))], draws=8)["0"])
    weight = net[0].weight.detach()
    for rank in (32, 40, 48):
        factors = spectrum.factors(weight[None], Ranks(rank, rank))
        change = (factors.factor_out @ factors.factor_in.mT)[0] - weight
        hidden = net[0](others)
        moved = net[2](torch.tanh(hidden + (others - others.mean(0)) @ change.T)) - net[2](torch.tanh(hidden))
        measured = (moved - moved.mean(1, keepdim=True)).square().sum(1).mean().item() / 2
        assert 0.2 < spectrum.loss().out[rank] / measured < 5


def test_statistics_are_the_covariances_of_all_positions() -> None:
    net = small_net().double().eval()
    images = torch.randn(10, 3, 7, 7, dtype=torch.float64)  # 49 positions: all are sampled
    measured = statistics(
        net, [site_of("0", net[0]), site_of("3", net[3])], [Inputs((b,)) for b in torch.split(images, 4)]
    )
    first = images.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(measured["0"].in_.covariance[0], _oas(first))
    hidden = net[:3](images)
    for group in (0, 1):
        grouped = hidden[:, 3 * group : 3 * group + 3].movedim(1, -1).flatten(0, 2)
        torch.testing.assert_close(measured["3"].in_.covariance[group], _oas(grouped))
    out = net[:4](images).movedim(1, -1).flatten(0, 2)[:, 4:]
    torch.testing.assert_close(measured["3"].out.covariance[1], _oas(out))


def test_covariances_survive_a_mean_that_dwarfs_them() -> None:
    net = small_net().eval()
    images = 1e3 + torch.randn(8, 3, 7, 7)
    measured = statistics(net, [site_of("0", net[0])], [Inputs((batch,)) for batch in torch.split(images, 4)])["0"]
    vectors = images.movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(measured.in_.covariance[0].double(), _oas(vectors), rtol=1e-3, atol=1e-3)


def test_sensitivities_average_to_the_gauss_newton_matrix() -> None:
    net = small_net().double().eval()
    images = torch.randn(1, 3, 7, 7, dtype=torch.float64).expand(4000, -1, -1, -1)
    measured = statistics(net, [site_of("3", net[3])], [Inputs((b,)) for b in torch.split(images, 500)])["3"]
    # The second convolution is followed by a mean over 25 positions and a linear layer: its Jacobian is known.
    centred = net[6].weight - net[6].weight.mean(0)
    expected = (centred.T @ centred / 25).detach()
    for group in (0, 1):
        block = expected[4 * group : 4 * group + 4, 4 * group : 4 * group + 4]
        torch.testing.assert_close(measured.out.sensitivity[group], block, atol=0.1 * block.max().item(), rtol=0)


@pytest.mark.parametrize(("c_in", "c_out"), [(6, 4), (4, 6)])
@pytest.mark.parametrize("linear", [False, True])
def test_a_pointwise_site_is_measured_where_it_has_fewer_channels(c_in: int, c_out: int, linear: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(c_in, c_out) if linear else nn.Conv2d(c_in, c_out, 1)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(c_out * 9, 5)).double()
    site = site_of("0", layer, positions=9)
    shape = (3, 3, c_in) if linear else (c_in, 3, 3)
    images = torch.randn(1000, *shape, dtype=torch.float64)
    metric = statistics(net, [site], [Inputs((batch,)) for batch in torch.split(images, 100)])["0"]
    axis = 3 if linear else 1
    weight = layer.weight.detach().flatten(1)
    vectors = images.movedim(axis, -1).flatten(0, 2)  # (n, c_in)
    # The gradient of every output position is a slice of the last layer's weight.
    head = net[2].weight.detach() - net[2].weight.detach().mean(0)
    head = head.view(5, *((3, 3, c_out) if linear else (c_out, 3, 3))).movedim(axis, -1).flatten(0, 2)  # (m, c_out)
    if c_out < c_in:
        assert metric.in_ is None
        vectors = vectors @ weight.T
    else:
        assert metric.out is None
        head = head @ weight
    measured = metric.out or metric.in_
    torch.testing.assert_close(measured.covariance[0], _oas(vectors))
    expected = head.T @ head
    torch.testing.assert_close(measured.sensitivity[0], expected, atol=0.15 * expected.max().item(), rtol=0)


def test_without_gradients_all_outputs_count_equally() -> None:
    class Argmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    net = nn.Sequential(nn.Conv2d(3, 6, 3), Argmax())
    metric = statistics(net, [site_of("0", net[0])], [Inputs((torch.randn(8, 3, 7, 7),))])["0"]
    assert metric.out.total() == pytest.approx(1)
    torch.testing.assert_close(metric.out.sensitivity[0], metric.out.sensitivity[0, 0, 0] * torch.eye(6))


def test_no_batch_is_an_error() -> None:
    net = small_net()
    with pytest.raises(CalibrationError, match="loader is empty"):
        statistics(net, [site_of("0", net[0])], [])


def test_gradients_that_overflow_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"gradients at 0 are too large for torch\.float32"):
        _statistics(small_net(), 1e30 * torch.randn(2, 3, 8, 8))


def test_the_model_is_left_as_it_was() -> None:
    net = small_net().train()
    net[0].weight.requires_grad_(False)
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    _statistics(net, torch.randn(8, 3, 7, 7))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert [module.training for module in net] == [True, False, True, True, True, True, True]
    assert not net[0].weight.requires_grad
    assert net[3].weight.requires_grad
    assert all(not module._forward_hooks for module in net)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_mixing_statistics_with_themselves_changes_nothing() -> None:
    net = small_net().eval()
    measured = statistics(net, [site_of("0", net[0])], [Inputs((torch.randn(8, 3, 7, 7),))])
    both = average_metrics(measured, measured)["0"]
    for mode in ("out", "in_"):
        for field in ("covariance", "sensitivity"):
            mixture, single = (getattr(getattr(metric, mode), field) for metric in (both, measured["0"]))
            torch.testing.assert_close(mixture, single)


def test_mixing_is_half_and_half_on_the_scale_of_the_own_images() -> None:
    def metric(covariance: float, sensitivity: float) -> Metric:
        return Metric(ModeMetric(*(value * torch.eye(2)[None] for value in (covariance, sensitivity))), None)

    both = average_metrics({"a": metric(2, 1)}, {"a": metric(4, 3)})["a"].out
    assert both is not None
    torch.testing.assert_close(both.covariance[0], 3 * torch.eye(2))
    # All errors together cost 4 and 24: the synthetic sensitivity counts for a sixth.
    torch.testing.assert_close(both.sensitivity[0], (1 + 3 / 6) / 2 * torch.eye(2))


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(CalibrationError, match="empty"):
        statistics(small_net(), [], [])


class _Checkpointed(nn.Module):
    """Computes its middle again in the backward pass, as networks do that save memory."""

    def __init__(self, *, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        def middle(x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).relu())
            return y

        y = middle(x) if self.use_reentrant is None else checkpoint(middle, x, use_reentrant=self.use_reentrant)
        return y.square().mean((2, 3))


class _Remembers(nn.Module):
    """Mixes what it computed for the images before into what it computes now."""

    before: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.register_buffer("before", torch.zeros(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        self.before.mul_(0.9).add_(y.mean((0, 2, 3)).view(6, 1, 1), alpha=0.1)
        return self.b((y + self.before).relu()).mean((2, 3))  # type: ignore[no-any-return]


def test_what_a_model_remembers_of_one_batch_does_not_disturb_the_next() -> None:
    model = _Remembers()
    sites = [site_of(name, model.get_submodule(name)) for name in ("a", "b")]
    batches = [Inputs((torch.randn(4, 3, 7, 7),)) for _ in range(3)]
    found = statistics(model, sites, batches)
    assert set(found) == {"a", "b"}
    assert not model.before.any()
    copy.deepcopy(model)


class _SharedHead(nn.Module):
    """Calls one layer on maps of two sizes inside a segment that the backward pass computes again, and once without."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.again = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), again

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        with torch.no_grad():
            self.head(y + 1)

        def segment(y: Tensor) -> Tensor:
            small = nn.functional.avg_pool2d(y, 4)
            return self.head(y).mean((2, 3)) + self.head(small).mean((2, 3))  # type: ignore[no-any-return]

        return checkpoint(segment, y, use_reentrant=True) if self.again else segment(y)


def test_a_shared_layer_is_measured_alike_in_a_segment_that_is_computed_again() -> None:
    plain, again = _SharedHead(again=False), _SharedHead(again=True)
    site = replace(site_of("head", plain.head), calls=3)
    batches = [Inputs((torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)),)) for seed in (1, 2)]
    expected, found = (statistics(net, [site], batches, draws=2)["head"] for net in (plain, again))
    for part in ("covariance", "sensitivity"):
        torch.testing.assert_close(getattr(found.out, part), getattr(expected.out, part))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_statistic(use_reentrant: bool) -> None:
    images = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    batches = [Inputs((batch,)) for batch in torch.split(images, 4)]
    plain, checkpointed = (_Checkpointed(use_reentrant=choice) for choice in (None, use_reentrant))
    sites = [site_of(name, plain.get_submodule(name)) for name in ("a", "b")]
    expected, found = (statistics(net, sites, batches, draws=2) for net in (plain, checkpointed))
    for name, metric in expected.items():
        for mode in ("out", "in_"):
            for part in ("covariance", "sensitivity"):
                torch.testing.assert_close(
                    getattr(getattr(found[name], mode), part), getattr(getattr(metric, mode), part)
                )
