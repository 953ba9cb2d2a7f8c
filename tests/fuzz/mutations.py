"""Ways to damage bytes, text and JSON, all drawn from one random generator, so that a seed gives the file again."""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.watch import MARKER


class Raw(str):
    """Text that `dumps` writes as it is, such as a number that Python cannot hold."""

    __slots__ = ()


class Pairs(list[Any]):
    """A JSON object as a list of [key, value], in which a key may occur twice."""


NUMBERS = tuple(map(Raw, (
    "0", "-0", "-1", "1", "2", "3", "7", "63", "64", "1000", "65536", "100000", "2147483647", "2147483648",
    "4294967296", "9007199254740993", str(2**63 - 1), str(2**63), str(2**64), str(-(2**63)), "1" + "0" * 400,
    "9" * 5000, "1e308", "-1e308", "1e309", "1e-3", "1e-308", "5e-324", "0.5", "1.5", "-0.5", "0.1", "NaN", "Infinity",
    "-Infinity", "1e9", "1e15", "0.9999999999999999",
)))  # fmt: skip
_CODE = f"__import__('os').system('touch {MARKER}')"
TEXTS = (
    "", " ", "\0", "a" * 200, "x" * 100_000, "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\ud800", "é" * 1000,
    "/etc/passwd", f"../../{MARKER}", f"{MARKER}.pth", f"file:///tmp/{MARKER}", f"hf-hub:{MARKER}/x",
    f"local-dir:{MARKER}", f"http://localhost/{MARKER}.pth", _CODE, f"{{{{ {MARKER} }}}}", "{{ 7 * 7 }}", "😀" * 40,
    f"<script>{MARKER}()</script>", f"$(touch {MARKER})", f"`{MARKER}`", "$x_{1}^{2}$", r"$\frac{" + MARKER, "%s%n",
    "[bold]x[/bold]", "[/]", "a\nb\r\nc", "nan", "1", "-1", "True", "null", "layer1", "conv1", "fc", "0", ".", "..",
    "test_resnet", "resnet50", "os", "numpy.load", "1" * 5000, "1e999", "3 epochs", "2.5x", "100%", "float32", "BF16",
)  # fmt: skip
_DEPTHS = 3, 30, 500, 5000, 100_000


