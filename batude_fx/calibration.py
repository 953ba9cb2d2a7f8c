"""Statistics of every site over unlabelled images: the metric in which its error counts.

One forward and one backward pass per image, no weight gradients. Each site keeps running sums only: the covariance of
its input and output channels, and the second moment of the gradient that random combinations of the network's outputs
send to its output. Positions are sampled; activations are never kept.

Without images of the user, procedural ones stand in (`synthetic`). Their statistics are wrong for the network in one
respect that can be mended: its batch-norm layers know the mean and variance of every channel on the images it was
trained on. So the network that is measured normalizes by the statistics of the *synthetic* images: then every layer
receives channels with the mean and variance it knows from training, and only their correlations are synthetic.

Source: random output combinations estimate the Gauss-Newton matrix: N. Schraudolph, "Fast Curvature Matrix-Vector
Products", Neural Computation 14(7), 2002; statistics of convolutions: Grosse and Martens 2016 (see `spectra`).
Batch-norm as a memory of the training images: H. Yin et al., "Dreaming to Distill", CVPR 2020,
https://arxiv.org/abs/1912.08795.
"""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batude_fx.borrowing import borrowed
from batude_fx.errors import CalibrationError
from batude_fx.sites import ConvSite
from batude_fx.spectra import Metric
from batude_fx.synthetic import dead_leaves

Images = Tensor | Iterable[Tensor | Sequence[Tensor]]
Inputs = tuple[object, ...]
ModelT = TypeVar("ModelT", bound=nn.Module)

SYNTHETIC_IMAGES = 96
_BATCH = 8  # the backward pass keeps the activations of this many images
_KEPT = 8  # batches that later pass through the compressed network
_POSITIONS = 49  # sampled per image and site: all of a 7 x 7 map
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def statistics(model: nn.Module, sites: Sequence[ConvSite], batches: Iterable[Inputs]) -> dict[str, Metric]:
    """Measure the sites of a model over batches of images.

    Args:
        model: Evaluated in eval mode; parameters, buffers and flags are the same afterwards.
        sites: The sites to measure.
        batches: Arguments of the model, on its device; the first tensor among them is (n, ...).

    Returns:
        Site name to statistics. Sites that no batch reaches are missing.

    Raises:
        CalibrationError: When there is no batch at all.
    """
    sums = {site.name: _Sums(site, next(model.get_submodule(site.name).parameters())) for site in sites}
    generator = torch.Generator().manual_seed(0)
    images = 0
    with borrowed(model), _frozen_parameters(model), _listening(model, sums, generator), torch.enable_grad():
        for batch in batches:
            inputs = tree_map_only(Tensor, _differentiable, batch)
            images += len(tree_leaves(batch)[0])
            _backward_random_combination(model(*inputs), generator)
    if not images:
        raise CalibrationError("no calibration images: the loader is empty. Pass at least one batch.")
    return {name: site_sums.metric(images) for name, site_sums in sums.items() if site_sums.inputs.count}


class Keeper:
    """Passes batches on and keeps a few of them, each as likely as any other, however many there are.

    Attributes:
        kept: Up to `_KEPT` batches.
    """

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self._batches = batches
        self.kept: list[Inputs] = []

    def __iter__(self) -> Iterator[Inputs]:
        """Reservoir sampling: Vitter's algorithm R, ACM Transactions on Mathematical Software 11(1), 1985."""
        chance = random.Random(0)  # noqa: S311 - no secret depends on it
        for index, batch in enumerate(self._batches):
            slot = chance.randrange(index + 1)
            if len(self.kept) < _KEPT:
                self.kept.append(batch)
            elif slot < _KEPT:
                self.kept[slot] = batch
            yield batch


