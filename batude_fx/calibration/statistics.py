"""Statistics of every site over images: the metric in which its error counts.

One forward pass and a few backward passes per image, no weight gradients. Each site keeps running sums only: the
covariance of its input and output channels, and the second moment of the gradient that random combinations of the
network's outputs send to its output. Positions are sampled; activations are never kept.

Where there are few vectors, a classifier's one for each image say, the directions that none of them uses are not free:
all sums are shrunk towards their mean eigenvalue, by as much as their number calls for.

Source: random output combinations estimate the Gauss-Newton matrix: N. Schraudolph, "Fast Curvature Matrix-Vector
Products", Neural Computation 14(7), 2002; statistics of convolutions: Grosse and Martens 2016 (see `spectra`);
shrinkage: Y. Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE Transactions on Signal Processing
58(10), 2010, in the form of scikit-learn's `oas`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batude_fx.errors import CalibrationError, first_line
from batude_fx.graph.sites import ConvSite
from batude_fx.support.hooks import observe_calls, on_gradient
from batude_fx.support.model_state import eval_and_restore
from batude_fx.tucker.decomposition import mode_product, unfold
from batude_fx.tucker.dense_layers import canonical_weight
from batude_fx.tucker.spectra import Metric, ModeMetric

_POSITIONS = 49  # sampled per image and site: all of a 7 x 7 map


def statistics(
    model: nn.Module, sites: Sequence[ConvSite], batches: Iterable[tuple[object, ...]], *, draws: int = 1
) -> dict[str, Metric]:
    """Measure the sites of a model over batches of images.

    Args:
        model: Evaluated in eval mode; parameters, buffers and flags are the same afterwards.
        sites: The sites to measure.
        batches: Arguments of the model, on its device; the first tensor with axes among them is (n, ...).
        draws: Random combinations of the outputs per image; each costs a backward pass.

    Returns:
        Site name to statistics. Sites that no batch reaches are missing.

    Raises:
        CalibrationError: When there is no batch at all, the model does not run on one, or statistics overflow.
    """
    sums = {site.name: _Sums(site, canonical_weight(model.get_submodule(site.name))) for site in sites}
    generator = torch.Generator().manual_seed(0)
    images = 0
    layers = {name: model.get_submodule(name) for name in sums}

    def add_call(name: str, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> None:
        sums[name].add(tree_leaves((args, kwargs))[0], output, generator)

    with (
        eval_and_restore(model), _frozen_parameters(model), observe_calls(layers, after=add_call), torch.enable_grad()
    ):  # fmt: skip
        for batch in batches:
            inputs = tree_map_only(Tensor, _differentiable, batch)
            images += _images(batch)
            try:
                outputs = model(*inputs)
            except (RuntimeError, ValueError, AssertionError, IndexError) as error:
                full = isinstance(error, torch.OutOfMemoryError)
                way_out = "Move the model to the CPU" if full else "Resize them to what it takes"
                raise CalibrationError(
                    f"the model does not run on calibration images of shape {', '.join(_shapes(batch))}: "
                    f"{first_line(error)}. {way_out}."
                ) from error
            _backward_random_combinations(outputs, draws, generator)
    if not images:
        raise CalibrationError("no calibration images: the loader is empty. Pass at least one batch.")
    measured = {name: site_sums.metric(images * draws) for name, site_sums in sums.items() if site_sums.reached}
    for name, metric in measured.items():
        if not all(isfinite(mode.total()) for mode in (metric.out, metric.in_) if mode):
            raise CalibrationError(
                f"the activations or gradients at {name} are too large for {sums[name].weight.dtype}. Normalize the "
                "images, load trained weights, or compress model.double()."
            )
    return measured


def _images(batch: tuple[object, ...]) -> int:
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _shapes(batch: tuple[object, ...]) -> list[str]:
    return [str(tuple(leaf.shape)) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def _differentiable(x: Tensor) -> Tensor:
    # Not a leaf: models may work in place on what they are given.
    return x.detach().requires_grad_(x.is_floating_point()).clone()


class _Moments:
    """Running sum and second moment of channel vectors, one per group; the sums start near the mean when centred."""

    def __init__(self, channels: int, groups: int, like: Tensor, *, centred: bool) -> None:
        self.centred = centred
        self.count = 0
        self.shift: Tensor | None = None
        self.total = like.new_zeros(groups, channels)
        self.products = like.new_zeros(groups, channels, channels)

    def add(self, vectors: Tensor, weight: float = 1.0) -> None:
        """Add vectors (groups, n, C)."""
        if self.centred:
            if self.shift is None:
                self.shift = vectors.mean(1, keepdim=True)
            vectors = vectors - self.shift
        self.count += vectors.shape[1]
        self.total += vectors.sum(1)
        self.products.baddbmm_(vectors.mT, vectors, alpha=weight)

    def covariance(self) -> Tensor:
        """(groups, C, C), centred."""
        mean = self.total / self.count
        return self.products / self.count - mean[:, :, None] * mean[:, None, :]


class _Sums:
    """Running sums of one site, of the modes that ranks can cut."""

    def __init__(self, site: ConvSite, weight: Tensor) -> None:
        self.site, self.weight = site, weight  # (groups, C_out, C_in, k...)
        c_out, c_in = site.group_out_channels, site.group_in_channels
        self.covariances = {
            mode: _Moments((c_out, c_in)[mode], site.groups, weight, centred=True) for mode in site.modes
        }
        # With respect to the output, or through the weight to the input where only that is needed: fewer channels.
        self.through = weight.flatten(2) if site.modes == (1,) else None  # (groups, C_out, C_in)
        self.gradients = _Moments(c_out if self.through is None else c_in, site.groups, weight, centred=False)

    def add(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Add one call; the gradient of its output is added when the backward pass reaches it."""
        if not x.numel() or not y.numel():  # a detector that finds no box
            return
        inputs, outputs = self._maps(x), self._maps(y)
        positions = _sample(outputs.shape[2], generator)
        if 0 in self.covariances:
            self.covariances[0].add(self._vectors(outputs, positions))
        if 1 in self.covariances:
            self.covariances[1].add(self._vectors(inputs, _sample(inputs.shape[2], generator)))
        if y.requires_grad:
            # The sampled positions stand for all of them.
            weight = outputs.shape[2] / len(positions)

            def add_gradient(gradient: Tensor) -> None:
                vectors = self._vectors(self._maps(gradient), positions)
                self.gradients.add(vectors if self.through is None else vectors @ self.through, weight)

            on_gradient(y, add_gradient)

    def _maps(self, x: Tensor) -> Tensor:
        """(N, C, positions); a classifier's features have a single one, and one image may come without its N."""
        x = x.detach().to(self.weight.dtype)  # a model may compute in half precision inside
        if x.ndim == len(self.site.kernel_size) + 1:
            x = x[None]
        maps = x.movedim(1 if self.site.kernel_size else -1, 1)
        return maps.flatten(2) if maps.ndim > 2 else maps[..., None]  # noqa: PLR2004 - (N, C)

    def _vectors(self, maps: Tensor, positions: Tensor) -> Tensor:
        """The channel vectors (groups, n, C) of maps (N, groups * C, P) at some positions."""
        sampled = maps[..., positions]  # (N, groups * C, p)
        sampled = sampled.view(len(sampled), self.site.groups, -1, len(positions))
        return sampled.permute(1, 0, 3, 2).flatten(1, 2)

    @property
    def reached(self) -> bool:
        """Whether the site was called at all."""
        return all(moments.count for moments in self.covariances.values())

    def metric(self, gradients: int) -> Metric:
        """What the sums amount to over so many gradients of images."""
        covariances = {mode: shrink(one.covariance(), one.count) for mode, one in self.covariances.items()}
        sensitivity = self._sensitivity(gradients)
        out = ModeMetric(covariances[0], sensitivity) if 0 in covariances else None
        if 1 not in covariances:
            return Metric(out, None)
        if self.through is None:
            weighed = unfold(mode_product(self.weight, sensitivity, 0), 1)
            sensitivity = weighed @ unfold(self.weight, 1).mT
        return Metric(out, ModeMetric(covariances[1], sensitivity))

    def _sensitivity(self, gradients: int) -> Tensor:
        """Where no gradient arrives, every output direction matters alike, and the whole variance counts as 1.

        So it is, too, where all gradients are zero: in a fresh network whose branches end in batch-norms of zero gain.
        """
        if self.gradients.count and self.gradients.products.any():
            return shrink(self.gradients.products / gradients, self.gradients.count)
        like = self.gradients.products
        alike = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)
        if self.through is not None:
            alike = self.through.mT @ self.through
        covariance = next(iter(self.covariances.values())).covariance()
        variance = (covariance * alike).sum()
        return alike / torch.where(variance > torch.finfo(variance.dtype).tiny ** 0.5, variance, 1)


