"""Create networks by name: models of timm, models of torchvision, and saved folders."""

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
from batude_fx.saving.config import CONFIG, TRAINED_NETWORK
from batude_fx.support.atomic_files import newest

_TIMM_SOURCES = {"local-dir", "hf-hub"}  # prefixes of timm's names for networks that are stored with a config


def create(name: str, *, pretrained: bool = False, **args: Any) -> nn.Module:  # noqa: ANN401 - the factory's own
    """Create a model by its name: a saved folder, a timm model, or a torchvision model, looked up in this order.

    Args:
        name: The path of a saved folder, "resnet50", "timm:resnet50" or "torchvision:resnet50"; or timm's names for
            stored networks, "local-dir:FOLDER" and "hf-hub:USER/NAME".
        pretrained: Load trained weights, which timm and torchvision download.
        **args: Arguments of the model, such as `num_classes=10`; not for saved folders.

    Raises:
        BatudeError: When nothing has this name; the message suggests similar names.
        SavedModelError: When it is a folder that cannot be read.

    Source: `timm.create_model` and torchvision's `get_model`.
    """
    library, _, base = name.rpartition(":")
    if (newest(Path(name)) / CONFIG).is_file():
        if args:
            raise BatudeError(
                f'{name!r} is a saved folder and takes no {", ".join(args)}; timm\'s "local-dir:{name}" does.'
            )
        return saved_folder.load(name)
    if library in _TIMM_SOURCES:
        return timm.create_model(name, pretrained=pretrained, **args)
    if library in {"", "timm"} and timm.is_model(base.partition(".")[0]) and base != ENTRYPOINT:
        return timm.create_model(base, pretrained=pretrained, **args)
    if library in {"", "torchvision"} and base in models.list_models() and base != ENTRYPOINT:
        model = _pretrained_torchvision(base, args) if pretrained else Architecture("torchvision", base, args).build()
        if config := published_images(base):
            vars(model)["pretrained_cfg"] = config
        return model
    raise BatudeError(_explain_unknown(name, base))


def _explain_unknown(name: str, base: str) -> str:
    network = Path(name) / TRAINED_NETWORK
    if (network / CONFIG).is_file():
        return f"{name!r} is the folder of a training run; its network is {str(network)!r}."
    names = [*timm.list_models(), *models.list_models(), *timm.list_pretrained()]
    close = list(dict.fromkeys(difflib.get_close_matches(base, names, n=5)))[:3]
    return f"{name!r} is no saved folder, no timm model and no torchvision model. " + (
        f"Close names: {', '.join(close)}." if close else "timm.list_models() lists them."
    )


def _pretrained_torchvision(base: str, args: Mapping[str, Any]) -> nn.Module:
    """Create a model of torchvision with trained weights, and with fresh layers where `num_classes` changes shapes.

    torchvision itself refuses weights together with `num_classes`, or with `aux_logits=False`.
    """
    drops_auxiliary = base in {"googlenet", "inception_v3"} and args.get("aux_logits") is False
    refused_args = {"num_classes", "aux_logits"} if drops_auxiliary else {"num_classes"}
    accepted_args = {name: value for name, value in args.items() if name not in refused_args}
    model = cast("nn.Module", models.get_model(base, weights="DEFAULT", **accepted_args))
    if drops_auxiliary:
        vars(model)["aux_logits"] = False
        for name in {"AuxLogits", "aux1", "aux2"} & dict(model.named_children()).keys():
            setattr(model, name, None)
    if "num_classes" in args:
        layers = dict(model.named_modules())
        for name, fresh in list(Architecture("torchvision", base, args).build().named_modules()):
            if name in layers and _shapes(fresh) != _shapes(layers[name]):
                model.set_submodule(name, fresh)
    return model


def _shapes(layer: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in layer.parameters(recurse=False)]
