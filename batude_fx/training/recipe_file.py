"""A YAML file that remembers the line of each value, so that errors name file, line and key.

Tags and aliases are refused, so that reading a file executes nothing and cannot grow beyond the size of the file. Its
size and its depth have limits, since Python's stack has one.
"""

import difflib
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError

from batude_fx.errors import RecipeError, first_line

# The last part of pydantic's location of an error where a value may have any of these types.
_ALTERNATIVES = {("bool",), ("int",), ("float",), ("str",)}
Key = tuple[str | int, ...]
_MOST_BYTES = 2**20
_MOST_LEVELS = 20
_MOST_PROBLEMS = 20  # in one message
_SHOWN = 80  # characters of a wrong value


class RecipeFile:
    """The plain values of a YAML file, and the place where each of them is written.

    Args:
        path: The file.
        schema: The pydantic model that the values are for; error messages name its fields.

    Attributes:
        values: Sections, keys and values, as YAML nests them.
        places: Key to "FILE:LINE", or to "--set KEY=VALUE" where an override gave the value.
    """

    def __init__(self, path: Path, schema: type[BaseModel]) -> None:
        self.path = path
        self.schema = schema
        self.values: dict[str, Any] = {}
        self.places: dict[Key, str] = {}

    @classmethod
    def read(cls, path: Path, schema: type[BaseModel]) -> Self:
        """Read a file.

        Raises:
            RecipeError: When it is not YAML of plain values, or gives a key twice; with file and line.
        """
        document = cls(path, schema)
        try:
            if (size := path.stat().st_size) > _MOST_BYTES:
                raise RecipeError(f"{path}:1: the file has {size} bytes; expected a recipe of at most {_MOST_BYTES}.")
            root = _PlainLoader(path.read_text(encoding="utf-8")).get_single_node()
        except OSError as error:
            raise RecipeError(f"{path}:1: the file cannot be read: {error.strerror}.") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}:1: not YAML text: {first_line(error)}.") from None
        if not isinstance(root, yaml.MappingNode):
            problem = "the file is empty" if root is None else "the file has no sections"
            raise RecipeError(f"{path}:1: {problem}; expected the sections {', '.join(schema.model_fields)}.")
        document.values = document._plain(root, ())
        return document

    def _plain(self, node: yaml.Node, key: Key) -> Any:  # noqa: ANN401 - any plain value
        """Return the value of a node of YAML's syntax tree, and remember the places of all values in it."""
        line = node.start_mark.line + 1
        self.places.setdefault(key, f"{self.path}:{line}")
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            name = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise RecipeError(f"{self.path}:{line}: {_dotted(key)}: YAML tag {name} is refused; expected plain values.")
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*key, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        is_unquoted = isinstance(node, yaml.ScalarNode) and node.style is None
        try:
            return _parse_value(node.value) if is_unquoted else node.value
        except (yaml.YAMLError, ValueError):  # a number of thousands of digits, or 0x without any
            raise RecipeError(f"{self.path}:{line}: {_dotted(key)}: {_shown(node.value)} is no number.") from None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        """Return the values of a mapping; PyYAML would silently keep the last of two equal keys."""
        values: dict[str, Any] = {}
        for name, item in node.value:
            if not isinstance(name, yaml.ScalarNode):
                line = name.start_mark.line + 1
                raise RecipeError(
                    f"{self.path}:{line}: {_dotted(key)}: a key is no text; expected the name of a setting."
                )
            inner = (*key, str(name.value))
            place = f"{self.path}:{name.start_mark.line + 1}"
            if name.value in values:
                first = self.places[inner].rpartition(":")[2]
                raise RecipeError(f"{place}: {_dotted(inner)}: duplicate key, first on line {first}; expected it once.")
            self.places[inner] = place
            values[name.value] = self._plain(item, inner)
        return values

    def override(self, text: str) -> None:
        """Set the value that "a.b=value" gives, over that of the file.

        Raises:
            RecipeError: When the text has another form, or a part of the key is not a section.
        """
        dotted, equals, value = text.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals:
            raise RecipeError(f"--set {text}: expected KEY=VALUE, such as one_shot.epochs=2.")
        section = self._section_to_override(keys, text)
        try:
            section[keys[-1]] = _parse_value(value)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(
                f"--set {text[:_SHOWN]}: {dotted[:_SHOWN]}: the value is not YAML: {first_line(error)}."
            ) from None
        self.places = {key: place for key, place in self.places.items() if key[: len(keys)] != keys}
        self.places[keys] = f"--set {text}"

    def _section_to_override(self, keys: tuple[str, ...], text: str) -> dict[str, Any]:
        """Return the section that holds the last of the keys; sections that the file lacks are added."""
        section = self.values
        for depth, name in enumerate(keys[:-1], start=1):
            value = section.get(name)
            if value is None:
                value = section[name] = {}
                self.places.setdefault(keys[:depth], f"--set {text}")
            elif not isinstance(value, dict):
                parent = ".".join(keys[:depth])
                raise RecipeError(
                    f"--set {text}: {parent} is {value!r}, which has no {keys[depth]}; expected the whole of it, "
                    f"such as --set '{parent}={{flops: 0.5, params: 0.9}}'."
                )
            section = value
        return section

    def validation_error(self, error: ValidationError) -> RecipeError:
        """Return pydantic's error as ours, with a line per problem: its place, its key, and what was expected."""
        problems: dict[Key, Any] = {}
        for details in error.errors(include_url=False):
            key = tuple(details["loc"])
            problems.setdefault(key[:-1] if key[-1:] in _ALTERNATIVES else key, details)
        shown = list(problems.items())[:_MOST_PROBLEMS]
        lines = [str(self.problem(key, _explain(details, key, self.schema))) for key, details in shown]
        if more := len(problems) - len(shown):
            lines.append(f"{self.path}: and {more} more problems.")
        return RecipeError("\n".join(lines))

    def problem(self, key: Key, text: str) -> RecipeError:
        """Return the error of a key, with its place, or that of the nearest section above it that was written.

        The place of a section is followed by the overrides in it, as its mistake may be theirs.
        """
        nearest = next(key[:end] for end in range(len(key), -1, -1) if key[:end] in self.places)
        inside = (place for inner, place in self.places.items() if key and inner[: len(key)] == key)
        overrides = (place for place in inside if place.startswith("--set "))
        places = ", ".join(dict.fromkeys((self.places[nearest], *overrides)))
        return RecipeError(f"{places}: {_dotted(key)}: {text.rstrip('.')}.")


