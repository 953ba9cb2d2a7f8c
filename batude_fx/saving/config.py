"""`config.json` of a saved network: its schema, and how a file from an unknown source is read safely.

The file holds the name of an architecture and ranks, and nothing that could be executed or that points to other files:
names are looked up in the registries of timm and torchvision, and only arguments of a short list are accepted.
"""

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch import nn
from typing_extensions import TypedDict

from batude_fx.errors import BatudeError, SavedModelError
from batude_fx.graph.surgery import build_skeleton
from batude_fx.report import record
from batude_fx.saving.architecture import ENTRYPOINT, Architecture, ArgumentValue, Library
from batude_fx.support.atomic_files import newest
from batude_fx.support.validation import first_mistake, read_limited
from batude_fx.tucker.ranks import Ranks

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINED_NETWORK = "model"
"""Name of the folder inside a training run's folder that holds its trained network."""
FORMAT = 1
_MOST_VALUES = 2**27  # of an image or a video: those of 45 megapixels in three colours, or half a gigabyte of float32
_LONGEST_SIDE = 8192
_CLOSED = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _check_size(size: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse the size of an image that would fill the memory."""
    if math.prod(size) > _MOST_VALUES or max(size) > _LONGEST_SIDE:
        raise ValueError(
            f"an image of {' x '.join(map(str, size))} values is too large; at most {_MOST_VALUES:,} in all and "
            f"{_LONGEST_SIDE} to a side are allowed"
        )
    return size


# C, H, W, or C, T, H, W.
_ImageSize = Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=4), AfterValidator(_check_size)]
_CropShare = Annotated[float, Field(ge=0.1, le=2)]  # a smaller one would enlarge images before they are cropped
_Channels = Field(max_length=1024)
_Mean = Annotated[float, Field(ge=-1e6, le=1e6)]  # of pixels from 0 to 1, or from 0 to 255
_Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
_Names = str | tuple[str, ...] | None
_Name = Annotated[str, Field(max_length=32)] | None
_Side = Annotated[int, Field(ge=1, le=2048)]
_Rate = Annotated[float, Field(ge=0, le=1)]


class ImageConfig(TypedDict, total=False):
    """The keys of timm's pretrained_cfg, without those that tell timm where to fetch weights.

    Source: `PretrainedCfg` in timm/models/_pretrained.py.
    """

    __pydantic_config__ = _CLOSED  # type: ignore[misc]

    architecture: str
    tag: str
    input_size: _ImageSize
    test_input_size: _ImageSize | None
    min_input_size: _ImageSize | None
    fixed_input_size: bool
    interpolation: Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]
    crop_pct: _CropShare
    test_crop_pct: _CropShare | None
    crop_mode: Literal["center", "squash", "border"]
    mean: Annotated[tuple[_Mean, ...], _Channels]
    std: Annotated[tuple[_Deviation, ...], _Channels]
    num_classes: NonNegativeInt
    label_offset: int | None
    label_names: tuple[str, ...] | None
    label_descriptions: dict[str, str] | tuple[str, ...] | None
    pool_size: tuple[PositiveInt, PositiveInt] | None
    test_pool_size: tuple[PositiveInt, PositiveInt] | None
    first_conv: _Names
    classifier: _Names
    license: str | None
    description: str | None
    origin_url: str | None
    paper_name: str | None
    paper_ids: _Names
    notes: _Names


METADATA_KEYS = tuple(ImageConfig.__annotations__)


class FactoryArgs(TypedDict, total=False):
    """The arguments of model factories that a saved folder may hold.

    A folder may be malicious, and other arguments name files to read, or classes. Large numbers would fill the memory
    before the weights show that they are wrong.
    """

    __pydantic_config__ = _CLOSED  # type: ignore[misc]

    num_classes: Annotated[int, Field(ge=0, le=100_000)]
    in_chans: Annotated[int, Field(ge=1, le=1024)]
    global_pool: bool | Annotated[str, Field(max_length=32)] | None
    img_size: _Side | tuple[_Side, _Side] | None
    output_stride: Annotated[int, Field(ge=1, le=64)]
    drop_rate: _Rate
    drop_path_rate: _Rate | None
    act_layer: _Name
    norm_layer: _Name
    aux_logits: bool | None
    aux_loss: bool | None
    transform_input: bool


class SavedArchitecture(BaseModel):
    """The architecture of a compressed network: that of the dense network, and the ranks of the Tucker modules.

    Attributes:
        library: The library that registers the dense architecture; None where only the caller can build it.
        base: The name of the dense architecture in that library, or None.
        args: Arguments of the library's model factory.
        ranks: Site name to rank_out and rank_in, per group.
        biased: Sites whose Tucker module has a bias, which the dense layer need not have.
    """

    model_config = _CLOSED

    library: Library | None
    base: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=200)] | None
    args: FactoryArgs = FactoryArgs()
    ranks: dict[str, tuple[PositiveInt, PositiveInt]]
    biased: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> "SavedArchitecture":
        if (self.library is None) != (self.base is None):
            raise ValueError("library and base are given together, or both null")
        if unknown_sites := set(self.biased) - set(self.ranks):
            raise ValueError(f"biased names {min(unknown_sites)!r}, which has no ranks")
        return self

    @property
    def dense_architecture(self) -> Architecture | None:
        """The architecture of the dense network; None where only the caller can build it."""
        if self.library is None or self.base is None:
            return None
        return Architecture(self.library, self.base, cast("Mapping[str, ArgumentValue]", self.args))

    def build(self, *, weightless: bool = False, **overrides: Any) -> nn.Module:  # noqa: ANN401 - what timm was given
        """Build the compressed network with uninitialised Tucker modules and fresh weights elsewhere.

        Args:
            weightless: Put parameters and buffers on the meta device, where the constructor can.
            **overrides: Arguments of the dense architecture that take precedence over `args`.

        Raises:
            SavedModelError: When the architecture is not registered here, or does not have these sites.
        """
        dense = self.dense_architecture
        if dense is None:
            raise SavedModelError(
                "this folder holds a model that no library rebuilds by name; use batude_fx.load(folder, model=fresh) "
                "with a fresh dense model of its class."
            )
        return self.replace_sites(dense.build(weightless=weightless, **overrides))

    def replace_sites(self, model: nn.Module) -> nn.Module:
        """Return a copy of a dense model in which every site is an uninitialised Tucker module.

        Raises:
            SavedModelError: When the model does not have these sites.
        """
        try:
            return build_skeleton(model, {name: Ranks(*pair) for name, pair in self.ranks.items()}, self.biased)
        except BatudeError as error:
            reason = textwrap.shorten(str(error), 500)  # the message may hold a whole module tree
            raise SavedModelError(f"{type(model).__name__} is not the model that was saved: {reason}") from error


class SavedConfig(BaseModel):
    """The content of `config.json`; timm reads the first four fields.

    Attributes:
        architecture: The name under which this package is registered with timm.
        model_args: Arguments of that entrypoint.
        num_classes: Classes of the classifier; None where there is none.
        pretrained_cfg: timm's description of the input and the classifier: input size, mean, class names and others.
        channels_last: Whether the weights are channels-last in memory, on which the last bits of the outputs depend.
        params: Number of parameters of the network.
        format: Version of this layout.
        versions: Versions of the libraries that wrote the folder, for information.
    """

    model_config = _CLOSED

    architecture: Literal["batude_fx"]
    model_args: SavedArchitecture
    num_classes: int | None = None
    pretrained_cfg: ImageConfig = ImageConfig()
    channels_last: bool = False
    params: int
    format: Literal[1]
    versions: dict[str, str]


def read_config(folder: Path) -> SavedConfig:
    """Read and check `config.json`.

    Raises:
        SavedModelError: When it is missing, is not JSON, or is not a config of this format.
    """
    path = newest(folder) / CONFIG
    if not path.is_file():
        network = folder / TRAINED_NETWORK
        way_out = f"It is a training run; give {network}" if (network / CONFIG).is_file() else "Give what save wrote"
        raise SavedModelError(f"{folder} is no saved model: it has no {CONFIG}. {way_out}.")
    try:
        content = json.loads(read_limited(path), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(f"{path} cannot be read as JSON: {error}. Save the model again.") from error
    return _validate(content, path)


def _validate(content: object, path: Path) -> SavedConfig:
    if not isinstance(content, dict) or content.get("architecture") != ENTRYPOINT:
        other = content.get("architecture") if isinstance(content, dict) else type(content).__name__
        raise SavedModelError(
            f"{path} is not a config of batude_fx: its architecture is {other!r}, not 'batude_fx'. "
            f'If timm wrote the folder, "local-dir:{path.parent}" is its name.'
        )
    if content.get("format") != FORMAT:
        raise SavedModelError(
            f"{path} has format {content.get('format')!r}, this batude_fx reads {FORMAT}; use the version that wrote "
            "it, or save the model again."
        )
    try:
        return SavedConfig.model_validate(content)
    except ValidationError as error:
        raise SavedModelError(
            f"{path} is not a config of batude_fx: {first_mistake(error)} Save the model again."
        ) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def network_folder(folder: Path) -> Path:
    """Return the folder of the network: a subfolder if the folder is that of a training run, else the folder itself."""
    network = folder / TRAINED_NETWORK
    return network if (newest(network) / record.FILE).is_file() else folder


def checked_image_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pretrained_cfg that timm has read, with tuples where JSON has lists.

    Raises:
        SavedModelError: When one of the `METADATA_KEYS` has a value that no config has.
    """
    described = {key: config[key] for key in METADATA_KEYS if key in config}
    try:
        return {**config, **TypeAdapter(ImageConfig).validate_python(described)}
    except ValidationError as error:
        raise SavedModelError(f"not a config of batude_fx: pretrained_cfg.{first_mistake(error)}") from error
