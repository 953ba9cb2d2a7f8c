"""What a file tells whoever runs it about its images: how they are resized and normalized, and what the classes are."""

import json
from typing import Any

from torch import nn

from batude_fx.graph.example_inputs import timm_config
from batude_fx.support.inputs import Inputs

_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")  # timm's


def describe_images(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Return the metadata of a model's file: timm's names, and values as JSON.

    Args:
        model: The model; of one that timm does not configure, only the size is known.
        inputs: The example input.

    Returns:
        "input_size" (C, H, W) of an image, and of "mean", "std" (per channel, of pixels in [0, 1]), "interpolation",
        "crop_pct", "crop_mode" and "label_names" those that the model's config has; empty if it takes no images.
    """
    if inputs.image is None:
        return {}
    config: dict[str, Any] = {key: timm_config(model).get(key) for key in _KEYS}
    config["input_size"] = list(inputs.image.shape[1:])
    texts: dict[str, str] = {}
    for key, value in config.items():
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):  # anyone may write anything into the config of a model
            continue
        texts |= {key: text} if value is not None else {}
    return texts
