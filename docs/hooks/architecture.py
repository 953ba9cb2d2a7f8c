"""mkdocs hook: the diagrams and tables of the architecture page, made from the code when the site is built.

The order of the folders comes from the layers contract of import-linter in `pyproject.toml`, the arrows from the
imports that grimp finds, and the tables from the first docstring line of every file.
"""

import ast
import tomllib
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import grimp

_ROOT = Path(__file__).parents[2]
_PACKAGE, _CLI = "batude_fx", "batude_fx_cli"

# The data in the order in which a compression makes it: its name, the type that holds it, and the function or class
# that makes it. `data_flow` refuses a name that the code no longer has.
_FLOW = (
    ("model and example input", None, None),
    ("sites", "graph.sites.ConvSite", "graph.discovery.discover"),
    ("statistics of images", "tucker.metric.Metric", "calibration.statistics.statistics"),
    ("spectra", "tucker.spectra.Spectrum", "tucker.spectra.metric_spectrum"),
    ("rank options with losses", "compression.rank_search.SiteCandidate", "compression.rank_search.decompose_sites"),
    ("ranks", "compression.rank_search.RankPlan", "compression.rank_search.choose_ranks"),
    ("plan", "compression.plan.Plan", "compression.planning.plan"),
    ("compressed network", "tucker.modules.TuckerModule", "graph.surgery.replace_modules"),
    ("saved folder and report", "saving.config.SavedConfig", "saving.saved_folder.save"),
)

