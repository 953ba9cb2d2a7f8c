"""The documentation: its code runs, its examples run, its site builds without a warning, its API page is complete."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import batude_fx

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
VERBS = [name for name in batude_fx.__all__ if inspect.isfunction(getattr(batude_fx, name))]

EXAMPLES = {
    "budget": "Use at least 0.1963",
    "conv_class": "after: [None, None]",
    "deploying": "small-int8.onnx: ",
    "detector": "'boxes': (300, 4)",
    "recipe": "A mistake is one line",
    "restoring": "of 400 steps; before, it agreed on",
    "several_gpus": "ranks: {",
    "untraceable": "'first.0': 'child'",
}
RUN_BY_TEST_OTHERS = {"yolo"}  # with packages that are not installed here


def _blocks(page: Path) -> list[str]:
    return [code for code in _BLOCK.findall(page.read_text(encoding="utf-8")) if not code.startswith("--8<--")]


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """timm's smallest ResNet for every name, with fresh weights: nothing is fetched, and all is done in seconds."""
    create = timm.create_model

    def small(name: str, *, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        saved = name.startswith("local-dir:")
        if not saved:
            name, options["pretrained_cfg_overlay"] = "test_resnet", {"input_size": (3, 64, 64)}
        return create(name, pretrained=pretrained and saved, **options)

    monkeypatch.setattr(timm, "create_model", small)
    return iter(())


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)], ids=lambda page: page.stem)
@pytest.mark.usefixtures("small_models")
def test_python_blocks_run_in_their_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": torch.randn(8, 3, 64, 64)}  # README speaks of images that the reader has
    for code in _blocks(page):
        exec(compile(code, str(page), "exec"), names)  # noqa: S102 - our own documentation


def test_every_guide_shows_an_example_and_every_example_is_run() -> None:
    shown = {name for page in PAGES for name in re.findall(r"^examples/(\w+)\.py$", page.read_text(), re.MULTILINE)}
    written = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"digits", "digits_demo"}
    assert (
        shown
        == {*EXAMPLES, *RUN_BY_TEST_OTHERS}
        == written
        == {path.stem for path in (ROOT / "docs" / "guides").glob("*.md")}
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    has_folder = "FOLDER" in (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", f"examples.{name}", *([str(tmp_path)] if has_folder else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[name] in done.stdout


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(  # noqa: S603 - our own command
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', _html(tmp_path / "site"))
    recipe = (tmp_path / "site" / "recipes" / "any-timm-model.html").read_text(encoding="utf-8")
    for key in ("data.root", "budget", "one_shot.distillation.weight", "pretrain.ema"):  # it leaves `pretrain` out
        assert f"<td><code>{key}</code></td>" in recipe
    architecture = (tmp_path / "site" / "architecture.html").read_text(encoding="utf-8")
    for folder in (path.parent.name for path in (ROOT / "batude_fx").glob("*/__init__.py")):
        assert f'<a href="#{folder}"><rect' in architecture
        assert f'<h3 id="{folder}">' in architecture


def _html(site: Path) -> str:
    return "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))


def test_every_concept_and_every_recipe_page_ends_in_its_limits() -> None:
    for page in (ROOT / "docs" / "concepts").glob("*.md"):
        assert "\n## Limitations\n" in page.read_text(), page


def test_the_api_page_has_every_public_name() -> None:
    documented = re.findall(r"^::: batude_fx\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == batude_fx.__all__


@pytest.mark.parametrize("name", VERBS)
def test_public_verbs_say_what_they_take_raise_and_stand_on(name: str) -> None:
    verb = getattr(batude_fx, name)
    text = inspect.getdoc(verb) or ""
    for argument in inspect.signature(verb).parameters:
        assert re.search(rf"^    \**{argument}: ", text, re.MULTILINE), argument
    assert "\nRaises:\n" in text
    assert "\nSource: " in text


@pytest.mark.parametrize("name", sorted(set(batude_fx.__all__) - set(VERBS)))
def test_public_types_explain_their_fields(name: str) -> None:
    kind = getattr(batude_fx, name)
    text = inspect.getdoc(kind) or ""
    assert text
    if not issubclass(kind, Exception):
        fields = getattr(kind, "__dataclass_fields__", {})
        for field in fields:
            assert field.startswith("_") or re.search(rf"^    {field}: ", text, re.MULTILINE), field