def parse(text: str) -> Any:
    """Return JSON with objects as `Pairs`."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def dumps(value: Any) -> str:
    """Return JSON of what `parse` returned, with whatever was put into it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dumps(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def mutate(value: Any, random: Random, times: int | None = None) -> Any:
    """Damage a parsed JSON document at a few random places, and return it."""
    root = [value]
    for _ in range(times or random.choice((1, 1, 1, 1, 2, 3, 8))):
        root = root or [None]
        container, index = _place(root, random)
        random.choices(_CHANGES, _WEIGHTS)[0](container, index, random)
    return root[0] if root else None


def _place(root: list[Any], random: Random) -> tuple[Any, int]:
    """Go down from the root by random steps; return a container and an index in it."""
    container: Any = root
    index = 0
    while True:
        child = _get(container, index)
        if not isinstance(child, list) or not child or random.random() < 0.15:
            return container, index
        container, index = child, random.randrange(len(child))


def _get(container: Any, index: int) -> Any:
    return container[index][1] if isinstance(container, Pairs) else container[index]


def _set(container: Any, index: int, value: Any) -> None:
    if isinstance(container, Pairs):
        container[index] = [container[index][0], value]
    else:
        container[index] = value


def hostile(random: Random) -> Any:
    """Return a value that does not belong where it is put."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 7:
        return random.choice(TEXTS)
    if kind == 7:
        return random.choice((None, True, False, [], Pairs(), [[]], [None] * 3, Pairs([["tensor", 0]])))
    depth = random.choice(_DEPTHS)
    if kind == 8:
        return Raw("[" * depth + "]" * depth) if random.random() < 0.5 else Raw('{"a":' * depth + "1" + "}" * depth)
    return [random.choice((1, 0.5, "x", None))] * random.choice((2, 5, 66, 1025, 30_000))


def _replace(container: Any, index: int, random: Random) -> None:
    _set(container, index, hostile(random))


def _tweak(container: Any, index: int, random: Random) -> None:
    """Change a number or a text a little, so that what comes out is often valid."""
    old = _get(container, index)
    if isinstance(old, bool) or old is None or isinstance(old, list | Raw):
        _replace(container, index, random)
    elif isinstance(old, int | float):
        change = random.choice((1, -1, old, 9 * old, 99 * old, -old / 2, -2 * old, 0.5, 1e-9, -old))
        _set(container, index, type(old)(old + change))
    else:
        text, at = str(old), random.randrange(len(str(old)) + 1)
        new = random.choice(("", "x", ".", "0", MARKER, "é", "\x1b"))
        _set(container, index, text[:at] + new + text[at + 1 :])


def _retype(container: Any, index: int, random: Random) -> None:
    old = _get(container, index)
    swaps: tuple[Callable[[], Any], ...] = (
        lambda: str(old), lambda: [old], lambda: Pairs([["a", old]]), lambda: old == 1, lambda: None,
        lambda: list(old) if isinstance(old, list) else old,
        lambda: Pairs([[str(number), item] for number, item in enumerate(old)]) if isinstance(old, list) else 1.5,
    )  # fmt: skip
    _set(container, index, random.choice(swaps)())


def _remove(container: Any, index: int, random: Random) -> None:
    if container:
        del container[index]


def _repeat(container: Any, index: int, random: Random) -> None:
    """Give a key or an item once more, or very often."""
    container.extend([container[index]] * random.choice((1, 1, 1, 2, 100, 6000)))


def _rename(container: Any, index: int, random: Random) -> None:
    if isinstance(container, Pairs):
        container[index] = [random.choice(TEXTS), container[index][1]]
    else:
        _replace(container, index, random)


def _add(container: Any, index: int, random: Random) -> None:
    new = hostile(random)
    container.insert(index, [random.choice(TEXTS), new] if isinstance(container, Pairs) else new)


def _swap(container: Any, index: int, random: Random) -> None:
    other = random.randrange(len(container))
    first, second = _get(container, index), _get(container, other)
    _set(container, index, second)
    _set(container, other, first)


_CHANGES = (_replace, _tweak, _retype, _remove, _repeat, _rename, _add, _swap)
_WEIGHTS = (6, 6, 3, 3, 2, 2, 2, 1)


def mutate_bytes(content: bytes, random: Random, start: int = 0) -> bytes:
    """Damage bytes from a position on: flip bits, cut, insert, overwrite, repeat."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5, 50))):
        at = random.randrange(start, max(start + 1, len(data))) if data else 0
        kind = random.randrange(7)
        if kind <= 1 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + random.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = random.randbytes(random.randrange(1, 64))
        elif kind == 5:
            data[at : at + 8] = random.choice((b"\0" * 8, b"\xff" * 8, struct.pack("<Q", random.getrandbits(63))))
        else:
            data[at:at] = data[at : at + random.randrange(1, 4096)]
    return bytes(data)


def mutate_json(content: bytes, random: Random) -> bytes:
    """Damage a file of JSON, in its structure four times out of five."""
    if random.random() < 0.2:
        return mutate_bytes(content, random)
    return dumps(mutate(parse(content.decode()), random)).encode("utf-8", "surrogatepass")


def mutate_safetensors(content: bytes, random: Random) -> bytes:
    """Damage a safetensors file: its length field, its header of JSON, its body, or any byte."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    kind = random.randrange(6)
    if kind == 0:
        return mutate_bytes(content, random)
    if kind == 1:
        return mutate_bytes(content, random, start=8 + length)
    if kind == 2:
        wrong = random.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, random.getrandbits(24)))
        return struct.pack("<Q", wrong) + header + body
    if kind == 3:
        return content + random.randbytes(random.choice((1, 7, 4096)))
    damaged = mutate_json(header, random)
    return struct.pack("<Q", len(damaged)) + damaged + body
