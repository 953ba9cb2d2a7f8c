"""Figures of the code itself: its files, functions and docstrings, its hooks, and which way its imports run.

`python -m benchmarks.structure` measures this checkout, `python -m benchmarks.structure FOLDER` another one. Imports in
functions and for types count as all others do. Those that run back up are counted where pyproject.toml has the layers
of import-linter.
"""

import ast
import statistics
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import numpy as np

PACKAGES = ("batude_fx", "batude_fx_cli")
_HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_hook")


@dataclass(frozen=True)
class Source:
    """A file of the package.

    Attributes:
        name: Of the module, such as "batude_fx.graph.flops".
        lines: Number of lines.
        tree: Its syntax tree.
    """

    name: str
    lines: int
    tree: ast.Module


def main(root: Path) -> None:
    """Print the figures of a checkout."""
    sources = list(read(root))
    sizes = [source.lines for source in sources]
    bodies = [body_lines(node) for source in sources for node in functions(source.tree)]
    described = [ast.get_docstring(node) is not None for source in sources for node in documentable(source.tree)]
    hooks = [source.name for source in sources if any(name in called(source.tree) for name in _HOOKS)]
    imports = {source.name: imported(source.tree, {each.name for each in sources}) for source in sources}
    print(f"files: {len(sources)}; lines: median {statistics.median(sizes):g}, largest {max(sizes)}")
    print(
        f"function bodies: {len(bodies)}; lines: median {statistics.median(bodies):g}, 90th percentile "
        f"{np.percentile(bodies, 90):g}, largest {max(bodies)}"
    )
    print(f"docstrings: {np.mean(described):.1%} of {len(described)} modules, classes and functions")
    print(f"files that register hooks: {len(hooks)} ({', '.join(hooks)})")
    print(f"imports between files: {sum(map(len, imports.values()))}")
    print(f"largest circle: {largest_circle(imports)} files")
    layers = read_layers(root)
    if layers:
        back = [(file, other) for file in imports for other in imports[file] if runs_back_up(file, other, layers)]
        print(f"imports that run back up: {len(back)} {back or ''}")


def read(root: Path) -> Iterator[Source]:
    """All files of the packages of a checkout."""
    for path in chain.from_iterable(sorted((root / package).rglob("*.py")) for package in PACKAGES):
        text = path.read_text(encoding="utf-8")
        parts = path.relative_to(root).with_suffix("").parts
        yield Source(".".join(parts).removesuffix(".__init__"), len(text.splitlines()), ast.parse(text))


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """All functions and methods of a file, those inside others too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def documentable(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The file, its classes and its functions, but for those inside functions."""
    yield tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node
            yield from (inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name != "__init__")
        elif isinstance(node, ast.FunctionDef):
            yield node


def body_lines(function: ast.FunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def called(tree: ast.Module) -> set[str]:
    """Names of the methods that a file calls."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {function.attr for function in calls if isinstance(function, ast.Attribute)}


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """The files of the packages that a file imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & known or {node.module}
    return names & known


def largest_circle(imports: dict[str, set[str]]) -> int:
    """How many files the largest set has whose members all reach each other; 0 where there is no circle."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError:
        reach = {file: reachable(file, imports) for file in imports}
        return max(sum(file in reach[other] for other in reach[file]) for file in imports)
    return 0


def reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    """The files that a file imports, directly or by others."""
    found: set[str] = set()
    queue = [start]
    while queue:
        new = imports[queue.pop()] - found
        found |= new
        queue += new
    return found


def read_layers(root: Path) -> list[str]:
    """The layers of the import contract, the highest first; none where there is no contract."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    return next((["batude_fx_cli", *contract["layers"]] for contract in contracts if contract["type"] == "layers"), [])


def runs_back_up(file: str, other: str, layers: list[str]) -> bool:
    """Whether an import goes from a lower layer to a higher one."""
    places = [_place(name, layers) for name in (file, other)]
    return None not in places and places[1] < places[0]  # type: ignore[operator]


def _place(name: str, layers: list[str]) -> int | None:
    """The layer of a file, counted from the top; None for the face and for `__main__`."""
    parts = name.split(".")
    layer = parts[0] if parts[0] == "batude_fx_cli" else ".".join(parts[1:2])
    return layers.index(layer) if layer in layers and layer != "__main__" else None


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
