"""Recipes of training runs: frozen pydantic models of the network, the images, the budget and the phases.

A recipe holds names and numbers only; models, datasets, optimizers and schedules are looked up in the registries of
timm and torchvision. Each mistake in a recipe is reported in one line with file, line and key, before any training.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from batude_fx.budget.budget import Budget
from batude_fx.errors import RecipeError
from batude_fx.training.duration import Duration, Interval, IntervalOrShare, Length, LengthOrShare
from batude_fx.training.recipe_file import RecipeFile

# Arguments of factories that would load weights from elsewhere.
_WEIGHT_ARGUMENTS = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "weights", "weights_backbone"}
_LARGEST_ARGUMENT, _LONGEST_SIDE = 100_000, 1536  # larger ones would fill the memory
_MOST_ROUNDS = 10_000
# Optimizers that need second derivatives or CUDA extensions, or whose state is more than tensors and numbers.
_UNSUPPORTED_OPTIMIZERS = ("adafactorbv", "adahessian", "bnb", "cadafactorbv", "fused", "kron")
_DATASET_KINDS = ("torch", "hfds", "hfids", "tfds", "wds")
# Datasets of torchvision that have a training half and a test half, and timm's words for these halves.
_HALVED_DATASETS = {"cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"}
_HALVES = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")
_PACKAGED = Path(__file__).parents[1] / "recipes"
SHIPPED = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "recipes"
"""Folder of the shipped recipes: inside the package when installed from a wheel, beside it in a clone."""


def _parse_budget(value: Any) -> Any:  # noqa: ANN401 - a Budget, its fields, or anything that Budget.parse takes
    return value if isinstance(value, dict) else Budget.parse(value)


def _registered(kind: str, names: Callable[[], Iterable[str]]) -> AfterValidator:
    """Return a validator that refuses names which a registry does not have, and suggests close ones."""

    def check(name: str) -> str:
        registered_names = list(names())
        if name not in registered_names:
            close_names = difflib.get_close_matches(name.lower(), registered_names, n=3)
            suggestions = ", ".join(close_names or registered_names[:3])
            raise ValueError(f"{name!r} is not the name of any {kind}. Close names: {suggestions}")
        return name

    return AfterValidator(check)


def _optimizers() -> Iterable[str]:
    from timm.optim._optim_factory import list_optimizers

    return (name for name in map(str, list_optimizers()) if not name.startswith(_UNSUPPORTED_OPTIMIZERS))


def _schedulers() -> Iterable[str]:
    # Their learning rate is a function of the step alone, so that checkpoints need no state of the scheduler.
    return ("cosine", "tanh", "poly", "constant")


class _Section(BaseModel):
    """The base of all sections; the docstrings of their fields are the descriptions in the JSON Schema."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelSection(_Section):
    """The network."""

    name: str
    """A name of timm ("resnet18.tv_in1k") or torchvision ("torchvision:resnet18")."""
    args: dict[str, bool | int | float | str | None] = {}
    """Arguments of the function that builds the network, such as num_classes."""
    pretrained: bool = False
    """Start from the pretrained weights of the library, which are downloaded if necessary."""
    checkpoint: Path | None = None
    """Start from this safetensors file of the dense network instead; relative to the working directory."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward passes under autocast; weights stay in float32."""
    channels_last: bool = False
    """Keep images and weights in torch's channels_last memory format, which makes most convolutions faster."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained and checkpoint are two sources of the same weights; give one")
        if self.checkpoint and not self.checkpoint.is_file():
            raise ValueError(f"checkpoint {str(self.checkpoint)!r} does not exist")
        if weights := sorted(self.args.keys() & _WEIGHT_ARGUMENTS):
            raise ValueError(f"args name weights by {weights[0]!r}; use model.pretrained or model.checkpoint")
        for name, value in self.args.items():
            most = _LONGEST_SIDE if name == "img_size" else _LARGEST_ARGUMENT
            if isinstance(value, int | float) and abs(value) > most:
                raise ValueError(f"args give {name} as {str(value)[:30]}; expected at most {most}")
            if isinstance(value, int | float) and name in {"in_chans", "img_size"} and value < 1:
                raise ValueError(f"args give {name} as {value:g}; expected at least 1, as an image holds something")
        return self


class DataSection(_Section):
    """The images and their augmentation, in the terms of timm's `create_dataset` and `create_loader`."""

    name: str = ""
    """Empty for a folder with a subfolder per class; otherwise timm's name of a dataset, such as "torch/cifar10" for
    torchvision's, or one that begins with "hfds/", "hfids/", "tfds/" or "wds/"."""
    root: Path | None = None
    """Folder of the images, or the folder in which the dataset is stored."""
    labels: bool = True
    """Whether the images have labels. Without them the original network is the only teacher, what is measured is how
    far the compressed one is from it, and of all evaluations in `finalize` the closest network is kept."""
    train_split: str = "train"
    """Name of the training split; in a folder, the name of its subfolder."""
    val_split: str = "validation"
    """Name of the split on which accuracy is measured."""
    download: bool = False
    """Download the dataset if it is missing."""
    image_size: Annotated[int, Field(ge=1, le=_LONGEST_SIDE)] | None = None
    """Side of the square images in pixels, also for counting flops; by default that of the published network."""
    batch_size: PositiveInt = 128
    """Images per optimizer step, of all processes together."""
    accumulate: PositiveInt = 1
    """Number of parts in which a batch is computed one after the other, to save memory."""
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Number of processes that load images."""
    pad: PositiveInt | None = None
    """Width in pixels of a black border, out of which images are cropped at random, unscaled; for images that already
    have the size that the network takes. Replaces `scale` and `ratio`."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Area of a random crop, as a share of the image; it is resized to `image_size`."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Aspect ratio of a random crop."""
    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of timm's color jitter; an `auto_augment` policy replaces it."""
    auto_augment: str | None = None
    """Augmentation policy as timm writes it, such as "rand-m9-mstd0.5"."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of cutmix; 0 turns it off."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing."""

    @field_validator("scale", "ratio")
    @classmethod
    def _check_range(cls, ends: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        most = 1.0 if info.field_name == "scale" else inf
        if not ends[0] <= ends[1] <= most:
            raise ValueError(f"{list(ends)} is not a range; write the smaller end first" + ", up to 1" * (most == 1))
        return ends

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        # timm silently takes any other name for a folder. torchvision's folders number the classes of each split anew.
        kind, _, rest = name.partition("/")
        if name and (kind not in _DATASET_KINDS or not rest or rest in {"folder", "image_folder"}):
            raise ValueError(
                f"{name!r} is not a dataset; leave it empty for a folder, or begin with {'/, '.join(_DATASET_KINDS)}/"
            )
        return name

    @field_validator("train_split", "val_split")
    @classmethod
    def _check_split(cls, split: str, info: ValidationInfo) -> str:
        # timm ignores a part in brackets for folders and torchvision's datasets, and reads the test half of a dataset
        # for any word that it does not know.
        if "name" not in info.data:  # the name has a mistake of its own, which is reported
            return split
        kind, _, dataset = info.data["name"].partition("/")
        if kind in {"", "torch"} and "[" in split:
            raise ValueError(f"{split!r} is no split of a folder or of torchvision; only tfds/ and hfds/ have parts")
        if kind == "torch" and dataset.lower() in _HALVED_DATASETS and split not in _HALVES:
            raise ValueError(f"{split!r} is no split of {dataset}; use one of {', '.join(_HALVES)}")
        return split


class Distillation(_Section):
    """Training on the outputs of the original network as well as on labels; Hinton et al., arXiv:1503.02531."""

    weight: float = Field(default=0.5, gt=0, le=1)
    """Weight of the distillation loss; the cross-entropy with the labels has one minus this weight."""
    temperature: PositiveFloat = 2.0
    """Divisor of the logits of both networks before the softmax."""
    stages: NonNegativeFloat = 0.0
    """Weight, within the distillation loss, of the differences between the outputs of the stages: of each stage the
    mean squared difference over the variance."""


class Training(_Section):
    """The settings that all phases of training have."""

    epochs: Length
    """Length of the phase: 3, "3 epochs" or "500 steps"; 0 skips the training."""
    optimizer: Annotated[str, _registered("optimizer of timm", _optimizers)] = "sgd"
    """Name of an optimizer in timm's registry."""
    lr: PositiveFloat = 0.05
    """Learning rate from which the schedule starts, and to which a warm-up rises from 0."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum, for optimizers that have one."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; not applied to biases and normalization layers."""
    scheduler: Annotated[str, _registered("scheduler", _schedulers)] = "cosine"
    """Shape of the learning rate over the phase: "cosine", "tanh", "poly" or "constant"."""
    warmup: LengthOrShare = Duration(0, "%")
    """Length of a linear warm-up, after which the schedule continues as if there had been none."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the phase, unless the scheduler is "constant"."""
    clip_grad: PositiveFloat | None = None
    """Largest norm of the gradient; a larger one is scaled down to it."""

    @model_validator(mode="after")
    def _check_rate_and_warmup(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; the learning rate must not rise")
        phase = Duration(100, "%") if self.warmup.unit == "%" else self.epochs
        if self.epochs.amount and self.warmup.unit == phase.unit and self.warmup.amount > phase.amount:
            raise ValueError(f"a warmup of {self.warmup} is longer than its phase, {phase}; give a shorter one")
        return self


class Pretrain(Training):
    """Training of the dense network, when it starts without trained weights."""

    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which replaces the weights at the end of the phase. At
    first the decay is smaller: at most 0.954 after 100 steps and 0.99 after 1000."""


@dataclass(frozen=True)
class Round:
    """One round of BC-ADL.

    Attributes:
        first_step: Optimizer step at which it begins, counted from the start of the phase.
        reduction: Share of the way from the costs of the dense network to the budget, in (0, 1].
        rho: Weight of the penalty.
    """

    first_step: int
    reduction: float
    rho: float


class OneShot(Training):
    """BC-ADL: training of the dense network that pulls its weights towards ranks within the budget."""

    layers: Literal["conv", "conv+linear"] = "conv"
    """Types of layers that get ranks."""
    include: tuple[str, ...] = ()
    """Glob patterns of site names; only these sites get ranks."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of site names that stay dense."""
    round_to: PositiveInt = 8
    """Ranks are multiples of this number."""
    interval: IntervalOrShare = Duration(1, "epochs")
    """Length of a round, from one choice of ranks to the next."""
    rho: tuple[PositiveFloat, PositiveFloat] = (0.05, 0.9)
    """Weight of the penalty in the first and in the last round; it grows geometrically between them."""
    anneal: float = Field(default=0.6, ge=0, le=1)
    """Share of the rounds in which the budget shrinks from the costs of the dense network to its target."""
    calibration_images: NonNegativeInt = 256
    """Number of training images on which each round measures how errors of each channel change the output; with 0,
    ranks depend on the weights alone."""
    distillation: Distillation | None = None
    """Distillation from the original network; without it, labels alone are used."""

    @model_validator(mode="after")
    def _check_rho(self) -> Self:
        if self.rho[0] > self.rho[1]:
            raise ValueError(f"rho falls from {self.rho[0]:g} to {self.rho[1]:g}; it must not, or W and z drift apart")
        return self

    def rounds(self, steps_per_epoch: int) -> list[Round]:
        """Return the rounds of the phase, at least one.

        Of n rounds, round i asks for (i + 1) / (anneal n) of the reduction, at most all of it. Its rho is
        low (high / low)^(i / (n - 1)), which grows by the same factor from each round to the next.

        Raises:
            RecipeError: When there are more than 10,000.
        """
        steps = self.epochs.steps(steps_per_epoch)
        interval = max(1, self.interval.steps(steps_per_epoch, steps))
        count = max(1, ceil(steps / interval))
        if count > _MOST_ROUNDS:
            raise RecipeError(
                f"one_shot.interval: {self.interval} in {self.epochs} make {count} rounds; expected at most "
                f"{_MOST_ROUNDS}, so a longer interval."
            )
        annealed = max(1.0, self.anneal * count)
        low, high = self.rho
        return [
            Round(index * interval, min(1.0, (index + 1) / annealed), low * (high / low) ** (index / max(1, count - 1)))
            for index in range(count)
        ]


class Finalize(Training):
    """Decomposition of the trained weights into Tucker modules, then training of these modules."""

    hooi_sweeps: NonNegativeInt = 10
    """Sweeps of the higher-order orthogonal iteration (HOOI) that follows the HOSVD."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which replaces the weights at the end of the phase. At
    first the decay is smaller: at most 0.954 after 100 steps and 0.99 after 1000."""
    batch_norm_images: NonNegativeInt = 0
    """Number of training images on which the batch-norm statistics are estimated anew, after `pretrain` and at the end
    of the run; 0 keeps the running statistics. Short training needs it where their momentum is small, as in
    torchvision's MobileNets."""
    distillation: Distillation | None = None
    """Distillation from the original network; without it, labels alone are used."""
    weights_lr: NonNegativeFloat | None = None
    """Learning rate of all parameters but gains and biases, which have one value per channel and are what few images
    can teach; by default it is `lr`, and 0 leaves these parameters as they are."""
    fixed_statistics: bool = False
    """Whether batch-norms keep the statistics that they have, and nothing is dropped out, as in evaluations."""


class Eval(_Section):
    """How often accuracy is measured and a checkpoint is written."""

    interval: Interval = Duration(1, "epochs")
    """Length of training between two evaluations."""
    checkpoint: Interval = Duration(1, "epochs")
    """Length of training between two checkpoints, from which an interrupted run is resumed."""
    batch_size: PositiveInt = 256
    """Images per batch in evaluations."""


class Recipe(_Section):
    """One training run, from the dense network to the saved compressed network."""

    model: ModelSection
    """The network to compress."""
    data: DataSection
    """The images to train and evaluate on."""
    budget: Annotated[Budget, BeforeValidator(_parse_budget, json_schema_input_type=Budget | float | str)]
    """Budget as for `compress`: 0.5 of the flops, "2.5x" fewer flops, or limits on flops and params."""
    pretrain: Pretrain | None = None
    """Training of the dense network before its compression."""
    one_shot: OneShot
    """Training that learns the ranks."""
    finalize: Finalize
    """Decomposition, and training of the decomposed network."""
    eval: Eval = Eval()
    """Evaluations and checkpoints."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all random numbers."""

    @field_validator("pretrain")
    @classmethod
    def _omit_empty_phase(cls, phase: Pretrain | None) -> Pretrain | None:
        return phase if phase and phase.epochs.amount else None

    @model_validator(mode="after")
    def _check_teacher(self) -> Self:
        if self.data.labels:
            return self
        if self.pretrain:
            raise ValueError("pretrain needs labels, and data.labels is false; leave it out")
        if self.data.mixup or self.data.cutmix:
            raise ValueError("data.mixup and data.cutmix mix labels, and data.labels is false; leave them out")
        if self.finalize.batch_norm_images:
            raise ValueError(
                "finalize.batch_norm_images would change the network after the closest one was chosen without labels; "
                "leave it out"
            )
        for name, phase in (("one_shot", self.one_shot), ("finalize", self.finalize)):
            if phase.epochs.amount and not (phase.distillation and phase.distillation.weight == 1):
                raise ValueError(f"without labels the original is the only teacher; set {name}.distillation.weight: 1")
        return self

    _document: "RecipeFile | None" = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Return whether all settings are equal, whichever files they come from."""
        return isinstance(other, Recipe) and all(value == getattr(other, name) for name, value in self)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_yaml(cls, source: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe.

        Args:
            source: A file, or the name of a shipped recipe.
            overrides: Settings that take precedence over it, such as "one_shot.epochs=2".

        Raises:
            RecipeError: When there is no such recipe, or it has mistakes; with file, line and key of each.
        """
        path = find(source)
        document = RecipeFile.read(path, cls)
        for override in overrides:
            document.override(override)
        try:
            recipe = cls.model_validate(document.values)
        except ValidationError as error:
            raise document.validation_error(error) from None
        recipe._document = document  # noqa: SLF001 - an instance of this class
        return recipe

    def problem(self, key: str, text: str) -> RecipeError:
        """Return the error of a setting whose mistake shows only when it is used, with the line of the setting.

        Args:
            key: The setting, such as "model.name".
            text: What is wrong, and what was expected.
        """
        if self._document is None:
            return RecipeError(f"recipe: {key}: {text}")
        return self._document.problem(tuple(key.split(".")), text)

    def to_yaml(self) -> str:
        """Return all settings as YAML, defaults included."""
        return yaml.safe_dump(_plain(self), sort_keys=False, width=120)


def shipped() -> dict[str, Path]:
    """Return the files of the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find(source: str | Path) -> Path:
    """Return the file of a recipe, which is given as a path or as the name of a shipped recipe.

    Raises:
        RecipeError: When there is no such file and no shipped recipe of that name.
    """
    path = shipped().get(str(source), Path(source))
    if not path.is_file():
        close_names = difflib.get_close_matches(str(source), shipped(), n=3, cutoff=0.3)
        if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
            raise RecipeError(
                f"{source}: there is no such recipe file. `batude-fx recipes list` names the shipped ones."
            )
        raise RecipeError(
            f"{source}: no such file, and no shipped recipe has this name. "
            f"Expected one of {', '.join(close_names or shipped())}, or a path."
        )
    return path


def _plain(value: object) -> Any:  # noqa: ANN401 - any value that YAML can hold
    if isinstance(value, BaseModel):
        return {name: _plain(item) for name, item in value}
    if isinstance(value, Duration | Path):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
