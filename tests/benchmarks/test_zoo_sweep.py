"""The zoo sweep: a killed one goes on, nothing is counted twice, and the page shows what the file holds."""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from batude_fx.support.inputs import Inputs
from benchmarks import zoo_checks, zoo_sweep
from benchmarks.zoo_sweep import Journal, Record, Task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Tasks that reach a worker; the answer is its own model's name, but for "bad" an error."""
    seen: list[Task] = []

    def answers(tasks: Iterable[Task], _: Mapping[Task, Record]) -> Iterator[tuple[Task, Record]]:
        for task in tasks:
            seen.append(task)
            yield task, {"error": "no"} if task[1] == "bad" else {"is": task[1]}

    monkeypatch.setattr(zoo_sweep, "answers", answers)
    return seen


def test_a_killed_sweep_goes_on_and_tries_again_what_failed(tmp_path: Path, asked: list[Task]) -> None:
    path = tmp_path / "zoo" / "journal.jsonl"
    Journal(path, {"timm": "1"}).fill([("size", "a"), ("size", "bad")], "first")
    with path.open("a") as file:
        file.write('{"task": "size", "model": "half')  # killed while it wrote
    asked.clear()
    journal = Journal(path, {"timm": "1"})
    journal.fill([("size", "a"), ("size", "b"), ("size", "b"), ("size", "bad")], "second")
    assert asked == [("size", "b"), ("size", "bad")]
    assert journal.records["size", "a"] == {"is": "a"}
    again = Journal(path, {"timm": "1"})
    assert again.records == journal.records


def test_a_sweep_with_other_versions_of_the_libraries_starts_anew(tmp_path: Path, asked: list[Task]) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"timm": "1"}).fill([("size", "a")], "old")
    Journal(path, {"timm": "2"}).fill([("size", "a")], "new")
    assert asked == [("size", "a"), ("size", "a")]


def test_convolutions_are_counted_below_modules_and_functions() -> None:
    class Hidden(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            first: Tensor = torch.conv2d(x, self.weight)
            return torch.nn.functional.conv_transpose2d(first, self.weight)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Hidden(4, 4, 1)), nn.Conv2d(4, 4, 1))
    assert zoo_checks.convolution_calls(net, Inputs((torch.zeros(1, 3, 8, 8),))) == {"0": 1, "1.0": 2, "2": 1}
    assert not any(module._forward_hooks for module in net.modules())


def test_a_small_model_passes_every_check() -> None:
    found, compressed = (
        zoo_checks.found("timm:test_resnet", weightless=False),
        zoo_checks.compressed("timm:test_resnet"),
    )
    assert "error" not in found | compressed
    assert found["calls"] == found["counted"] == found["convolutions"] == 15
    assert 0 < compressed["replaced"] <= compressed["eligible"]
    assert compressed["compressed"] <= compressed["keep"] * compressed["flops"]


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = zoo_checks._composed
    monkeypatch.setattr(zoo_checks, "_composed", lambda part: 1.001 * composed(part))
    assert "composed weights: relative difference" in zoo_checks.compressed("timm:test_resnet")["error"]


def test_families_are_library_and_module() -> None:
    assert zoo_checks.family("timm:resnet18") == "timm:resnet"
    assert zoo_checks.family("torchvision:ssd300_vgg16") == "torchvision:detection.ssd"
    assert len(zoo_checks.all_models()) > len(timm.list_models())


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_zoo_page_shows_every_model_and_reason(hooks: Any) -> None:
    data = json.loads((ROOT / "docs" / "data" / "zoo.json").read_text())
    page = hooks.on_page_markdown((ROOT / "docs" / "zoo.md").read_text())
    assert "<!-- zoo:" not in page
    assert all(f"<td>{record['name']}</td>" in page for record in data["models"])
    assert all(f"<td>{record['family']}</td>" in page for record in data["families"])
    assert all(
        f"<td>{reason}</td>" in page for record in data["models"] for reason in record["skipped"] if "'" not in reason
    )
    assert hooks.on_page_markdown("other page") == "other page"
