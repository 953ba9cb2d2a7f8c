"""Recipes: what to train, on what, under which budget and for how long, as YAML checked by frozen pydantic models.

A recipe holds names and numbers only: models, datasets, optimizers and schedules are looked up in the registries of
timm and torchvision; YAML tags and aliases are refused, so that reading one executes nothing. Everything that is wrong
with a recipe is said in one line with file, line and key, before anything is trained.
"""

import difflib
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError

from batude_fx.errors import RecipeError, first_line

_ALTERNATIVES = {("bool",), ("int",), ("float",), ("str",)}  # pydantic's ends of keys where a value may be any of these
Key = tuple[str | int, ...]


class RecipeFile:
    """A YAML file as plain values, and the line that each of them stands on.

    Args:
        path: The file.
        schema: The pydantic model that its values are for; problems name its keys.
    """

    def __init__(self, path: Path, schema: type[BaseModel]) -> None:
        self.path = path
        self.schema = schema
        self.value: Any = {}
        self.lines: dict[Key, str] = {}

    @classmethod
    def read(cls, path: Path, schema: type[BaseModel]) -> Self:
        """Read a file.

        Raises:
            RecipeError: When it is no YAML of plain values, or gives a key twice; with file and line.
        """
        document = cls(path, schema)
        try:
            root = _NoAliases(path.read_text(encoding="utf-8")).get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: no YAML: {error.problem}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}:1: no YAML text: {first_line(error)}.") from None
        if not isinstance(root, yaml.MappingNode):
            found = "the file is empty" if root is None else "no sections were found"
            raise RecipeError(f"{path}:1: {found}; expected the sections {', '.join(schema.model_fields)}.")
        document.value = document._plain(root, ())
        return document

    def _plain(self, node: yaml.Node, key: Key) -> Any:  # noqa: ANN401 - whatever stands there
        line = node.start_mark.line + 1
        self.lines.setdefault(key, f"{self.path}:{line}")
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            name = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise RecipeError(f"{self.path}:{line}: {_dotted(key)}: YAML tag {name} is refused; expected plain values.")
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*key, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            plain = isinstance(node, yaml.ScalarNode) and node.style is None
            return _plain_value(node.value) if plain else node.value
        values: dict[str, Any] = {}
        for name, item in node.value:
            inner = (*key, str(name.value))
            line = name.start_mark.line + 1
            if name.value in values:
                first = self.lines[inner].rpartition(":")[2]
                raise RecipeError(
                    f"{self.path}:{line}: {_dotted(inner)}: duplicate key, first on line {first}; expected it once."
                )
            self.lines[inner] = f"{self.path}:{line}"
            values[name.value] = self._plain(item, inner)
        return values

    def override(self, text: str) -> None:
        """Put `a.b=value` in its place."""
        dotted, equals, value = text.partition("=")
        *parents, last = keys = dotted.strip().split(".")
        if not equals:
            raise RecipeError(f"--set {text}: expected KEY=VALUE, such as one_shot.epochs=2.")
        target = self.value
        for depth, name in enumerate(parents):
            known = target.get(name)
            if known is not None and not isinstance(known, dict):
                section = ".".join(keys[: depth + 1])
                raise RecipeError(
                    f"--set {text}: {section} is {known!r}, which has no {keys[depth + 1]}; expected the whole of it, "
                    f"such as --set '{section}={{flops: 0.5, params: 0.9}}'."
                )
            if known is None:
                target[name] = {}
                self.lines.setdefault(tuple(keys[: depth + 1]), f"--set {text}")
            target = target[name]
        try:
            target[last] = _plain_value(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {text}: {dotted}: the value is no YAML: {first_line(error)}.") from None
        self.lines = {key: line for key, line in self.lines.items() if key[: len(keys)] != tuple(keys)}
        self.lines[tuple(keys)] = f"--set {text}"

    def error(self, error: ValidationError) -> RecipeError:
        """One line per problem: where, what was found, what was expected."""
        problems: dict[Key, Any] = {}
        for one in error.errors(include_url=False):
            key = tuple(one["loc"])
            problems.setdefault(key[:-1] if key[-1:] in _ALTERNATIVES else key, one)
        return RecipeError(
            "\n".join(str(self.problem(key, _explained(one, key, self.schema))) for key, one in problems.items())
        )

    def problem(self, key: Key, text: str) -> RecipeError:
        """A problem at a key, or at the nearest one above it that the file has."""
        near = next(key[:end] for end in range(len(key), -1, -1) if key[:end] in self.lines)
        return RecipeError(f"{self.lines[near]}: {_dotted(key)}: {text.rstrip('.')}.")


def _explained(problem: Any, key: Key, schema: type[BaseModel]) -> str:  # noqa: ANN401 - pydantic's ErrorDetails, of which newer versions have more
    if problem["type"] == "extra_forbidden":
        known = list(_section(key[:-1], schema).model_fields)
        close = difflib.get_close_matches(str(key[-1]), known, n=1)
        return f"unknown key; expected {close[0] if close else 'one of ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return "missing; it has no default"
    if problem["loc"][-1:] in _ALTERNATIVES:
        return f"found {problem['input']!r}; it should be true, false, a number, text or null"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return str(message)
    return f"found {problem['input']!r}; {message[0].lower()}{message[1:].replace('Input should', 'it should')}"


def _section(key: Key, schema: type[BaseModel]) -> type[BaseModel]:
    """The model of the section at a key."""
    section = schema
    for name in key:
        annotation = section.model_fields[str(name)].annotation
        options = (annotation, *getattr(annotation, "__args__", ()))
        section = next(one for one in options if isinstance(one, type) and issubclass(one, BaseModel))
    return section


def _plain_value(text: str) -> Any:  # noqa: ANN401 - whatever stands there
    return _NoAliases(text).get_single_data()


def _dotted(key: Key) -> str:
    return ".".join(map(str, key)) or "recipe"


class _NoAliases(yaml.SafeLoader):
    """Aliases save a few lines, and let ten of them stand for gigabytes. A date is a name, of a folder say."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as yaml declares it
        first: [one for one in resolvers if one[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - yaml's own
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are refused; write the value again", problem_mark=mark)
        return super().compose_node(parent, index)
