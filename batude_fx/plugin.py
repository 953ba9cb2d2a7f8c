"""Saved networks as architectures of timm and torchvision, and models of either library, or saved ones, by name.

After `import batude_fx`, `timm.create_model("local-dir:out", pretrained=True)` gives the network that `save` wrote to
`out`, and so does `"hf-hub:user/name"` for a folder that was pushed to a hub;
`torchvision.models.get_model("batude_fx", folder="out")` is torchvision's way to say the same.
"""

import difflib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, load_pretrained, register_model
from torch import nn
from torchvision import models
from torchvision.models._api import register_model as register_torchvision_model

from batude_fx import serialization
from batude_fx.errors import BatudeError, SavedModelError


def batude_fx(
    pretrained: bool = False,  # noqa: FBT001, FBT002 - timm's signature
    pretrained_cfg: PretrainedCfg | dict[str, Any] | None = None,
    **kwargs: Any,  # noqa: ANN401 - timm passes model_args and what its caller wrote
) -> nn.Module:
    """The entrypoint that timm calls for a saved folder; its arguments come from the folder's `config.json`.

    Raises:
        SavedModelError: When it is called without a saved folder, or the config does not describe a network.
    """
    own = {key: kwargs.pop(key) for key in serialization.SavedArchitecture.model_fields if key in kwargs}
    for unused in ("pretrained_model_args", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(unused, None)
    if "ranks" not in own or pretrained_cfg is None:
        raise SavedModelError('batude_fx is the architecture of saved folders: timm.create_model("local-dir:FOLDER").')
    saved = serialization.SavedArchitecture.model_validate(own)
    model: Any = saved.build(**kwargs)
    model.pretrained_cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else asdict(pretrained_cfg)
    if pretrained:
        load_pretrained(model, model.pretrained_cfg, num_classes=getattr(model, "num_classes", 1000))
    return model  # type: ignore[no-any-return]


register_model(batude_fx)


@register_torchvision_model("batude_fx")  # type: ignore[untyped-decorator]
def _torchvision_entrypoint(*, folder: str | os.PathLike[str], weights: None = None) -> nn.Module:  # noqa: ARG001
    return serialization.load(folder)


def create(name: str, *, pretrained: bool = False) -> nn.Module:
    """A model by its name: a saved folder, a timm model, or a torchvision model, looked up in this order.

    Args:
        name: A path to a saved folder, "resnet50", "timm/resnet50" or "torchvision/resnet50".
        pretrained: Fetch trained weights, as timm and torchvision do.

    Raises:
        BatudeError: When nothing has this name, with close ones.
        SavedModelError: When it is a folder that cannot be read.
    """
    library, _, rest = name.rpartition("/")
    if Path(name).is_dir():
        return serialization.load(name)
    if library in {"", "timm"} and timm.is_model(rest.partition(".")[0]):
        return timm.create_model(rest, pretrained=pretrained)
    if library in {"", "torchvision"} and rest in models.list_models():
        return models.get_model(rest, weights="DEFAULT" if pretrained else None)  # type: ignore[no-any-return]
    close = difflib.get_close_matches(rest, [*timm.list_models(), *models.list_models()], n=3)
    raise BatudeError(
        f"{name!r} is no saved folder, no timm model and no torchvision model. "
        + (f"Close names: {', '.join(close)}." if close else "timm.list_models() lists them.")
    )