def _differentiable(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def image_batches(images: Images, inputs: Inputs) -> Iterator[Inputs]:
    """Split what the user gave into small checked batches on the model's device.

    Args:
        images: A tensor (N, ...), or an iterable of batches, each a tensor or an (images, labels) pair.
        inputs: The example input of a model that takes one tensor (1, ...): shape, dtype and device.

    Raises:
        CalibrationError: When the model takes something else, or a batch has another shape than the example, is not
            finite, or is no tensor.
    """
    like = _only_tensor(inputs)
    if like is None:
        raise CalibrationError(
            "calibration images need a model that takes one tensor (N, ...), this one takes a structure. "
            'Use calibration="synthetic" or calibration=None.'
        )
    source: Iterable[Tensor | Sequence[Tensor]] = (images,) if isinstance(images, Tensor) else images
    for index, item in enumerate(source):
        batch = item if isinstance(item, Tensor) else item[0]
        _check_batch(batch, index, like)
        for part in torch.split(batch, _BATCH):
            yield (part.to(like),)


def _check_batch(batch: Tensor, index: int, like: Tensor) -> None:
    if not isinstance(batch, Tensor):
        raise CalibrationError(f"calibration batch {index} is a {type(batch).__name__}, not a tensor (N, ...).")
    if batch.ndim != like.ndim or batch.shape[1] != like.shape[1]:
        expected = ", ".join(["N", *map(str, like.shape[1:])])
        hint = " Add the batch axis: images.unsqueeze(0)." if batch.ndim == like.ndim - 1 else ""
        raise CalibrationError(
            f"calibration batch {index} has shape {tuple(batch.shape)}, the model takes ({expected}).{hint}"
        )
    if not batch.is_floating_point():
        raise CalibrationError(f"calibration batch {index} is {batch.dtype}; normalize the images to floats first.")
    if not batch.isfinite().all():
        raise CalibrationError(f"calibration batch {index} holds NaN or infinite values; check the loader.")


def synthetic_batches(model: nn.Module, inputs: Inputs, *, seed: int = 0) -> list[Inputs]:
    """Procedural inputs for a model, of the structure of its example input.

    Args:
        model: timm models know the mean and standard deviation they want; ImageNet's are taken for all others.
        inputs: The example input.
        seed: Of the images.

    Returns:
        Batches of dead leaves wherever the example has images (1, 1 or 3 channels, H, W), Gaussian noise of the
        example's shape elsewhere.
    """
    like = _only_tensor(inputs)
    if like is not None:
        images = _synthetic_tensor(model, SYNTHETIC_IMAGES, like.shape[1:], seed).to(like)
        return [(batch,) for batch in torch.split(images, _BATCH)]

    def like_example(run: int) -> Inputs:
        def one(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            batch = tensor.shape[0] if tensor.ndim > 3 else 1  # noqa: PLR2004 - (C, H, W)
            return _synthetic_tensor(model, batch, tensor.shape[-3:], seed + run).view(tensor.shape).to(tensor)

        return cast("Inputs", tree_map_only(Tensor, one, inputs))

    return [like_example(run) for run in range(_BATCH)]


def _synthetic_tensor(model: nn.Module, count: int, shape: Sequence[int], seed: int) -> Tensor:
    if len(shape) != 3 or shape[0] not in {1, 3}:  # noqa: PLR2004 - (C, H, W)
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    channels = shape[0]
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        torch.tensor(config.get(key, default)[:channels]).view(-1, 1, 1)
        for key, default in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD))
    )
    images = dead_leaves(count, (shape[1], shape[2]), seed=seed)  # (count, 3, H, W)
    return ((images if channels == 3 else images.mean(1, keepdim=True)) - mean) / std  # noqa: PLR2004 - RGB


def _only_tensor(inputs: Inputs) -> Tensor | None:
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else None


def normalized_by(model: ModelT, batches: Sequence[Inputs]) -> ModelT:
    """A copy of the model whose batch-norm layers hold the statistics of these batches.

    Args:
        model: Left as it is.
        batches: Arguments of the model.

    Returns:
        A copy in eval mode; `model` itself where it has no batch-norm with running statistics.
    """
    if not any(_has_running_statistics(module) for module in model.modules()):
        return model
    adapted = copy.deepcopy(model).eval()
    for module in adapted.modules():
        if _has_running_statistics(module):
            norm = cast("nn.BatchNorm2d", module)
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
    with torch.no_grad():
        for batch in batches:
            adapted(*batch)
    return adapted.eval()


def mixed(own: Mapping[str, Metric], synthetic: Mapping[str, Metric]) -> dict[str, Metric]:
    """Statistics of the user's images, half and half with synthetic ones: few images of one kind are not all there is.

    Sensitivities are brought to the same total error first.
    """
    own_total, synthetic_total = _total(own), _total(synthetic)
    scale = own_total / synthetic_total if synthetic_total else 1.0

    def half(name: str) -> Metric:
        a = own[name]
        b = synthetic.get(name, a)
        sensitivity = a.sensitivity_out
        if sensitivity is not None and b.sensitivity_out is not None:
            sensitivity = (sensitivity + scale * b.sensitivity_out) / 2
        return Metric(
            covariance_in=(a.covariance_in + b.covariance_in) / 2,
            covariance_out=(a.covariance_out + b.covariance_out) / 2,
            sensitivity_out=sensitivity,
        )

    return {name: half(name) for name in own}


