"""The U-Net of diffusers, which takes an image and a time step, and is run by a pipeline."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

import batude_fx
from tests.others.common import (
    assert_exported,
    assert_same_outputs,
    assert_saved_and_loaded,
    assert_step_changes_factors,
    flops,
    noise,
    same_values,
    unchanged,
)

pytestmark = pytest.mark.others

BUDGET = 0.6
STEP = torch.tensor(10)
EXAMPLES = {
    "positional": (noise(1, 3, 16, 16), STEP),
    "keywords": {"sample": noise(1, 3, 16, 16), "timestep": STEP},
    "a number": {"timestep": 10, "sample": noise(1, 3, 16, 16)},
}


def fresh() -> UNet2DModel:
    """Return a small U-Net with the same random weights at each call."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def call(network: nn.Module) -> Tensor:
    sample: Tensor = network(sample=noise(1, 3, 16, 16), timestep=10).sample
    return sample


@pytest.fixture(scope="module")
def small() -> UNet2DModel:
    """The compressed network, which no test changes."""
    return batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLES["positional"])


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_budget_holds_and_the_original_is_left_as_it_was(kind: str) -> None:
    model = fresh()
    model.mid_block.register_forward_hook(lambda *_: None)
    config = model.config
    with unchanged(model):
        small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLES[kind])
    assert flops(small, *EXAMPLES["positional"]) <= BUDGET * flops(model, *EXAMPLES["positional"])
    assert model.config is config
    assert type(small.config) is FrozenDict
    assert same_values(small.config, config)
    with pytest.raises(Exception, match="You cannot use"):  # it is still frozen
        small.config.pop("sample_size")
    assert len(small.mid_block._forward_hooks) == 1


def test_keywords_and_positional_arguments_give_the_same_network(small: nn.Module) -> None:
    by_keyword = batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLES["keywords"])
    assert_same_outputs(by_keyword, small, call, bits=True)


def test_a_pipeline_generates_images_with_it(small: UNet2DModel) -> None:
    pipeline = DDPMPipeline(unet=small.eval(), scheduler=DDPMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 16, 16, 3)


def test_a_step_on_the_noise_changes_the_factors(small: nn.Module) -> None:
    def loss(network: nn.Module) -> Tensor:
        steps = torch.tensor([1, 7])
        clean, added = noise(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
        return F.mse_loss(network(DDPMScheduler().add_noise(clean, added, steps), steps).sample, added)

    assert_step_changes_factors(small, loss)


def test_saved_and_loaded_it_is_the_same_to_the_bit(small: nn.Module, tmp_path: Path) -> None:
    assert_saved_and_loaded(small, fresh(), call, tmp_path / "out")


@pytest.mark.parametrize("kind", ["positional", "keywords"])
def test_exported_it_computes_the_same(small: nn.Module, kind: str, tmp_path: Path) -> None:
    inputs = EXAMPLES["positional"]
    assert_exported(small, EXAMPLES[kind], call, inputs, tmp_path / "small.onnx")


@pytest.mark.parametrize("kind", ["positional", "keywords"])
def test_folding_takes_the_same_example(small: nn.Module, kind: str) -> None:
    assert_same_outputs(batude_fx.fold(small, EXAMPLES[kind]), small, call)
