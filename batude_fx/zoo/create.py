"""Saved networks as architectures of timm and torchvision, and models of either library, or saved ones, by name.

After `import batude_fx`, `timm.create_model("local-dir:out", pretrained=True)` gives the network that `save` wrote to
`out`, and so does `"hf-hub:user/name"` for a folder that was pushed to a hub;
`torchvision.models.get_model("batude_fx", folder="out")` is torchvision's way to say the same.

Of timm's options, `num_classes=` gives a new classifier, `in_chans=` an adapted stem unless the stem itself is in
Tucker form, and `features_only=True` the features of models that have `forward_intermediates`, as most of timm's do.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn
from torchvision import models

from batude_fx.errors import BatudeError
from batude_fx.graph.example_inputs import published_images
from batude_fx.saving import saved_folder
from batude_fx.saving.architecture import ENTRYPOINT, Architecture
from batude_fx.saving.config import CONFIG, TRAINED

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
        return saved_folder.load(name)
    if library in _SOURCES:
        return timm.create_model(name, pretrained=pretrained, **args)
    if library in {"", "timm"} and timm.is_model(base.partition(".")[0]) and base != ENTRYPOINT:
        return timm.create_model(base, pretrained=pretrained, **args)
    if library in {"", "torchvision"} and base in models.list_models() and base != ENTRYPOINT:
        model = _trained(base, args) if pretrained else Architecture("torchvision", base, args).build()
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
        for name, layer in list(Architecture("torchvision", base, args).build().named_modules()):
            if name in known and _shapes(layer) != _shapes(known[name]):
                model.set_submodule(name, layer)
    return model


def _shapes(layer: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in layer.parameters(recurse=False)]
