"""`config.json` of a saved network: what may stand in it, and how it is read without trusting it.

It names an architecture and ranks, and nothing that could be executed or that leads out of the folder: names are
looked up in the registries of timm and torchvision, arguments come from a short list, and no file but the two of the
folder is ever read.
"""

import json
import textwrap
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from torch import nn

from batude_fx.errors import BatudeError, SavedModelError
from batude_fx.graph.surgery import build_skeleton
from batude_fx.report import record
from batude_fx.saving.architecture import Architecture, Argument, Library, Value
from batude_fx.support.validation import first_problem
from batude_fx.tucker.ranks import Ranks

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINED = "model"
"""Where the folder of a training run has its network."""
FORMAT = 1
_LARGEST = 2**24  # bytes
# Not among them: where timm would fetch weights from.
_Metadata = Literal[
    "architecture", "tag", "input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation",
    "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_offset", "label_names",
    "label_descriptions", "pool_size", "test_pool_size", "first_conv", "classifier", "license", "description",
    "origin_url", "paper_name", "paper_ids", "notes",
]  # fmt: skip
METADATA: tuple[_Metadata, ...] = get_args(_Metadata)


class SavedArchitecture(BaseModel):
    """What rebuilds the network: a registered architecture, and its sites in Tucker form.

    Attributes:
        library: Where the dense architecture is registered; None where only the caller can build it.
        base: Its name there.
        args: Its arguments.
        ranks: Site name to rank_out and rank_in, per group.
        biased: Sites with a bias that the dense layer may lack.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    library: Library | None
    base: str | None = Field(pattern=r"^[A-Za-z0-9_]+$")
    args: dict[Argument, Value] = {}
    ranks: dict[str, tuple[PositiveInt, PositiveInt]]
    biased: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _named_or_not(self) -> "SavedArchitecture":
        if (self.library is None) != (self.base is None):
            raise ValueError("library and base are given together, or both null")
        if unknown := set(self.biased) - set(self.ranks):
            raise ValueError(f"biased names {min(unknown)!r}, which has no ranks")
        return self

    @property
    def origin(self) -> Architecture | None:
        """The dense architecture; None where only the caller can build it."""
        if self.library is None or self.base is None:
            return None
        return Architecture(self.library, self.base, {str(name): value for name, value in self.args.items()})

    def build(self, *, weightless: bool = False, **overrides: Any) -> nn.Module:  # noqa: ANN401 - what timm was given
        """The network with uninitialised Tucker modules and fresh weights elsewhere.

        Raises:
            SavedModelError: When the architecture is not registered here, or does not have these sites.
        """
        if self.origin is None:
            raise SavedModelError(
                "this folder holds a model that no library rebuilds by name; use batude_fx.load(folder, model=fresh) "
                "with a fresh dense model of its class."
            )
        return self.skeleton(self.origin.build(weightless=weightless, **overrides))

    def skeleton(self, model: nn.Module) -> nn.Module:
        """A copy of a dense model with the sites in Tucker form.

        Raises:
            SavedModelError: When the model does not have these sites.
        """
        try:
            return build_skeleton(model, {name: Ranks(*pair) for name, pair in self.ranks.items()}, self.biased)
        except BatudeError as error:
            reason = textwrap.shorten(str(error), 500)  # a module that is no layer prints its whole tree
            raise SavedModelError(f"{type(model).__name__} is not the model that was saved: {reason}") from error


class SavedConfig(BaseModel):
    """The content of `config.json`; the first four fields are the ones that timm reads.

    Attributes:
        architecture: The entrypoint that this package registers with timm.
        model_args: Its arguments.
        num_classes: Of the classifier, where there is one.
        pretrained_cfg: timm's: input size, mean, standard deviation, class names.
        channels_last: Whether the weights have that memory format, on which the last bits of the outputs depend.
        params: Parameters of the network.
        format: Version of this layout.
        versions: Of the libraries that wrote the folder; for information.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    architecture: Literal["batude_fx"]
    model_args: SavedArchitecture
    num_classes: int | None = None
    pretrained_cfg: dict[_Metadata, Any] = {}
    channels_last: bool = False
    params: int
    format: Literal[1]
    versions: dict[str, str]

    @property
    def metadata(self) -> dict[str, Any]:
        """`pretrained_cfg` with sequences as timm has them."""
        return {str(k): tuple(v) if isinstance(v, list) else v for k, v in self.pretrained_cfg.items()}


def read_config(folder: Path) -> SavedConfig:
    """Read and check `config.json`.

    Raises:
        SavedModelError: When it is missing, no JSON, or not of this format.
    """
    path = folder / CONFIG
    if not path.is_file():
        inside = folder / TRAINED
        way_out = f"It is a training run; give {inside}" if (inside / CONFIG).is_file() else "Give what save wrote"
        raise SavedModelError(f"{folder} is no saved model: it has no {CONFIG}. {way_out}.")
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise SavedModelError(f"{path} has {size} bytes, more than {_LARGEST}; it is no config.")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise SavedModelError(f"{path} cannot be read as JSON: {error}. Save the model again.") from error
    return _validated(content, path)


def _validated(content: object, path: Path) -> SavedConfig:
    if not isinstance(content, dict) or content.get("architecture") != "batude_fx":
        other = content.get("architecture") if isinstance(content, dict) else type(content).__name__
        raise SavedModelError(
            f"{path} is not a config of batude_fx: its architecture is {other!r}, not 'batude_fx'. "
            f'"local-dir:{path.parent}" is the name of a folder of timm itself.'
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
            f"{path} is not a config of batude_fx: {first_problem(error)} Save the model again."
        ) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def network_folder(folder: Path) -> Path:
    """Where the network of a folder lies: a training run's in a folder of its own."""
    return folder / TRAINED if (folder / TRAINED / record.FILE).is_file() else folder