def _explain(details: Any, key: Key, schema: type[BaseModel]) -> str:  # noqa: ANN401 - pydantic's ErrorDetails, of which newer versions have more
    """Return what is wrong in words of recipes: known keys, the value that was given, what it should be."""
    if details["type"] == "extra_forbidden":
        names = list(_section_model(key[:-1], schema).model_fields)
        close_names = difflib.get_close_matches(str(key[-1]), names, n=1)
        return f"unknown key; expected {close_names[0] if close_names else 'one of ' + ', '.join(names)}"
    if details["type"] == "missing":
        return "missing; it has no default"
    if details["loc"][-1:] in _ALTERNATIVES:
        return f"found {_shown(details['input'])}; it should be true, false, a number, text or null"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return str(message)
    return f"found {_shown(details['input'])}; {message[0].lower()}{message[1:].replace('Input should', 'it should')}"


def _section_model(key: Key, schema: type[BaseModel]) -> type[BaseModel]:
    """Return the pydantic model of the section at a key."""
    section = schema
    for name in key:
        annotation = section.model_fields[str(name)].annotation
        types = (annotation, *getattr(annotation, "__args__", ()))  # `Section | None` has both as arguments
        section = next(item for item in types if isinstance(item, type) and issubclass(item, BaseModel))
    return section


def _parse_value(text: str) -> Any:  # noqa: ANN401 - any plain value
    return _PlainLoader(text).get_single_data()


def _dotted(key: Key) -> str:
    return ".".join(str(part)[:_SHOWN] for part in key) or "recipe"


def _shown(value: object) -> str:
    """Return a value as messages quote it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, without dates and without deep nesting.

    Ten nested aliases can stand for gigabytes. A date such as 2024-01-15 stays text, as it may name a folder.
    """

    _level = 0

    yaml_implicit_resolvers = {  # noqa: RUF012 - as yaml declares it
        first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - yaml's own
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are refused; write the value again", problem_mark=mark)
        if self._level >= _MOST_LEVELS:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"more than {_MOST_LEVELS} levels deep", problem_mark=mark)
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1
