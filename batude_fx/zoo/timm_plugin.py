"""Saved networks as architectures of timm and torchvision, and models of either library, or saved ones, by name.

After `import batude_fx`, `timm.create_model("local-dir:out", pretrained=True)` gives the network that `save` wrote to
`out`, and so does `"hf-hub:user/name"` for a folder that was pushed to a hub;
`torchvision.models.get_model("batude_fx", folder="out")` is torchvision's way to say the same.

Of timm's options, `num_classes=` gives a new classifier, `in_chans=` an adapted stem unless the stem itself is in
Tucker form, and `features_only=True` the features of models that have `forward_intermediates`, as most of timm's do.
"""

import os
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from timm.models import PretrainedCfg, load_pretrained, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models._hub import download_from_hf
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum
from torchvision.models._api import register_model as register_torchvision_model

from batude_fx.errors import SavedModelError
from batude_fx.graph import provenance
from batude_fx.report import record
from batude_fx.saving import saved_folder, weights
from batude_fx.saving.architecture import ENTRYPOINT
from batude_fx.saving.config import WEIGHTS, SavedArchitecture, read_config
from batude_fx.support.validation import first_problem
from batude_fx.tucker.modules import TuckerModule


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
        shapes = weights.read_shapes(Path(config["file"]) / WEIGHTS)
        weights.check_fits(saved.build(weightless=True), shapes)  # before anything is allocated
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
    return saved_folder.load(folder)


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
        return weights.read_weights(Path(config["file"]) / WEIGHTS)
    if config.get("source") == "hf-hub":
        return weights.read_weights(Path(download_from_hf(config["hf_hub_id"], WEIGHTS, cast("Any", cache_dir))))
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
        weights.load_weights_(model, state)
        if config.get("source") == "local-dir":
            folder = Path(config["file"])
            provenance.attach_(model, record.read(folder))
            if read_config(folder).channels_last:
                weights.to_channels_last_(model)
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
