"""`config.json` of a saved network: its schema, and how a file from an unknown source is read safely.

The file holds the name of an architecture and ranks, and nothing that could be executed or that points to other files:
names are looked up in the registries of timm and torchvision, and only arguments of a short list are accepted.
"""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from torch import nn

from batude_fx.errors import BatudeError, SavedModelError
from batude_fx.graph.surgery import build_skeleton
from batude_fx.report import record
from batude_fx.saving.architecture import ENTRYPOINT, Architecture, ArgumentName, ArgumentValue, Library
from batude_fx.support.validation import first_mistake
from batude_fx.tucker.ranks import Ranks

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINED_NETWORK = "model"
"""Name of the folder inside a training run's folder that holds its trained network."""
FORMAT = 1
_MAX_BYTES = 2**24
# Keys of timm's pretrained_cfg, without those that tell timm where to fetch weights.
_MetadataKey = Literal[
    "architecture", "tag", "input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation",
    "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_offset", "label_names",
    "label_descriptions", "pool_size", "test_pool_size", "first_conv", "classifier", "license", "description",
    "origin_url", "paper_name", "paper_ids", "notes",
]  # fmt: skip
METADATA_KEYS: tuple[_MetadataKey, ...] = get_args(_MetadataKey)


class SavedArchitecture(BaseModel):
    """The architecture of a compressed network: that of the dense network, and the ranks of the Tucker modules.

    Attributes:
        library: The library that registers the dense architecture; None where only the caller can build it.
        base: The name of the dense architecture in that library, or None.
        args: Arguments of the library's model factory.
        ranks: Site name to rank_out and rank_in, per group.
        biased: Sites whose Tucker module has a bias, which the dense layer need not have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    library: Library | None
    base: str | None = Field(pattern=r"^[A-Za-z0-9_]+$")
    args: dict[ArgumentName, ArgumentValue] = {}
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
        return Architecture(self.library, self.base, {str(name): value for name, value in self.args.items()})

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

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    architecture: Literal["batude_fx"]
    model_args: SavedArchitecture
    num_classes: int | None = None
    pretrained_cfg: dict[_MetadataKey, Any] = {}
    channels_last: bool = False
    params: int
    format: Literal[1]
    versions: dict[str, str]

    @property
    def metadata(self) -> dict[str, Any]:
        """The `pretrained_cfg` with tuples, as timm has them, where JSON has lists."""
        return with_tuples(self.pretrained_cfg)


def read_config(folder: Path) -> SavedConfig:
    """Read and check `config.json`.

    Raises:
        SavedModelError: When it is missing, is not JSON, or is not a config of this format.
    """
    path = folder / CONFIG
    if not path.is_file():
        network = folder / TRAINED_NETWORK
        way_out = f"It is a training run; give {network}" if (network / CONFIG).is_file() else "Give what save wrote"
        raise SavedModelError(f"{folder} is no saved model: it has no {CONFIG}. {way_out}.")
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise SavedModelError(f"{path} has {size} bytes, more than {_MAX_BYTES}; it is no config.")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
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
    return network if (network / record.FILE).is_file() else folder


def with_tuples(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a config with tuples, as timm has them, where JSON has lists."""
    return {str(key): tuple(value) if isinstance(value, list) else value for key, value in config.items()}