def shrink(moment: Tensor, count: int) -> Tensor:
    """Oracle approximating shrinkage of second moments.

    Args:
        moment: (groups, C, C).
        count: Vectors that it is the mean of.

    Returns:
        (groups, C, C), nearer to a multiple of the identity the fewer vectors there were.
    """
    channels, tiny = moment.shape[-1], torch.finfo(moment.dtype).tiny
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    squares = (moment / mean.clamp_min(tiny)).square().sum((-2, -1), keepdim=True)  # C where all eigenvalues are alike
    share = ((squares + channels**2) / ((count + 1) * (squares - channels).clamp_min(tiny))).clamp_max(1)
    return moment.lerp(mean * torch.eye(channels, dtype=moment.dtype, device=moment.device), share)


def _sample(positions: int, generator: torch.Generator) -> Tensor:
    if positions <= _POSITIONS:
        return torch.arange(positions, device="cpu")
    return torch.randperm(positions, generator=generator, device="cpu")[:_POSITIONS]


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Gradients to activations only: the backward pass then costs no more than the forward pass."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _backward_random_combinations(outputs: object, draws: int, generator: torch.Generator) -> None:
    """Send the gradients of random combinations of each image's outputs back; logits are centred over the classes.

    Every output counts alike, not only those that the labels of these images need: users have other images.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    for draw in range(draws if tensors else 0):
        directions = [_direction(tensor, generator) for tensor in tensors]
        torch.autograd.backward(tensors, directions, retain_graph=draw < draws - 1)


def _direction(output: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(output.shape, generator=generator, device="cpu").to(output)
    return direction - direction.mean(-1, keepdim=True) if output.ndim == 2 else direction  # noqa: PLR2004 - (N, classes)


def average_metrics(own: Mapping[str, Metric], synthetic: Mapping[str, Metric]) -> dict[str, Metric]:
    """Statistics of the user's images, half and half with synthetic ones: few images of one kind are not all there is.

    Sensitivities are brought to the same total error first.
    """
    own_total, synthetic_total = _total(own), _total(synthetic)
    scale = own_total / synthetic_total if synthetic_total else 1.0

    def half(a: ModeMetric | None, b: ModeMetric | None) -> ModeMetric | None:
        if a is None or b is None:
            return a
        sensitivity = (a.sensitivity + scale * b.sensitivity) / 2
        return ModeMetric((a.covariance + b.covariance) / 2, sensitivity)

    pairs = {name: (metric, synthetic.get(name, metric)) for name, metric in own.items()}
    return {name: Metric(half(a.out, b.out), half(a.in_, b.in_)) for name, (a, b) in pairs.items()}


def _total(measured: Mapping[str, Metric]) -> float:
    """What the network would lose if every site lost everything."""
    return sum(cast("ModeMetric", metric.out or metric.in_).total() for metric in measured.values())
