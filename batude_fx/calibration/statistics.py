"""Statistics of every site over calibration images: the metric in which an error at the site counts.

Each image takes one forward pass and a few backward passes, without gradients of parameters. Each site keeps running
sums only, never activations: the covariance of its channels, and the second moment of the gradients that random
combinations of the network's outputs send to it. Positions are sampled. `ModeMetric` in `tucker.metric` derives how
these two matrices give the loss of cutting channel directions.

The gradients estimate a Gauss-Newton matrix. Let J be the Jacobian of the network's outputs with respect to the
channels at one position. An error e there changes the outputs by J e, whose squared norm is e^T (J^T J) e. For random
r with E[r r^T] = I, the gradient of r^T outputs is g = J^T r, so E[g g^T] = J^T E[r r^T] J = J^T J: one backward pass
gives an unbiased sample, however many outputs there are.

A covariance of few vectors has directions that no vector uses, for example that of a classifier, which sees one vector
per image. They would be free to cut, although other images use them; so all sums are shrunk towards a multiple of the
identity, see `shrink`.

Source: random combinations of outputs for the Gauss-Newton matrix: N. Schraudolph, "Fast Curvature Matrix-Vector
Products", Neural Computation 14(7), 2002; statistics of convolutions: R. Grosse, J. Martens, ICML 2016,
https://arxiv.org/abs/1602.01407; shrinkage: Y. Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE
Transactions on Signal Processing 58(10), 2010, https://arxiv.org/abs/0907.4698, in the form of scikit-learn's `oas`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import CalibrationError, first_line
from batude_fx.graph.sites import ConvSite
from batude_fx.support.hooks import observe_calls, on_gradient
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy, without_graphs
from batude_fx.tucker.decomposition import mode_product, unfold
from batude_fx.tucker.dense_layers import canonical_weight
from batude_fx.tucker.metric import Metric, ModeMetric

_FINGERPRINT = 16  # values
_POSITIONS = 49  # positions that are sampled per call of a site: all of a 7 x 7 map


def statistics(
    model: nn.Module, sites: Sequence[ConvSite], batches: Iterable[Inputs], *, draws: int = 1
) -> dict[str, Metric]:
    """Measure the metric of every site over batches of images.

    Args:
        model: Run in eval mode; parameters, buffers and flags are the same afterwards.
        sites: The sites to measure.
        batches: Arguments of the model, on its device; the first tensor with axes among them is (n, ...).
        draws: Number of random combinations of the outputs per image; each costs a backward pass.

    Returns:
        Site name to metric. Sites that are called on no batch are missing.

    Raises:
        CalibrationError: When there is no batch at all, the model does not run on one, or statistics overflow.
    """
    sums = {site.name: _site_sums(site, canonical_weight(model.get_submodule(site.name))) for site in sites}
    generator = torch.Generator().manual_seed(0)
    without_gradient: dict[tuple[object, ...], Tensor] = {}  # site and input of a call to the positions sampled in it
    called_sites = set()
    images = 0

    def add_call(name: str, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> None:
        x = tree_leaves((args, kwargs))[0]
        if not x.numel() or not output.numel():  # a detector that finds no box
            return
        if _in_backward_pass():  # activation checkpointing computes a segment again; its activations are in the sums
            positions = without_gradient.get((name, *_fingerprint(x)))
            if output.requires_grad and positions is not None:
                on_gradient(output, partial(sums[name].add_gradient, positions=positions))
            return
        called_sites.add(name)
        positions = sums[name].add_activations(x, output, generator)
        if output.requires_grad:
            on_gradient(output, partial(sums[name].add_gradient, positions=positions))
        else:
            without_gradient[name, *_fingerprint(x)] = positions

    with private_copy(model) as first_copy, torch.enable_grad():
        copied = first_copy
        for batch in batches:
            layers = {name: copied.get_submodule(name) for name in sums}
            with observe_calls(layers, after=add_call):
                outputs = _run(copied, batch)
                _backward_random_combinations(outputs, draws, generator)
            images += _count_images(batch)
            without_gradient.clear()
            copied = without_graphs(copied, model)
    if not images:
        raise CalibrationError("no calibration images: the loader is empty. Pass at least one batch.")
    metrics = {name: site_sums.metric(images * draws) for name, site_sums in sums.items() if name in called_sites}
    for name, metric in metrics.items():
        _refuse_overflow(name, metric)
    return metrics


def _run(model: nn.Module, batch: Inputs) -> object:
    """Return the outputs of a model on a batch, differentiable with respect to the floating-point inputs.

    Raises:
        CalibrationError: When the model does not run on the batch.
    """
    try:
        return batch.map(_differentiable).run(model)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        way_out = "Move the model to the CPU" if out_of_memory else "Resize them to what it takes"
        raise CalibrationError(
            f"the model does not run on calibration images of shape {', '.join(_shapes(batch))}: "
            f"{first_line(error)}. {way_out}."
        ) from error


def _fingerprint(x: Tensor) -> tuple[object, ...]:
    """Return what a call can be recognized by when a backward pass computes it again: the shape and some values."""
    values = x.detach().reshape(-1)
    return (*x.shape, *values[:: max(1, len(values) // _FINGERPRINT)].tolist())


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001 - as torch's own multi_grad_hook asks


def _refuse_overflow(name: str, metric: Metric) -> None:
    """Refuse the metric of a site that is not finite."""
    for mode in (metric.out, metric.in_):
        if mode and not isfinite(mode.total()):
            raise CalibrationError(
                f"the activations or gradients at {name} are too large for {mode.covariance.dtype}. Normalize the "
                "images, load trained weights, or compress model.double()."
            )


def _count_images(batch: Inputs) -> int:
    """Return the length of the first tensor with axes, 1 if there is none."""
    return next((len(tensor) for tensor in batch.tensors() if tensor.ndim), 1)


def _shapes(batch: Inputs) -> list[str]:
    return [str(tuple(tensor.shape)) for tensor in batch.tensors()]


def _differentiable(x: Tensor) -> Tensor:
    # The clone is not a leaf of the graph: models may work on their inputs in place.
    return x.detach().requires_grad_(x.is_floating_point()).clone()


@dataclass(frozen=True)
class _ChannelReader:
    """Reads channel vectors from inputs, outputs and gradients (N, C, ...) or (C, ...) of one site.

    Attributes:
        site: The site; a linear layer has its channels in the last axis.
        dtype: Type of the vectors; the model may compute in half precision inside.
    """

    site: ConvSite
    dtype: torch.dtype

    def count_positions(self, x: Tensor) -> int:
        """Return the number of positions of a map; 1 for a linear layer on (N, C)."""
        spatial_axes = len(self.site.kernel_size)
        return (x.shape[-spatial_axes:] if spatial_axes else x.shape[1:-1]).numel()

    def sample_positions(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw positions of a map without replacement; all of them if there are at most 49."""
        count = self.count_positions(x)
        if count <= _POSITIONS:
            return torch.arange(count, device="cpu")
        return torch.randperm(count, generator=generator, device="cpu")[:_POSITIONS]

    def vectors(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the channel vectors (groups, n, C / groups) of all images at some positions."""
        sampled = self._maps(x)[..., positions]  # (N, C, p)
        sampled = sampled.view(len(sampled), self.site.groups, -1, len(positions))
        return sampled.permute(1, 0, 3, 2).flatten(1, 2)

    def _maps(self, x: Tensor) -> Tensor:
        """Return a map as (N, C, positions)."""
        x = x.detach().to(self.dtype)
        if x.ndim == len(self.site.kernel_size) + 1:  # one image without a batch axis
            x = x[None]
        maps = x.movedim(1 if self.site.kernel_size else -1, 1)
        return maps.flatten(2) if maps.ndim > 2 else maps[..., None]  # noqa: PLR2004 - (N, C)


class _Moments:
    """Running sums of channel vectors v, per group, for the second moment E[v v^T] or the covariance.

    The covariance is E[(v - s)(v - s)^T] - E[v - s] E[v - s]^T for any shift s. The mean of the first call is a shift
    close to the mean, so that little is subtracted and few digits cancel.
    """

    def __init__(self, channels: int, groups: int, like: Tensor, *, centred: bool) -> None:
        self.centred = centred
        self.count = 0
        self.shift: Tensor | None = None
        self.total = like.new_zeros(groups, channels)
        self.products = like.new_zeros(groups, channels, channels)

    def add(self, vectors: Tensor, weight: float = 1.0) -> None:
        """Add vectors (groups, n, C); their products count `weight` times."""
        if self.centred:
            if self.shift is None:
                self.shift = vectors.mean(1, keepdim=True)
            vectors = vectors - self.shift
        self.count += vectors.shape[1]
        self.total += vectors.sum(1)
        self.products.baddbmm_(vectors.mT, vectors, alpha=weight)

    def covariance(self) -> Tensor:
        """Return the covariance (groups, C, C)."""
        mean = self.total / self.count
        return self.products / self.count - mean[:, :, None] * mean[:, None, :]


class _TwoModeSums:
    """Running sums of a site at which ranks cut both channel modes.

    With inputs x, outputs y, and gradients g with respect to y:

        out: covariance Cov(y), sensitivity H = sum over positions of E[g g^T]
        in_: covariance Cov(x), sensitivity sum_k W_k^T H W_k

    W_k (C_out, C_in) is the weight at kernel offset k, so no gradient with respect to x is needed. Let J_q be the
    Jacobian of the network with respect to y at position q. That with respect to x at one position is the sum of J_q
    W_k over all q that this x reaches through an offset k. The J_q of different positions are taken to be uncorrelated,
    so the square of that sum is, in the mean, the sum of W_k^T J_q^T J_q W_k. Over all positions of x, every q meets
    every k once (but for padding), and the sum of the J_q^T J_q is H.
    """

    def __init__(self, site: ConvSite, weight: Tensor) -> None:
        self.weight = weight  # (groups, C_out, C_in, k...)
        self.reader = _ChannelReader(site, weight.dtype)
        self.outputs = _Moments(site.group_out_channels, site.groups, weight, centred=True)
        self.inputs = _Moments(site.group_in_channels, site.groups, weight, centred=True)
        self.gradients = _Moments(site.group_out_channels, site.groups, weight, centred=False)

    def add_activations(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Add the input and the output of one call; return the positions that were sampled in the output."""
        positions = self.reader.sample_positions(y, generator)
        self.outputs.add(self.reader.vectors(y, positions))
        self.inputs.add(self.reader.vectors(x, self.reader.sample_positions(x, generator)))
        return positions

    def add_gradient(self, gradient: Tensor, positions: Tensor) -> None:
        """Add the gradient of the output of one call; the sampled positions stand for all of them."""
        weight = self.reader.count_positions(gradient) / len(positions)
        self.gradients.add(self.reader.vectors(gradient, positions), weight)

    def metric(self, combinations: int) -> Metric:
        """Return the metric, given the number of random combinations of outputs of all images."""
        output_covariance = self.outputs.covariance()
        sensitivity = _sensitivity(self.gradients, combinations, output_covariance, _identity(output_covariance))
        weighed = unfold(mode_product(self.weight, sensitivity, 0), 1)  # (groups, C_in, C_out * k...), of H W_k
        input_sensitivity = weighed @ unfold(self.weight, 1).mT
        return Metric(
            out=ModeMetric(shrink(output_covariance, self.outputs.count), sensitivity),
            in_=ModeMetric(shrink(self.inputs.covariance(), self.inputs.count), input_sensitivity),
        )


class _PointwiseSums:
    """Running sums of a pointwise site y = W x, at which one rank cuts the mode with fewer channels.

    With gradients g with respect to y:

        C_out <= C_in, out: covariance Cov(y), sensitivity H = sum over positions of E[g g^T]
        C_out > C_in, in_: covariance Cov(x), sensitivity W^T H W = sum over positions of E[(W^T g)(W^T g)^T]

    By the chain rule, W^T g is the gradient with respect to x, so that in both cases only matrices of the smaller mode
    are summed.
    """

    def __init__(self, site: ConvSite, weight: Tensor) -> None:
        self.cuts_inputs = site.modes == (1,)
        self.weight = weight.flatten(2)  # (groups, C_out, C_in)
        self.reader = _ChannelReader(site, weight.dtype)
        channels = min(site.group_in_channels, site.group_out_channels)
        self.activations = _Moments(channels, site.groups, weight, centred=True)
        self.gradients = _Moments(channels, site.groups, weight, centred=False)

    def add_activations(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Add the input or the output of one call; return the positions that were sampled in the output."""
        positions = self.reader.sample_positions(y, generator)
        if self.cuts_inputs:  # a layer with a stride has more input positions
            self.activations.add(self.reader.vectors(x, self.reader.sample_positions(x, generator)))
        else:
            self.activations.add(self.reader.vectors(y, positions))
        return positions

    def add_gradient(self, gradient: Tensor, positions: Tensor) -> None:
        """Add the gradient of the output of one call; the sampled positions stand for all of them."""
        weight = self.reader.count_positions(gradient) / len(positions)
        vectors = self.reader.vectors(gradient, positions)
        self.gradients.add(vectors @ self.weight if self.cuts_inputs else vectors, weight)

    def metric(self, combinations: int) -> Metric:
        """Return the metric, given the number of random combinations of outputs of all images."""
        covariance = self.activations.covariance()
        uniform = self.weight.mT @ self.weight if self.cuts_inputs else _identity(covariance)
        sensitivity = _sensitivity(self.gradients, combinations, covariance, uniform)
        mode = ModeMetric(shrink(covariance, self.activations.count), sensitivity)
        return Metric(out=None, in_=mode) if self.cuts_inputs else Metric(out=mode, in_=None)


def _site_sums(site: ConvSite, weight: Tensor) -> _TwoModeSums | _PointwiseSums:
    return _PointwiseSums(site, weight) if site.is_pointwise else _TwoModeSums(site, weight)


def _identity(like: Tensor) -> Tensor:
    """Return one identity per group, (groups, C, C)."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _sensitivity(gradients: _Moments, combinations: int, covariance: Tensor, uniform: Tensor) -> Tensor:
    """Return the sensitivity (groups, C, C) of one mode.

    Args:
        gradients: Sums over all images and positions.
        combinations: Number of random combinations of outputs of all images.
        covariance: (groups, C, C) of the channels.
        uniform: (groups, C, C) the sensitivity if all output channels of the site matter alike, up to scale. It is
            used, scaled so that cutting everything costs 1, where no gradient arrives, or where all gradients are zero
            as in a fresh network whose branches end in batch-norms of zero gain.
    """
    if gradients.count and gradients.products.any():
        return shrink(gradients.products / combinations, gradients.count)
    variance = (covariance * uniform).sum()
    return uniform / torch.where(variance > torch.finfo(variance.dtype).tiny ** 0.5, variance, 1)


def shrink(moment: Tensor, count: int) -> Tensor:
    """Return the oracle approximating shrinkage (OAS) of second moments.

    The eigenvalues of S, the mean of n products v v^T, are spread too far: the large ones are too large, the small ones
    too small. (1 - a) S + a m I, with m = trace(S) / C, pulls all of them towards their mean m. The a with the least
    expected squared error depends on the true moment. Chen et al. put the shrunk estimate in its place and iterate,
    which converges to a closed form for Gaussian vectors. Without its terms 2 / C, as in scikit-learn, it is

        a = (t + C^2) / ((n + 1) (t - C)), at most 1, with t = trace(S^2) / m^2.

    t is C if all eigenvalues are equal, and larger the more they differ. So the shrinkage is less for more vectors, and
    for eigenvalues that differ more.

    Args:
        moment: (groups, C, C).
        count: Number n of vectors that it is the mean of.

    Returns:
        (groups, C, C).
    """
    channels, tiny = moment.shape[-1], torch.finfo(moment.dtype).tiny
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    squares = (moment / mean.clamp_min(tiny)).square().sum((-2, -1), keepdim=True)
    share = ((squares + channels**2) / ((count + 1) * (squares - channels).clamp_min(tiny))).clamp_max(1)
    return moment.lerp(mean * torch.eye(channels, dtype=moment.dtype, device=moment.device), share)


def _backward_random_combinations(outputs: object, draws: int, generator: torch.Generator) -> None:
    """Backpropagate random combinations of the outputs of each image, `draws` times.

    All outputs count alike, not only those of the classes that these images show: users have other images.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    for draw in range(draws if tensors else 0):
        directions = [_direction(tensor, generator) for tensor in tensors]
        torch.autograd.backward(tensors, directions, retain_graph=draw < draws - 1)


def _direction(output: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the random r of a combination r^T output; for logits (N, classes), r is centred over the classes.

    A change that is the same for all logits does not change their softmax. Centred, r has the covariance P = I - 1 1^T
    / classes, and gradients J^T r have the second moment J^T P J, in which such a change costs nothing.
    """
    direction = torch.randn(output.shape, generator=generator, device="cpu").to(output)
    return direction - direction.mean(-1, keepdim=True) if output.ndim == 2 else direction  # noqa: PLR2004 - (N, classes)


def average_metrics(own: Mapping[str, Metric], synthetic: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the mean of the metrics on the user's images and on synthetic ones.

    A few images of one kind do not show all that a network is used for. The synthetic sensitivities are scaled first,
    so that cutting everything costs as much on the synthetic images as on the user's.

    Args:
        own: Site name to metric on the user's images.
        synthetic: Site name to metric on synthetic images; where a site is missing, only its own metric counts.
    """
    own_total, synthetic_total = _total(own), _total(synthetic)
    scale = own_total / synthetic_total if synthetic_total else 1.0

    def average(a: ModeMetric | None, b: ModeMetric | None) -> ModeMetric | None:
        if a is None or b is None:
            return a
        sensitivity = (a.sensitivity + scale * b.sensitivity) / 2
        return ModeMetric((a.covariance + b.covariance) / 2, sensitivity)

    pairs = {name: (metric, synthetic.get(name, metric)) for name, metric in own.items()}
    return {name: Metric(average(a.out, b.out), average(a.in_, b.in_)) for name, (a, b) in pairs.items()}


def _total(metrics: Mapping[str, Metric]) -> float:
    """Return twice the loss of cutting all directions of all sites, each site by one of its modes."""
    return sum(cast("ModeMetric", metric.out or metric.in_).total() for metric in metrics.values())
