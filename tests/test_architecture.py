"""The rooms of the package and what may pass between them, read from the imports; and what must never be called."""

import ast
import graphlib
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import batude_fx

ROOT = Path(batude_fx.__file__).parent
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
}


def _imports(nodes: Iterable[ast.AST]) -> set[str]:
    """What is imported, with its module: `from torch import fx` gives torch and torch.fx."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _within(package: str, names: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in names)


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("torch.fx", {"discovery"}),
        ("fvcore", {"flops"}),
        ("tensorly", set()),
        ("pydantic", {"budget", "plugin", "recipe", "record", "saved_config", "serialization", "sweep"}),
        ("safetensors", {"serialization", "training.checkpoint", "training.session"}),
        ("yaml", {"recipe"}),
        ("accelerate", {"cli_recipes", "training.data", "training.session"}),
        ("matplotlib", {"pictures"}),
        ("onnxruntime", {"exporting", "quantizing"}),
        ("openvino", {"exporting"}),
        ("jinja2", {"page"}),
        ("typer", {"cli", "cli_recipes", "terminal"}),
        ("rich", {"cli", "cli_recipes", "progress", "report", "terminal"}),
        ("PIL", {"images"}),
        ("torchvision", {"folding", "handlers", "origin", "plugin", "training.data", "zoo"}),
        (
            "timm",
            {
                "cifar",
                "discovery",
                "folding",
                "handlers",
                "images",
                "origin",
                "plugin",
                "recipe",
                "training.data",
                "training.phase",
                "training.problem",
            },
        ),
        ("batude_fx.report", {"cli", "cli_recipes", "compression", "page", "sites", "training.phase"}),
        ("batude_fx.pictures", {"page", "training.session"}),
        ("batude_fx.cli", {"__main__"}),
        ("batude_fx.images", {"cli", "evaluation"}),
        (
            "batude_fx.compression",
            {"__init__", "report", "sweep", "training.preview"},
        ),  # report: for the type checker only
        ("batude_fx.discovery", {"__init__", "compression", "training.problem"}),
    ],
)
def test_exactly_these_rooms_import(package: str, rooms: set[str]) -> None:
    assert {name for name, tree in TREES.items() if _within(package, _imports(ast.walk(tree)))} == rooms


@pytest.mark.parametrize(
    ("room", "package"),
    [
        ("allocation", "torch"),
        ("budget", "torch"),
        ("sites", "torch"),
        ("tucker", "torch.nn"),
        ("spectra", "torch.nn"),
        ("synthetic", "torch.nn"),
        ("training.adl", "batude_fx.compression"),
    ],
)
def test_mathematics_has_no_model_in_sight(room: str, package: str) -> None:
    assert not _within(package, _imports(ast.walk(TREES[room])))


@pytest.mark.parametrize(("room", "package"), [("flops", "fvcore"), ("compression", "batude_fx.report")])
def test_what_is_heavy_is_imported_late(room: str, package: str) -> None:
    assert not _within(package, _imports(TREES[room].body))


def _rooms_used(tree: ast.Module) -> set[str]:
    """Imports at the top of a file; those inside functions are the version, and the table of a plan."""
    names = _imports(tree.body)
    rooms = {room for room in TREES if f"batude_fx.{room}" in names}
    return rooms if rooms or "batude_fx" not in names else {"__init__"}


def test_data_goes_one_way() -> None:
    graph = {name: _rooms_used(tree) for name, tree in TREES.items()}
    graph["cli"] |= {"__init__"}  # `import batude_fx`
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises on a cycle
    print(" > ".join(order))  # noqa: T201 - the architecture, for `pytest -s`
    chain = ["sites", "flops", "allocation", "spectra", "measuring", "compression", "__init__", "cli", "__main__"]
    assert sorted(chain, key=order.index) == chain
    chain = ["tucker", "modules", "surgery", "saved_config", "serialization", "plugin", "__init__"]
    assert sorted(chain, key=order.index) == chain
    assert graph["sites"] == graph["tucker"] == graph["errors"] == set()


def test_importing_the_package_is_light() -> None:
    heavy = {"accelerate", "fvcore", "matplotlib", "onnx", "pyarrow", "rich", "sklearn", "tensorly", "typer"}
    code = f"import sys, batude_fx; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", TREES)
def test_nothing_can_execute_what_it_reads(name: str) -> None:
    modules = ("pickle", "marshal", "shelve", "dill", "subprocess", "runpy", "importlib.import_module")
    imported = _imports(ast.walk(TREES[name]))
    assert not [module for module in modules if _within(module, imported)]
    calls = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "torch.load",
        "torch.hub.load",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
    }
    assert not calls & {ast.unparse(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}
    assert not calls & imported


@pytest.mark.parametrize("name", TREES)
def test_every_file_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(TREES[name])


def test_the_public_names_are_sorted_and_documented() -> None:
    assert batude_fx.__all__ == sorted(set(batude_fx.__all__))
    assert all(getattr(batude_fx, name).__doc__ for name in batude_fx.__all__)


def _public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in batude_fx.__all__:
        value = getattr(batude_fx, name)
        if not inspect.isclass(value):
            yield name, value
            continue
        for attribute, member in vars(value).items():
            function = getattr(member, "__func__", member)
            # A function by another name is the default of a field, which its class describes.
            if inspect.isfunction(function) and function.__name__ == attribute and not attribute.startswith("_"):
                yield f"{name}.{attribute}", function


@pytest.mark.parametrize(("name", "function"), list(_public_functions()))
def test_public_functions_say_what_they_take_and_raise(name: str, function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""
    assert text, name
    if "." not in name:
        assert "Args:" in text
        for parameter in inspect.signature(function).parameters:
            assert f"{parameter}:" in text
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree)):
        assert "Raises:" in text
