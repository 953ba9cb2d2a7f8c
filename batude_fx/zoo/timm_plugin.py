"""Saved networks as architectures of timm and torchvision: importing this file registers the entrypoint `batude_fx`.

After `import batude_fx`, `timm.create_model("local-dir:out", pretrained=True)` returns the network that `save` wrote to
`out`, and `"hf-hub:user/name"` the network of a folder that was pushed to a hub. For torchvision the call is
`torchvision.models.get_model("batude_fx", folder="out")`.

Of timm's options, `num_classes=` replaces the classifier, `in_chans=` adapts the stem unless it is a Tucker module, and
`features_only=True` returns the features of models with `forward_intermediates`, as most of timm's have.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from pydantic import ValidationError
from timm.models import PretrainedCfg, load_pretrained, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._hub import download_from_hf
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum
from torchvision.models._api import register_model as register_torchvision_model

from batude_fx.errors import SavedModelError, first_line
from batude_fx.graph import provenance
from batude_fx.report import record
from batude_fx.saving import saved_folder, weights
from batude_fx.saving.architecture import ENTRYPOINT
from batude_fx.saving.config import WEIGHTS, SavedArchitecture, checked_image_config, read_config
from batude_fx.support.atomic_files import newest
from batude_fx.support.validation import first_mistake
from batude_fx.tucker.modules import TuckerModule

_IMAGENET_CLASSES = 1000
_ARCHITECTURE = tuple(SavedArchitecture.model_fields)
_FEATURES = ("out_indices", "feature_cls")
_PLACEMENT = ("device", "dtype")
_OTHERS = ("pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "features_only", "cache_dir")
_NOT_OVERRIDES = {*_ARCHITECTURE, *_FEATURES, *_PLACEMENT, *_OTHERS}


def batude_fx(
    pretrained: bool = False,  # noqa: FBT001, FBT002 - timm's signature
    pretrained_cfg: PretrainedCfg | dict[str, Any] | None = None,
    **kwargs: Any,  # noqa: ANN401 - timm passes model_args and what its caller wrote
) -> nn.Module:
    """Build a saved network for timm, which passes the content of its `config.json` and the caller's arguments.

    Raises:
        SavedModelError: When it is called without a saved folder, or the folder is broken, foreign or unsafe.
    """
    arguments = EntrypointArguments.parse(pretrained_cfg, kwargs)
    model = _build(arguments, pretrained=pretrained)
    if pretrained:
        _load_(model, arguments)
    else:
        _initialize_(model)
    if arguments.features is not None:
        model = _extract_features(model, **arguments.features)
    return model.to(**arguments.placement) if arguments.placement else model


register_model(batude_fx)


@register_torchvision_model(ENTRYPOINT)  # type: ignore[untyped-decorator]
def _torchvision_entrypoint(*, folder: str | os.PathLike[str], weights: WeightsEnum | None = None) -> nn.Module:  # noqa: ARG001
    return saved_folder.load(folder)


@dataclass(frozen=True)
class EntrypointArguments:
    """The arguments of timm's call, sorted by the step that uses them.

    Attributes:
        config: timm's resolved pretrained_cfg, which names the folder or the hub.
        architecture: What is built, as the folder's config says.
        overrides: Arguments of the dense architecture that the caller chose, such as `num_classes`.
        features: Options of `features_only`; None where the caller wants the whole network.
        placement: The caller's `device` and `dtype`, where given.
        cache_dir: Where downloads from a hub are kept; None is the default of the hub.
    """

    config: dict[str, Any]
    architecture: SavedArchitecture
    overrides: dict[str, Any]
    features: dict[str, Any] | None
    placement: dict[str, Any]
    cache_dir: str | os.PathLike[str] | None

    @classmethod
    def parse(cls, pretrained_cfg: PretrainedCfg | dict[str, Any] | None, arguments: Mapping[str, Any]) -> Self:
        """Sort the arguments of timm's call.

        Raises:
            SavedModelError: When one is missing, not valid, or not allowed in a saved folder.
        """

        def pick(names: Iterable[str]) -> dict[str, Any]:
            return {name: arguments[name] for name in names if name in arguments}

        model_args = arguments.get("pretrained_model_args") or {}
        if foreign := [*(model_args.keys() - set(_ARCHITECTURE)), *pick(["checkpoint_path"])]:
            raise SavedModelError(f"model_args of the config hold {foreign[0]!r}, which batude_fx does not write.")
        overlay = arguments.get("pretrained_cfg_overlay")
        try:
            resolved = resolve_pretrained_cfg(ENTRYPOINT, cast("Any", pretrained_cfg), overlay).to_dict()  # type: ignore[no-untyped-call]
        except (TypeError, RecursionError) as error:  # a key that timm does not know, or lists in lists without end
            raise SavedModelError(f"not a config of batude_fx: {first_line(error)}") from error
        config = checked_image_config(resolved)
        return cls(
            config=config,
            architecture=_read_architecture(pick(_ARCHITECTURE), config),
            overrides=pick(name for name in arguments if name not in _NOT_OVERRIDES),
            features=pick(_FEATURES) if arguments.get("features_only") else None,
            placement=pick(_PLACEMENT),
            cache_dir=arguments.get("cache_dir"),
        )

    @property
    def local_folder(self) -> Path | None:
        """The saved folder, where timm's name was "local-dir:FOLDER"."""
        return newest(Path(self.config["file"])) if self.config.get("source") == "local-dir" else None


