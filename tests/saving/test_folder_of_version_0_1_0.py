"""A folder that version 0.1.0 saved, before its modules moved, is read as it was read then.

`data/saved-0.1.0` holds resnet20_cifar at 2.5 % of its flops, and in expected.safetensors its output for `IMAGES`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from safetensors.torch import load_file
from torch import nn

import batude_fx
from batude_fx.report import record
from batude_fx.tucker.modules import TuckerModule

FOLDER = Path(__file__).parent / "data" / "saved-0.1.0"
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
READERS: dict[str, Callable[[], nn.Module]] = {
    "load": lambda: batude_fx.load(FOLDER),
    "timm": lambda: timm.create_model(f"local-dir:{FOLDER}", pretrained=True),
}


@pytest.fixture(scope="module", params=READERS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return READERS[request.param]().eval()


def test_its_tensors_are_those_of_the_file_bit_for_bit(network: nn.Module) -> None:
    tensors, state = load_file(FOLDER / "model.safetensors"), network.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert state[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_its_ranks_are_those_of_the_config(network: nn.Module) -> None:
    modules = {name: module for name, module in network.named_modules() if isinstance(module, TuckerModule)}
    ranks = {name: [module.ranks.rank_out, module.ranks.rank_in] for name, module in modules.items()}
    assert ranks == CONFIG["model_args"]["ranks"]


def test_its_outputs_are_those_of_that_version(network: nn.Module) -> None:
    expected = load_file(FOLDER / "expected.safetensors")["output"]
    with torch.no_grad():
        output = network(IMAGES)
    tolerance = 1e-5 * float(expected.abs().max())  # another processor may round differently
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)


def test_its_report_is_read_and_is_about_this_network(network: nn.Module) -> None:
    report = record.read(FOLDER)
    assert report is not None
    assert (report.model, report.budget, report.calibration) == ("CifarResNet", "flops 0.025", "synthetic")
    assert {site.name: list(site.ranks) for site in report.sites if site.ranks} == CONFIG["model_args"]["ranks"]
    assert report.params == CONFIG["params"] == sum(parameter.numel() for parameter in network.parameters())
    counted = FlopCountAnalysis(network, IMAGES[:1]).unsupported_ops_warnings(enabled=False)
    assert report.flops == counted.uncalled_modules_warnings(enabled=False).total()


def test_saved_again_it_keeps_its_report(network: nn.Module, tmp_path: Path) -> None:
    batude_fx.save(network, tmp_path / "again")
    again, before = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "again", FOLDER))
    new = "quality", "weights_measured", "search", "restoration"  # which version 0.1.0 did not measure
    assert again == before | dict.fromkeys(new) | {"sensitivity": []}