_WIDTH, _HEIGHT, _PITCH, _ROW = 116, 28, 62, 40  # pixels: a folder's box, and the distances between boxes
_FLOW_WIDTH, _FLOW_HEIGHT, _FLOW_ROW = 340, 44, 80  # pixels: a box of the data, and the distance between two


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put diagrams and tables where a page asks for them, as `<!-- architecture:files -->`."""
    if "<!-- architecture:" not in markdown:
        return markdown
    folders = [_CLI, *layers()]
    imports = folder_imports(folders)
    made = {"imports": import_diagram(folders, imports), "flow": data_flow(), "files": file_tables(folders, imports)}
    for name, text in made.items():
        markdown = markdown.replace(f"<!-- architecture:{name} -->", text)
    return markdown


def layers() -> list[str]:
    """Return the folders of the package from the highest to the lowest; `errors.py` counts as one."""
    settings = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (names,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [name for name in names if name != "__main__"]


def folder_imports(folders: Iterable[str]) -> dict[str, set[str]]:
    """Return which folders each folder imports from, imports inside functions and for types included."""
    graph = grimp.build_graph(_PACKAGE, _CLI, cache_dir=None)
    imports: dict[str, set[str]] = {folder: set() for folder in folders}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            user, used = _folder_of(module), _folder_of(imported)
            if user != used and user in imports and used in imports:
                imports[user].add(used)
    return imports


def import_diagram(folders: list[str], imports: Mapping[str, set[str]]) -> str:
    """Draw the folders along a diagonal, with an arrow from each folder to every folder that it imports from.

    An arrow leaves its folder to the right and goes down to the folder that is used; a dot marks the turn.
    """
    place = {folder: (index * _PITCH, index * _ROW) for index, folder in enumerate(folders)}
    lines, dots, boxes = [], [], []
    for folder, (left, top) in place.items():
        center, middle = left + _WIDTH / 2, top + _HEIGHT / 2
        users = [place[user] for user in folders if folder in imports[user]]
        if users:
            lines.append(_line(center, users[0][1] + _HEIGHT / 2, center, top, arrow=True))
        if used := [place[other][0] for other in imports[folder]]:
            lines.append(_line(left + _WIDTH, middle, max(used) + _WIDTH / 2, middle))
        for other in sorted(imports[folder]):
            x = place[other][0] + _WIDTH / 2
            dots.append(f'<circle cx="{x}" cy="{middle}" r="4.5"><title>{folder} imports {other}</title></circle>')
        boxes.append(f'<a href="#{folder}">{_box(left, top, _WIDTH, _HEIGHT)}{_text(center, middle, folder)}</a>')
    width, height = (len(folders) - 1) * _PITCH + _WIDTH, (len(folders) - 1) * _ROW + _HEIGHT
    return _svg((width, height), 17, "The folders and which of them import from which", *lines, *dots, *boxes)


def data_flow() -> str:
    """Draw the data from the model to the saved folder, with the type of each and what makes it.

    Raises:
        LookupError: A type or function that the diagram names is not in the code.
    """
    shapes = []
    for index, (name, kind, maker) in enumerate(_FLOW):
        top = index * _FLOW_ROW
        for reference in (kind, maker):
            _check_defined(reference)
        label = name if kind is None else f"{name}: {kind.rpartition('.')[2]}"
        center = _FLOW_WIDTH / 2
        shapes += [_box(0, top, _FLOW_WIDTH, _FLOW_HEIGHT), _text(center, top + _FLOW_HEIGHT / 2, label)]
        if maker is not None:
            folder, file, function = maker.split(".")
            gap = top - _FLOW_ROW + _FLOW_HEIGHT
            shapes.append(_line(center, gap, center, top, arrow=True))
            text = f"{function}, in {folder}/{file}.py"
            shapes.append(_text(center + 16, (gap + top) / 2, text, anchor="start"))
    height = (len(_FLOW) - 1) * _FLOW_ROW + _FLOW_HEIGHT
    return _svg((640, height), 15, "The data from the model to the saved folder", *shapes)


def file_tables(folders: Iterable[str], imports: Mapping[str, set[str]]) -> str:
    """Return a section for each folder: its purpose, the folders it imports from, and a row for each of its files."""
    order = list(folders)
    sections = []
    for folder in order:
        if folder == "errors":
            sections.append(f"### `errors` {{ #errors }}\n\n{_purpose(_ROOT / _PACKAGE / 'errors.py')}\n")
            continue
        path = _ROOT / _CLI if folder == _CLI else _ROOT / _PACKAGE / folder
        used = ", ".join(f"[`{other}`](#{other})" for other in order if other in imports[folder]) or "no other folder"
        files = [file for file in sorted(path.glob("*.py")) if file.name != "__init__.py"]
        rows = [f"| `{file.name}` | {_purpose(file)} |" for file in files]
        sections.append(
            f"### `{folder}` {{ #{folder} }}\n\n{_purpose(path / '__init__.py')}\n\nImports from: {used}.\n\n"
            "| file | what it is for |\n|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(sections)


def _folder_of(module: str) -> str:
    """Return the folder of a module, such as "graph" for "batude_fx.graph.sites"."""
    package, *parts = module.split(".")
    return parts[0] if package == _PACKAGE and parts else package


def _purpose(file: Path) -> str:
    """Return the first line of the docstring of a file."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("|", "\\|")


def _check_defined(reference: str | None) -> None:
    """Refuse a reference such as "graph.sites.ConvSite" to something that the code does not define."""
    if reference is None:
        return
    folder, file, name = reference.split(".")
    tree = ast.parse((_ROOT / _PACKAGE / folder / f"{file}.py").read_text(encoding="utf-8"))
    if name not in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}:
        raise LookupError(f"docs/hooks/architecture.py draws {reference}, which is not in the code.")


def _svg(size: tuple[int, int], font: int, title: str, *shapes: str) -> str:
    """Return an inline SVG; docs/stylesheets/extra.css gives it the colours of the page, in light and dark mode."""
    width, height = size
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    return (
        f'<div class="diagram"><svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {width + 4} {height + 4}" '
        f'font-size="{font}" role="img" aria-label="{escape(title)}">{marker}{"".join(shapes)}</svg></div>'
    )


def _box(left: float, top: float, width: float, height: float) -> str:
    return f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="5"/>'


def _line(x1: float, y1: float, x2: float, y2: float, *, arrow: bool = False) -> str:
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"{end}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" dominant-baseline="central">{escape(text)}</text>'
