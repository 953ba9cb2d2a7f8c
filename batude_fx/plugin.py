"""Saved networks as architectures of timm and torchvision, and models of either library, or saved ones, by name.

After `import batude_fx`, `timm.create_model("local-dir:out", pretrained=True)` gives the network that `save` wrote to
`out`, and so does `"hf-hub:user/name"` for a folder that was pushed to a hub;
`torchvision.models.get_model("batude_fx", folder="out")` is torchvision's way to say the same.

Of timm's options, `num_classes=` gives a new classifier, `in_chans=` an adapted stem unless the stem itself is in
Tucker form, and `features_only=True` the features of models that have `forward_intermediates`, as most of timm's do.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from pydantic import ValidationError
from timm.models import PretrainedCfg, load_pretrained, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._hub import download_from_hf
from torch import Tensor, nn
from torchvision import models
from torchvision.models._api import WeightsEnum
from torchvision.models._api import register_model as register_torchvision_model

from batude_fx import cifar, record, serialization  # noqa: F401 - cifar registers its networks with timm
from batude_fx.errors import BatudeError, SavedModelError
from batude_fx.modules import TuckerModule
from batude_fx.origin import ENTRYPOINT, Origin
from batude_fx.saved_config import CONFIG, TRAINED, WEIGHTS, SavedArchitecture, first_problem, read_config
from batude_fx.zoo import published_images


def batude_fx(
    pretrained: bool = False,  # noqa: FBT001, FBT002 - timm's signature
    pretrained_cfg: PretrainedCfg | dict[str, Any] | None = None,
    **kwargs: Any,  # noqa: ANN401 - timm passes model_args and what its caller wrote
) -> nn.Module:
    """The entrypoint that timm calls for a saved folder; its arguments come from the folder's `config.json`.

    Raises:
        SavedModelError: When it is called without a saved folder, or the folder is broken, foreign or unsafe.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    cache_dir = kwargs.pop("cache_dir", None)
    placement = {key: kwargs.pop(key) for key in ("device", "dtype") if key in kwargs}
    features = {key: kwargs.pop(key) for key in ("features_only", "out_indices", "feature_cls") if key in kwargs}
    stored = kwargs.pop("pretrained_model_args", None) or {}
    if foreign := [*(stored.keys() - SavedArchitecture.model_fields.keys()), *(kwargs.keys() & {"checkpoint_path"})]:
        raise SavedModelError(f"model_args of the config hold {foreign[0]!r}, which batude_fx does not write.")
    own = {key: kwargs.pop(key) for key in SavedArchitecture.model_fields if key in kwargs}
    config: dict[str, Any] = resolve_pretrained_cfg(ENTRYPOINT, cast("Any", pretrained_cfg), overlay).to_dict()  # type: ignore[no-untyped-call]
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    saved = _saved(own, config)
    if pretrained and not kwargs and config.get("source") == "local-dir":
        shapes = serialization.read_shapes(Path(config["file"]) / WEIGHTS)
        serialization.check_fits(saved.build(weightless=True), shapes)  # before anything is allocated
    model = saved.build(**kwargs)
    vars(model)["pretrained_cfg"] = vars(model)["default_cfg"] = config
    if pretrained:
        _load(model, _state(config, cache_dir), config, adapted=bool(kwargs))
    else:
        _initialize_(model)
    if features.pop("features_only", False):
        model = _features(model, **features)
    return model.to(**placement) if placement else model


register_model(batude_fx)


@register_torchvision_model(ENTRYPOINT)  # type: ignore[untyped-decorator]
def _torchvision_entrypoint(*, folder: str | os.PathLike[str], weights: WeightsEnum | None = None) -> nn.Module:  # noqa: ARG001
    return serialization.load(folder)


_SOURCES = {"local-dir", "hf-hub"}  # in timm's names, where a config with the name of an architecture is


