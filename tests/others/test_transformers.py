"""A ResNet of transformers, which takes its images by keyword and returns a structure."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

import batude_fx
from tests.others.common import (
    assert_exported,
    assert_same_outputs,
    assert_saved_and_loaded,
    assert_step_changes_factors,
    flops,
    noise,
    unchanged,
    with_trained_norms,
)

pytestmark = pytest.mark.others

BUDGET = 0.5
EXAMPLE = noise(1, 3, 32, 32)
EXAMPLES = {
    "positional": EXAMPLE,
    "keyword": {"pixel_values": EXAMPLE},
    "keywords": {"pixel_values": EXAMPLE, "output_hidden_states": False, "return_dict": True},
}
IMAGES = noise(24, 3, 32, 32)


def fresh() -> ResNetForImageClassification:
    """Return a small ResNet with the same random weights at each call."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 128], depths=[1, 1, 1], layer_type="basic", num_labels=5
    )
    return with_trained_norms(ResNetForImageClassification(config))


def call(network: nn.Module) -> Tensor:
    logits: Tensor = network(pixel_values=noise(3, 3, 32, 32)).logits
    return logits


@pytest.fixture(scope="module")
def small() -> ResNetForImageClassification:
    """The compressed network, which no test changes."""
    return batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLE)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_budget_holds_and_the_original_is_left_as_it_was(kind: str) -> None:
    model = fresh()
    model.resnet.embedder.register_forward_hook(lambda *_: None)
    config = model.config.to_dict()
    with unchanged(model):
        small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLES[kind])
    assert flops(small, EXAMPLE) <= BUDGET * flops(model, EXAMPLE)
    assert model.config.to_dict() == small.config.to_dict() == config
    assert isinstance(small(pixel_values=EXAMPLE), ImageClassifierOutputWithNoAttention)
    assert len(small.resnet.embedder._forward_hooks) == 1


def test_keywords_and_positional_arguments_give_the_same_network(small: nn.Module) -> None:
    by_keyword = batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLES["keyword"])
    assert_same_outputs(by_keyword, small, call, bits=True)


@pytest.mark.filterwarnings("ignore:calibration images look")  # the batch-norms hold random numbers
def test_images_calibrate_a_network_that_takes_them_by_keyword() -> None:
    plans = [
        batude_fx.plan(fresh(), BUDGET, example_inputs=EXAMPLES[kind], calibration=IMAGES)
        for kind in ("positional", "keyword")
    ]
    assert [plan.calibration for plan in plans] == ["images", "images"]
    assert plans[0].ranks == plans[1].ranks


def test_the_sites_are_found_by_keyword() -> None:
    by_position = batude_fx.discover(fresh(), EXAMPLE)
    assert list(batude_fx.discover(fresh(), EXAMPLES["keyword"])) == list(by_position)


def test_an_unknown_keyword_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(batude_fx.BatudeError, match="pixel_values"):
        batude_fx.plan(fresh(), BUDGET, example_inputs={"images": EXAMPLE})


def test_a_step_on_its_own_loss_changes_the_factors(small: nn.Module) -> None:
    def loss(network: nn.Module) -> Tensor:
        own: Tensor = network(pixel_values=noise(4, 3, 32, 32), labels=torch.arange(4)).loss
        return own

    assert_step_changes_factors(small, loss)


def test_saved_and_loaded_it_is_the_same_to_the_bit(small: nn.Module, tmp_path: Path) -> None:
    assert_saved_and_loaded(small, fresh(), call, tmp_path / "out")


@pytest.mark.parametrize("kind", ["positional", "keyword"])
def test_exported_it_computes_the_same_for_another_batch(small: nn.Module, kind: str, tmp_path: Path) -> None:
    assert_exported(small, EXAMPLES[kind], call, [noise(3, 3, 32, 32)], tmp_path / "small.onnx")