def _read_architecture(fields: dict[str, Any], config: dict[str, Any]) -> SavedArchitecture:
    if "ranks" not in fields:
        raise SavedModelError('batude_fx is the architecture of saved folders: timm.create_model("local-dir:FOLDER").')
    if config.get("source") == "local-dir":
        return read_config(Path(config["file"])).model_args  # checks more than timm does
    try:
        return SavedArchitecture.model_validate(fields)
    except ValidationError as error:
        raise SavedModelError(f"not a config of batude_fx: {first_mistake(error)}") from error


def _build(arguments: EntrypointArguments, *, pretrained: bool) -> nn.Module:
    if pretrained and arguments.local_folder and not arguments.overrides:
        shapes = weights.read_shapes(arguments.local_folder / WEIGHTS)
        # A false config cannot use up the memory: this model is on the meta device.
        weights.check_fits(arguments.architecture.build(weightless=True), shapes)
    model = arguments.architecture.build(**arguments.overrides)
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = arguments.config
    return model


def _load_(model: nn.Module, arguments: EntrypointArguments) -> None:
    """Load the saved weights, exactly or as far as the caller's arguments leave them in place."""
    state = _read_weights(arguments)
    if arguments.overrides:
        _adapt_weights_(model, state, arguments.config)
        return
    weights.load_weights_(model, state)
    if folder := arguments.local_folder:
        provenance.attach_(model, record.read_or_warn(folder))
        if read_config(folder).channels_last:
            weights.to_channels_last_(model)


def _read_weights(arguments: EntrypointArguments) -> dict[str, Tensor]:
    """Read the safetensors file; timm would take any file with weights that it finds, pickled ones included."""
    if folder := arguments.local_folder:
        return weights.read_weights(folder / WEIGHTS)
    config = arguments.config
    if config.get("source") == "hf-hub":
        file = download_from_hf(config["hf_hub_id"], WEIGHTS, cast("Any", arguments.cache_dir))
        return weights.read_weights(Path(file))
    raise SavedModelError("no weights are known for this config; use pretrained=False, or batude_fx.load(folder).")


def _adapt_weights_(model: nn.Module, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Load weights as timm does into a model with another classifier or stem."""
    in_memory = {**config, "state_dict": state, "source": None, "file": None, "hf_hub_id": None, "url": None}
    classes: Any = getattr(model, "num_classes", None)
    if classes is None:  # models of torchvision have no such attribute
        classifier = config.get("classifier")
        classes = model.get_submodule(classifier).out_features if classifier else _IMAGENET_CLASSES
    try:
        load_pretrained(model, in_memory, num_classes=int(classes), in_chans=getattr(model, "in_chans", 3))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise SavedModelError(f"the saved weights do not fit the arguments given to create_model: {reason}") from error


def _initialize_(model: nn.Module) -> None:
    """Initialize the factors and cores of all Tucker modules as torch initializes its layers."""
    for module in model.modules():
        if isinstance(module, TuckerModule):
            for part in module.children():
                if not isinstance(part, nn.Identity):
                    cast("nn.Conv2d | nn.Linear", part).reset_parameters()


def _extract_features(
    model: nn.Module, out_indices: tuple[int, ...] | list[int] | int | None = None, feature_cls: object = "getter"
) -> nn.Module:
    """Wrap a model as timm does for `features_only=True`, so that it returns intermediate feature maps."""
    if feature_cls != "getter" or not hasattr(model, "forward_intermediates"):
        raise SavedModelError(
            f"features_only needs a model with forward_intermediates and feature_cls='getter', not "
            f"{type(model).__name__} with {feature_cls!r}; "
            "torchvision.models.feature_extraction.create_feature_extractor(model, ...) serves all others."
        )
    if out_indices is None:
        out_indices = tuple(range(len(cast("Any", model.feature_info))))
    config = model.pretrained_cfg
    model = FeatureGetterNet(model, out_indices=cast("Any", out_indices))
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config
    return model
