"""Models that cannot be compressed are refused with what to do instead."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

import batude_fx
from batude_fx.errors import BatudeError, BudgetError, DiscoveryError, SelectionError, UnsupportedError
from tests.compression.common import EXAMPLE
from tests.toy_networks import varied_net


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=r"compress model\.float\(\)"):
        batude_fx.compress(varied_net().to(dtype), 0.5, example_inputs=EXAMPLE.to(dtype))


@torch.inference_mode()
def test_inference_mode_is_refused_as_it_has_no_gradients() -> None:
    with pytest.raises(UnsupportedError, match=r"outside.*torch\.no_grad\(\) is no hindrance"):
        batude_fx.compress(varied_net(), 0.5, example_inputs=EXAMPLE)


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = varied_net()
    with pytest.raises(UnsupportedError, match="make it outside"):
        batude_fx.compress(model, 0.5, example_inputs=EXAMPLE)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:.torch.jit.script.:DeprecationWarning")
def test_autocast_is_refused() -> None:
    with torch.autocast("cpu"), pytest.raises(UnsupportedError, match=r"in half precision; compress outside"):
        batude_fx.compress(varied_net(), 0.6, example_inputs=EXAMPLE)


def test_wrappers_are_refused_with_what_to_compress_instead() -> None:
    wrappers: dict[str, Any] = {
        "its `_orig_mod`, then torch.compile": torch.compile(varied_net()),
        "its `module`": nn.DataParallel(varied_net()),
        "scripted from": torch.jit.script(varied_net()),
    }
    for words, wrapper in wrappers.items():
        with pytest.raises(UnsupportedError, match=words):
            batude_fx.compress(wrapper, 0.5, example_inputs=EXAMPLE)


def test_models_without_values_or_convolutions_are_refused() -> None:
    with torch.device("meta"):
        empty = varied_net()
    with pytest.raises(UnsupportedError, match="load the weights first"):
        batude_fx.compress(empty, 0.5, example_inputs=EXAMPLE)
    with pytest.raises(BatudeError, match="no convolution"):
        batude_fx.compress(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), 0.5, example_inputs=EXAMPLE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = varied_net()
    model.stem.weight.data[0, 0, 0, 0] = value
    with pytest.raises(UnsupportedError, match=r"stem\.weight holds NaN or infinite"):
        batude_fx.compress(model, 0.5, calibration=None, example_inputs=EXAMPLE)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = varied_net()
    vars(model)["lock"] = threading.Lock()
    with pytest.raises(BatudeError, match="cannot be copied"):
        batude_fx.compress(model, 0.6, example_inputs=EXAMPLE)


def test_lazy_layers_and_names_of_models_are_refused() -> None:
    with pytest.raises(BatudeError, match="not initialized yet"):
        batude_fx.compress(nn.Sequential(nn.LazyConv2d(8, 3)), 0.5, example_inputs=EXAMPLE)
    with pytest.raises(UnsupportedError, match="'resnet18' is no model"):
        batude_fx.compress("resnet18", 0.5)  # type: ignore[type-var]
    with pytest.raises(SelectionError, match="give Ranks"):
        batude_fx.compress(varied_net(), 0.5, example_inputs=EXAMPLE, ranks={"stem": (8, 8)})  # type: ignore[dict-item]


@pytest.mark.parametrize(("example", "words"), [
    ((50 * EXAMPLE).to(torch.uint8), r"is torch\.uint8 and the weights are torch\.float32: pass images\.to\(torch\.fl"),
    (EXAMPLE.double(), r"is torch\.float64 and the weights are torch\.float32"),
    (EXAMPLE * float("nan"), "example_inputs holds NaN"),
    (EXAMPLE[:0], r"has shape \(0, 3, \d+, \d+\) and no values"),
    ({1: EXAMPLE}, "of type dict, .* Its key 1 is not the name of an argument"),
    (EXAMPLE.numpy(), r"of type ndarray, .* Pass torch\.as_tensor\(array\)"),
])  # fmt: skip
def test_an_example_that_no_model_runs_on_is_refused(example: Any, words: str) -> None:
    with pytest.raises(DiscoveryError, match=words):
        batude_fx.compress(varied_net(), 0.6, calibration=None, example_inputs=example)


def test_a_tiny_budget_is_not_shown_as_zero() -> None:
    with pytest.raises(BudgetError, match=r"budget of less than 0\.0001 of the flops is out of reach"):
        batude_fx.compress(varied_net(), "1e-9", calibration=None, example_inputs=EXAMPLE)
