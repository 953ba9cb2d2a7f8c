"""What import-linter's contracts in pyproject.toml cannot hold: parts of torch, light imports, what is never called."""

import ast
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import batude_fx

ROOT = Path(batude_fx.__file__).parents[1]
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("batude_fx", "batude_fx_cli")
    for path in (ROOT / package).rglob("*.py")
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


def test_one_file_uses_torch_fx() -> None:
    """import-linter sees packages of others as a whole; which parts of torch a file uses is looked up here."""
    imports = {name for name, tree in TREES.items() if _within("torch.fx", _imports(ast.walk(tree)))}
    attributes = {
        name
        for name, tree in TREES.items()
        if any(isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.fx" for node in ast.walk(tree))
    }
    assert imports | attributes == {"batude_fx.graph.discovery"}


@pytest.mark.parametrize("name", ["calibration.dead_leaves", "tucker.decomposition", "tucker.spectra"])
def test_mathematics_knows_no_layers(name: str) -> None:
    assert not _within("torch.nn", _imports(ast.walk(TREES[f"batude_fx.{name}"])))


def test_importing_the_package_is_light() -> None:
    heavy = {"accelerate", "fvcore", "jinja2", "matplotlib", "onnx", "onnxruntime", "openvino", "pyarrow", "rich"}
    heavy |= {"sklearn", "tensorly", "typer"}
    assert not heavy & _modules_after("import batude_fx")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compress", "--help"], ["recipes", "--help"]])
def test_the_command_line_answers_without_torch(arguments: list[str]) -> None:
    code = f"from batude_fx_cli.app import app; app({arguments!r}, standalone_mode=False)"
    assert not {"torch", "timm", "batude_fx"} & _modules_after(code)


def _modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has imported after some code."""
    code = f"import sys\n{code}\nprint('modules', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", TREES)
def test_nothing_can_execute_what_it_reads(name: str) -> None:
    modules = ("pickle", "marshal", "shelve", "dill", "subprocess", "runpy", "importlib.import_module")
    imported = _imports(ast.walk(TREES[name]))
    allowed = {"runpy"} if name == "batude_fx_cli.timm_script" else set()  # runs what the user names, as python does
    assert not [module for module in modules if module not in allowed and _within(module, imported)]
    calls = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "importlib.import_module",
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