def create(name: str, *, pretrained: bool = False, **args: Any) -> nn.Module:  # noqa: ANN401 - the factory's own
    """A model by its name: a saved folder, a timm model, or a torchvision model, looked up in this order.

    Args:
        name: A path to a saved folder, "resnet50", "timm:resnet50" or "torchvision:resnet50"; or where timm keeps
            networks of users, "local-dir:FOLDER" or "hf-hub:USER/NAME".
        pretrained: Fetch trained weights, as timm and torchvision do.
        **args: Arguments of the model, such as `num_classes=10`; not for saved folders.

    Raises:
        BatudeError: When nothing has this name, with close ones.
        SavedModelError: When it is a folder that cannot be read.

    Source: `timm.create_model` and torchvision's `get_model`.
    """
    library, _, base = name.rpartition(":")
    if (Path(name) / CONFIG).is_file():
        if args:
            raise BatudeError(
                f'{name!r} is a saved folder and takes no {", ".join(args)}; timm\'s "local-dir:{name}" does.'
            )
        return serialization.load(name)
    if library in _SOURCES:
        return timm.create_model(name, pretrained=pretrained, **args)
    if library in {"", "timm"} and timm.is_model(base.partition(".")[0]) and base != ENTRYPOINT:
        return timm.create_model(base, pretrained=pretrained, **args)
    if library in {"", "torchvision"} and base in models.list_models() and base != ENTRYPOINT:
        model = _trained(base, args) if pretrained else Origin("torchvision", base, args).build()
        if shown := published_images(base):
            vars(model)["pretrained_cfg"] = shown
        return model
    if (inside := Path(name) / TRAINED / CONFIG).is_file():
        raise BatudeError(f"{name!r} is the folder of a training run; its network is {str(inside.parent)!r}.")
    known = [*timm.list_models(), *models.list_models(), *timm.list_pretrained()]
    close = list(dict.fromkeys(difflib.get_close_matches(base, known, n=5)))
    raise BatudeError(
        f"{name!r} is no saved folder, no timm model and no torchvision model. "
        + (f"Close names: {', '.join(close[:3])}." if close else "timm.list_models() lists them.")
    )


def _trained(base: str, args: Mapping[str, Any]) -> nn.Module:
    """A network of torchvision with its weights; a head for other classes is a fresh one, as in timm."""
    # torchvision refuses that together with weights.
    single = base in {"googlenet", "inception_v3"} and args.get("aux_logits") is False
    ours = {"num_classes", "aux_logits"} if single else {"num_classes"}
    published = {name: value for name, value in args.items() if name not in ours}
    model = cast("nn.Module", models.get_model(base, weights="DEFAULT", **published))
    if single:
        vars(model)["aux_logits"] = False
        for auxiliary in {"AuxLogits", "aux1", "aux2"} & dict(model.named_children()).keys():
            setattr(model, auxiliary, None)
    if "num_classes" in args:
        known = dict(model.named_modules())
        for name, layer in list(Origin("torchvision", base, args).build().named_modules()):
            if name in known and _shapes(layer) != _shapes(known[name]):
                model.set_submodule(name, layer)
    return model


def _shapes(layer: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in layer.parameters(recurse=False)]


def _saved(own: dict[str, Any], config: dict[str, Any]) -> SavedArchitecture:
    if "ranks" not in own:
        raise SavedModelError('batude_fx is the architecture of saved folders: timm.create_model("local-dir:FOLDER").')
    if config.get("source") == "local-dir":
        return read_config(Path(config["file"])).model_args  # checks more than timm does
    try:
        return SavedArchitecture.model_validate(own)
    except ValidationError as error:
        raise SavedModelError(f"not a config of batude_fx: {first_problem(error)}") from error


def _state(config: dict[str, Any], cache_dir: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """The weights. timm would take any file that it finds, pickled ones included."""
    if config.get("source") == "local-dir":
        return serialization.read_weights(Path(config["file"]) / WEIGHTS)
    if config.get("source") == "hf-hub":
        return serialization.read_weights(Path(download_from_hf(config["hf_hub_id"], WEIGHTS, cast("Any", cache_dir))))
    raise SavedModelError("no weights are known for this config; use pretrained=False, or batude_fx.load(folder).")


def _initialize_(model: nn.Module) -> None:
    """Fresh weights as torch's layers get them."""
    for module in model.modules():
        if isinstance(module, TuckerModule):
            for part in module.children():
                if not isinstance(part, nn.Identity):
                    cast("nn.Conv2d | nn.Linear", part).reset_parameters()


def _load(model: nn.Module, state: dict[str, Tensor], config: dict[str, Any], *, adapted: bool) -> None:
    if not adapted:
        serialization.load_weights_(model, state)
        if config.get("source") == "local-dir":
            folder = Path(config["file"])
            record.attach_(model, record.read(folder))
            if read_config(folder).channels_last:
                serialization.to_channels_last_(model)
        return
    given = {**config, "state_dict": state, "source": None, "file": None, "hf_hub_id": None, "url": None}
    classes: Any = getattr(model, "num_classes", None)
    if classes is None:  # torchvision's models do not say
        classes = model.get_submodule(config["classifier"]).out_features if config.get("classifier") else 1000
    try:
        load_pretrained(model, given, num_classes=int(classes), in_chans=getattr(model, "in_chans", 3))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise SavedModelError(f"the saved weights do not fit the arguments given to create_model: {reason}") from error


def _features(
    model: nn.Module, out_indices: tuple[int, ...] | list[int] | int | None = None, feature_cls: object = "getter"
) -> nn.Module:
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
