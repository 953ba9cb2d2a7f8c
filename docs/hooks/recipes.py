"""mkdocs hook: a page for every recipe of the package, made from its YAML and from the pydantic models."""

import re
from collections.abc import Iterator
from html import escape
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from batude_fx.budget.budget import Budget
from batude_fx.training.recipe import Recipe, shipped


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site and to its navigation, under "Recipes"."""
    pages = {f"recipes/{name}.md": page(name, path.read_text(encoding="utf-8")) for name, path in shipped().items()}
    for address, content in pages.items():
        files.append(File.generated(config, address, content=content))
    section: list[Any] = next(entry["Recipes"] for entry in config.nav or [] if "Recipes" in entry)
    section += [address for address in pages if address not in section]
    return files


def page(name: str, text: str) -> str:
    """Return a recipe's page: its file, its measured result, and every field with type, default and meaning."""
    header = [line.removeprefix("#").strip() for line in text.split("\nmodel:", maxsplit=1)[0].splitlines()]
    title = header[0]
    measured = " ".join(header[index] for index in _measured(header))
    recipe = Recipe.from_yaml(name)
    return (
        f"---\ntitle: {name}\n---\n\n# {name}\n\n{title}\n\n**{measured}**\n\n"
        f"```sh\nbatude-fx train {name} --dry-run\nbatude-fx train {name}\n```\n\n"
        f'```yaml\n{text}```\n\n## Fields\n\nThe column "here" is the value in this recipe, or the default if the '
        "recipe does not set it. Change a field with `--set KEY=VALUE`.\n\n"
        "<table><thead><tr><th>key</th><th>type</th><th>default</th><th>here</th><th>meaning</th></tr></thead><tbody>\n"
        + "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in _fields(Recipe, recipe))
        + "\n</tbody></table>\n\n## Limitations\n\nThe figures hold only for the schedule, the seeds and the machine "
        "that the file names.\n"
    )


def _measured(header: list[str]) -> Iterator[int]:
    """Yield the indices of the line that begins with "Measured:" and of the lines that continue it."""
    inside = False
    for index, line in enumerate(header):
        starts = line.split(":")[0] in {"Source", "Command", "Schedule", "Measured"}
        inside = line.startswith("Measured:") if starts else inside
        if inside:
            yield index


def _fields(section: type[BaseModel], values: BaseModel | None, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Yield a row for each field of a section; `values` is None for a section that the recipe leaves out."""
    for key, field in section.model_fields.items():
        value = values and getattr(values, key)
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)]
        if inner:
            yield from _fields(inner[0], value, f"{prefix}{key}.")
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        text = "required" if default is PydanticUndefined else str(default)
        cells = (f"{prefix}{key}", _kind(field.annotation), text, str(value) if values else "left out")
        yield (*(f"<code>{escape(cell)}</code>" for cell in cells), escape(field.description or ""))


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not Budget


def _kind(annotation: object) -> str:
    if annotation is Any:
        return "length"
    name = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"\b(?:typing|pathlib|batude_fx(?:\.\w+)*)\.(?=\w)|<class '|'>", "", name)
