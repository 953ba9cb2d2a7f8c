"""Recipes: what to train, on what, under which budget and for how long, as YAML checked by frozen pydantic models.

A recipe holds names and numbers only: models, datasets, optimizers and schedules are looked up in the registries of
timm and torchvision; YAML tags and aliases are refused, so that reading one executes nothing. Everything that is wrong
with a recipe is said in one line with file, line and key, before anything is trained.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
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

_WEIGHTS = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "weights", "weights_backbone"}
_NOT_PLAIN = ("adafactorbv", "adahessian", "bnb", "cadafactorbv", "fused", "kron")
"""Optimizers that need second derivatives or CUDA extensions, or whose state is more than tensors and numbers."""
_DATASETS = ("torch", "hfds", "hfids", "tfds", "wds")
_HALVES = {"cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"}  # of torchvision: train and test
_WORDS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")  # for these
_PACKAGED = Path(__file__).parents[1] / "recipes"
SHIPPED = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "recipes"
"""Where the shipped recipes are: in the wheel inside the package, in a clone beside it."""


def _budget(value: Any) -> Any:  # noqa: ANN401 - a Budget, its fields, or what it can be read from
    return value if isinstance(value, dict) else Budget.parse(value)


def _known(kind: str, names: Callable[[], Iterable[str]]) -> AfterValidator:
    """A name that a registry must have."""

    def check(name: str) -> str:
        known = list(names())
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=3)
            raise ValueError(f"{name!r} is no {kind}. Close names: {', '.join(close or known[:3])}")
        return name

    return AfterValidator(check)


def _optimizers() -> Iterable[str]:
    from timm.optim._optim_factory import list_optimizers

    return (name for name in map(str, list_optimizers()) if not name.startswith(_NOT_PLAIN))


def _schedulers() -> Iterable[str]:
    return ("cosine", "tanh", "poly", "constant")  # functions of the step alone, so that nothing is kept


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelSection(_Section):
    """Which network."""

    name: str
    """A name of timm ("resnet18.tv_in1k") or torchvision ("torchvision:resnet18")."""
    args: dict[str, bool | int | float | str | None] = {}
    """Arguments of its factory, such as num_classes."""
    pretrained: bool = False
    """Start from the weights that the library fetches."""
    checkpoint: Path | None = None
    """Start from a safetensors file of the dense network instead; relative to the working directory."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the training steps; weights stay in float32."""
    channels_last: bool = False
    """Memory format of images and weights; faster for most convolutions, on CPUs too."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained and checkpoint are two sources of the same weights; give one")
        if self.checkpoint and not self.checkpoint.is_file():
            raise ValueError(f"checkpoint {str(self.checkpoint)!r} does not exist")
        if weights := sorted(self.args.keys() & _WEIGHTS):
            raise ValueError(f"args name weights by {weights[0]!r}; use model.pretrained or model.checkpoint")
        return self


class DataSection(_Section):
    """Which images, as timm's `create_dataset` and `create_loader` take them."""

    name: str = ""
    """Empty for a folder with a subfolder per class, or a dataset as timm names it: "torch/cifar10" is torchvision's,
    "hfds/...", "hfids/...", "tfds/..." and "wds/..." are others'."""
    root: Path | None = None
    """Where they are, or are kept."""
    train_split: str = "train"
    """Name of the training split; of a folder, its subfolder."""
    val_split: str = "validation"
    """Name of the split that accuracy is measured on."""
    download: bool = False
    """Fetch the dataset where it is missing."""
    image_size: PositiveInt | None = None
    """Side of the images in pixels, on which flops are counted too; by default what the network was published for."""
    batch_size: PositiveInt = 128
    """Images per optimizer step, over all processes together."""
    accumulate: PositiveInt = 1
    """Parts that a batch is computed in, one after the other."""
    workers: NonNegativeInt = 2
    """Processes that load images."""
    pad: PositiveInt | None = None
    """Pixels of black around images that have the network's size already, which are then cropped at random as they
    are, without the next two."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Area of a random crop, as a share of the image; it is resized to `image_size`."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Aspect of a random crop."""
    hflip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a mirrored image."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of timm's colour jitter; a policy of `auto_augment` takes its place."""
    auto_augment: str | None = None
    """timm's policy, such as "rand-m9-mstd0.5"."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: NonNegativeFloat = 0.0
    """Alpha of cutmix; 0 is off."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing."""

    @field_validator("scale", "ratio")
    @classmethod
    def _grows(cls, ends: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        most = 1.0 if info.field_name == "scale" else inf
        if not ends[0] <= ends[1] <= most:
            raise ValueError(f"{list(ends)} is no range; write the smaller end first" + ", up to 1" * (most == 1))
        return ends

    @field_validator("name")
    @classmethod
    def _of_a_kind(cls, name: str) -> str:
        # timm takes any other name for a folder's, without a word; and torchvision's folders number classes anew.
        kind, _, rest = name.partition("/")
        if name and (kind not in _DATASETS or not rest or rest in {"folder", "image_folder"}):
            raise ValueError(
                f"{name!r} is no dataset; leave it empty for a folder, or begin with {'/, '.join(_DATASETS)}/"
            )
        return name

    @field_validator("train_split", "val_split")
    @classmethod
    def _exists(cls, split: str, info: ValidationInfo) -> str:
        # timm takes folders and torchvision's datasets whole, whatever part is asked for in brackets, and the test
        # half of those that have two for any word that it does not know.
        if "name" not in info.data:  # which has a mistake of its own
            return split
        kind, _, dataset = info.data["name"].partition("/")
        if kind in {"", "torch"} and "[" in split:
            raise ValueError(f"{split!r} is no split of a folder or of torchvision; parts are known to tfds/ and hfds/")
        if kind == "torch" and dataset.lower() in _HALVES and split not in _WORDS:
            raise ValueError(f"{split!r} is no split of {dataset}; use one of {', '.join(_WORDS)}")
        return split


class Distillation(_Section):
    """Learning from the original network beside the labels; G. Hinton et al., https://arxiv.org/abs/1503.02531."""

    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the loss; the labels have the rest."""
    temperature: PositiveFloat = 2.0
    """By which both networks' logits are divided."""


class Training(_Section):
    """How long and with what."""

    epochs: Length
    """Length of the phase: 3, "3 epochs" or "500 steps"; 0 leaves it out."""
    optimizer: Annotated[str, _known("optimizer of timm", _optimizers)] = "sgd"
    """Name in timm's registry."""
    lr: PositiveFloat = 0.05
    """Learning rate that the schedule starts from, and towards which a warm-up climbs from 0."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of the optimizers that have it."""
    weight_decay: NonNegativeFloat = 1e-4
    """Not applied to biases and normalization."""
    scheduler: Annotated[str, _known("scheduler", _schedulers)] = "cosine"
    """Shape of the learning rate over the phase, a timm scheduler that depends on the step alone."""
    warmup: LengthOrShare = Duration(0, "%")
    """Length of a linear warm-up, after which the schedule goes on where it would be without one."""
    min_lr: NonNegativeFloat = 0.0
    """Where the learning rate ends, unless the scheduler is "constant"."""
    clip_grad: PositiveFloat | None = None
    """Largest norm of the gradient."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; the learning rate must not rise")
        phase = Duration(100, "%") if self.warmup.unit == "%" else self.epochs
        if self.epochs.amount and self.warmup.unit == phase.unit and self.warmup.amount > phase.amount:
            raise ValueError(f"a warmup of {self.warmup} is longer than its phase, {phase}; give a shorter one")
        return self


class Pretrain(Training):
    """Training of the dense network, where there are no weights to start from."""

    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the weights, which is what the phase results in; it grows up to this as steps go
    by, 0.954 after a hundred and 0.99 after a thousand."""


class OneShot(Training):
    """BC-ADL: dense training that pulls the weights to ranks within the budget."""

    layers: Literal["conv", "conv+linear"] = "conv"
    """Which layers get ranks."""
    include: tuple[str, ...] = ()
    """Globs over site names; only these get ranks."""
    exclude: tuple[str, ...] = ()
    """Globs over site names that stay dense."""
    round_to: PositiveInt = 8
    """Multiple of the ranks."""
    interval: IntervalOrShare = Duration(1, "epochs")
    """Length of a round, between two projections."""
    rho: tuple[PositiveFloat, PositiveFloat] = (0.05, 0.9)
    """Weight of the penalty in the first and in the last round, growing geometrically between them."""
    anneal: float = Field(default=0.6, ge=0, le=1)
    """Share of the rounds over which the budget shrinks from the dense network to its target."""
    calibration_images: NonNegativeInt = 256
    """Training images that show, each round, which errors matter; 0 judges weights alone."""
    distillation: Distillation | None = None
    """Learn from the original network too."""

    @model_validator(mode="after")
    def _rho_grows(self) -> Self:
        if self.rho[0] > self.rho[1]:
            raise ValueError(f"rho falls from {self.rho[0]:g} to {self.rho[1]:g}; it must not, or W and z drift apart")
        return self

    def rounds(self, per_epoch: int) -> list[tuple[int, float, float]]:
        """Of every round: its first step, the share of the way from the dense network to the budget, and rho.

        Args:
            per_epoch: Steps of an epoch.
        """
        steps = self.epochs.steps(per_epoch)
        interval = max(1, self.interval.steps(per_epoch, steps))
        count = max(1, ceil(steps / interval))
        annealed = max(1.0, self.anneal * count)
        low, high = self.rho
        return [
            (index * interval, min(1.0, (index + 1) / annealed), low * (high / low) ** (index / max(1, count - 1)))
            for index in range(count)
        ]


class Finalize(Training):
    """From weights near low rank to Tucker modules: decomposition, then training in factored form."""

    hooi_sweeps: NonNegativeInt = 10
    """Sweeps of HOOI after the HOSVD."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the weights, which is what the phase results in; it grows up to this as steps go
    by, 0.954 after a hundred and 0.99 after a thousand."""
    batch_norm_images: NonNegativeInt = 0
    """Training images that the batch-norm statistics are estimated on again, of the dense network after `pretrain` and
    of the compressed one at the end; 0 leaves them. Short training needs it where their momentum is small, as in
    torchvision's MobileNets."""
    distillation: Distillation | None = None
    """Learn from the original network too."""


class Eval(_Section):
    """How often to look, and to write down."""

    interval: Interval = Duration(1, "epochs")
    """Between two evaluations."""
    checkpoint: Interval = Duration(1, "epochs")
    """Between two checkpoints, from which a killed run goes on."""
    batch_size: PositiveInt = 256
    """Images per batch of an evaluation."""


class Recipe(_Section):
    """One training run, from the dense network to the saved compressed one.

    Raises:
        RecipeError: When `from_yaml` cannot read one.
    """

    model: ModelSection
    """The network to compress."""
    data: DataSection
    """Which images."""
    budget: Annotated[Budget, BeforeValidator(_budget, json_schema_input_type=Budget | float | str)]
    """What remains of the flops, as for `compress`: 0.5, "2.5x", or flops and params."""
    pretrain: Pretrain | None = None
    """Train the dense network first."""
    one_shot: OneShot
    """Learn the ranks."""
    finalize: Finalize
    """Decompose and train on."""
    eval: Eval = Eval()
    """How often to look."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything that is random."""

    @field_validator("pretrain")
    @classmethod
    def _left_out(cls, phase: Pretrain | None) -> Pretrain | None:
        return phase if phase and phase.epochs.amount else None

    _document: "RecipeFile | None" = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Whether all settings are the same, wherever they were read."""
        return isinstance(other, Recipe) and all(value == getattr(other, name) for name, value in self)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_yaml(cls, source: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe.

        Args:
            source: A file, or the name of a shipped recipe.
            overrides: What takes precedence over it, as "one_shot.epochs=2".

        Raises:
            RecipeError: When there is none, or something is wrong with it; with file, line and key.
        """
        path = find(source)
        document = RecipeFile.read(path, cls)
        for override in overrides:
            document.override(override)
        try:
            recipe = cls.model_validate(document.value)
        except ValidationError as error:
            raise document.error(error) from None
        recipe._document = document  # noqa: SLF001 - its own
        return recipe

    def problem(self, key: str, text: str) -> RecipeError:
        """What turns out to be wrong with a setting when it is used, with the line that it stands on.

        Args:
            key: Such as "model.name".
            text: What is wrong, and what was expected.
        """
        if self._document is None:
            return RecipeError(f"recipe: {key}: {text}")
        return self._document.problem(tuple(key.split(".")), text)

    def to_yaml(self) -> str:
        """The resolved recipe, defaults included."""
        return yaml.safe_dump(_plain(self), sort_keys=False, width=120)


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find(source: str | Path) -> Path:
    """The file of a recipe.

    Raises:
        RecipeError: When there is no such file and no shipped recipe of that name.
    """
    path = shipped().get(str(source), Path(source))
    if not path.is_file():
        close = difflib.get_close_matches(str(source), shipped(), n=3, cutoff=0.3)
        raise RecipeError(
            f"{source}: no such file, and no shipped recipe has this name. "
            f"Expected one of {', '.join(close or shipped())}, or a path."
        )
    return path


def _plain(value: object) -> Any:  # noqa: ANN401 - whatever YAML can say
    if isinstance(value, BaseModel):
        return {name: _plain(item) for name, item in value}
    if isinstance(value, Duration | Path):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