def _total(measured: Mapping[str, Metric]) -> float:
    """What the network would lose if every site lost its whole variance."""
    sensitive = [metric for metric in measured.values() if metric.sensitivity_out is not None]
    return sum(float((cast("Tensor", metric.sensitivity_out) * metric.covariance_out).sum()) for metric in sensitive)


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats  # noqa: SLF001


class _Moments:
    """Running sum and second moment of channel vectors, one per group."""

    def __init__(self, channels: int, groups: int, like: Tensor, *, centred: bool) -> None:
        self.centred = centred
        self.count = 0
        self.shift: Tensor | None = None
        self.total = like.new_zeros(groups, channels // groups)
        self.products = like.new_zeros(groups, channels // groups, channels // groups)

    def add(self, maps: Tensor, positions: Tensor, weight: float = 1.0) -> None:
        """Add the vectors at some positions of maps (N, C, P)."""
        sampled = maps[..., positions]  # (N, C, p)
        vectors = sampled.view(len(sampled), *self.total.shape, -1).permute(1, 0, 3, 2).flatten(1, 2)  # (g, n, c)
        if self.centred:
            if self.shift is None:
                self.shift = vectors.mean(1, keepdim=True)  # near enough to the mean for sums that do not cancel
            vectors = vectors - self.shift
        self.count += vectors.shape[1]
        self.total += vectors.sum(1)
        self.products.baddbmm_(vectors.mT, vectors, alpha=weight)

    def covariance(self) -> Tensor:
        """(groups, C, C), centred."""
        mean = self.total / self.count
        return self.products / self.count - mean[:, :, None] * mean[:, None, :]


class _Sums:
    """Running sums of one site."""

    def __init__(self, site: ConvSite, like: Tensor) -> None:
        self.channel_axis = 1 if site.kernel_size else -1
        self.inputs = _Moments(site.in_channels, site.groups, like, centred=True)
        self.outputs = _Moments(site.out_channels, site.groups, like, centred=True)
        self.gradients = _Moments(site.out_channels, site.groups, like, centred=False)

    def add(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """Add one call; the gradient of its output is added when the backward pass reaches it."""
        inputs, outputs = (one.detach().movedim(self.channel_axis, 1).flatten(2) for one in (x, y))
        positions = _sample(outputs.shape[2], generator)
        self.inputs.add(inputs, _sample(inputs.shape[2], generator))
        self.outputs.add(outputs, positions)
        if y.requires_grad:
            # The sampled positions stand for all of them.
            weight = outputs.shape[2] / len(positions)

            def add_gradient(gradient: Tensor) -> None:
                self.gradients.add(gradient.movedim(self.channel_axis, 1).flatten(2), positions, weight)

            y.register_hook(add_gradient)  # type: ignore[no-untyped-call]

    def metric(self, images: int) -> Metric:
        """What the sums amount to over so many images."""
        return Metric(
            covariance_in=self.inputs.covariance(),
            covariance_out=self.outputs.covariance(),
            sensitivity_out=self.gradients.products / images if self.gradients.count else None,
        )


def _sample(positions: int, generator: torch.Generator) -> Tensor:
    if positions <= _POSITIONS:
        return torch.arange(positions)
    return torch.randperm(positions, generator=generator)[:_POSITIONS]


@contextmanager
def _listening(model: nn.Module, sums: Mapping[str, _Sums], generator: torch.Generator) -> Iterator[None]:
    handles = []
    for name, site_sums in sums.items():

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, sums: _Sums = site_sums) -> None:
            sums.add(inputs[0], output, generator)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _backward_random_combination(outputs: object, generator: torch.Generator) -> None:
    """Send the gradient of one random combination of each image's outputs back; logits are centred over the classes.

    Every output counts alike, not only those that the labels of these images need: users have other images.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    directions = []
    for tensor in tensors:
        direction = torch.randn(tensor.shape, generator=generator).to(tensor)
        directions.append(direction - direction.mean(-1, keepdim=True) if tensor.ndim == 2 else direction)  # noqa: PLR2004 - (N, classes)
    if tensors:
        torch.autograd.backward(tensors, directions)
