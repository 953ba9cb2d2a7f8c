"""The watch of `make fuzz` notes what it must, and a seed gives the same file again."""

import json
import os
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.image_files import image_file
from tests.fuzz.mutations import mutate_bytes, mutate_json
from tests.fuzz.watch import MARKER, Watch

_FORBIDDEN = {
    "a file for writing": ("open", ("/tmp/other", "w", os.O_WRONLY)),  # noqa: S108 - not opened
    "a file for reading": ("open", ("/etc/passwd", "r", os.O_RDONLY)),
    "a removed file": ("os.remove", ("/etc/passwd", -1)),
    "a file moved elsewhere": ("os.rename", ("config.json", "/etc/config.json", -1, -1)),
    "a program": ("subprocess.Popen", ("gs", ["gs"], None, None)),
    "a shell": ("os.system", (b"true",)),
    "a pickle": ("pickle.find_class", ("os", "system")),
    "a connection": ("socket.connect", (None, ("localhost", 80))),
    "code from a file": ("compile", (f"{MARKER}()".encode(), "<string>")),
    "a module from a file": ("import", (MARKER, None, None, None, None)),
    "a library": ("ctypes.dlopen", ("/tmp/library.so",)),  # noqa: S108 - not opened
}


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("name", _FORBIDDEN)
def test_what_reading_a_file_must_not_do_is_noted(name: str, watch: Watch, tmp_path: Path) -> None:
    event, arguments = _FORBIDDEN[name]
    with watch.over(tmp_path):
        sys.audit(event, *arguments)
    assert len(watch.violations) == 1
    assert watch.violations[0].startswith(event)
    sys.audit(event, *arguments)  # after the block
    assert len(watch.violations) == 1


def test_files_of_the_case_and_of_the_libraries_are_not_noted(watch: Watch, tmp_path: Path) -> None:
    with watch.over(tmp_path):
        (tmp_path / "x").write_text("x")
        (tmp_path / "x").replace(tmp_path / "y")
        (tmp_path / "y").unlink()
        Path(json.__file__).read_text(encoding="utf-8")
        exec(compile("1 + 1", "<string>", "exec"))  # noqa: S102 - as torch.fx and jinja2 do
    assert watch.violations == []


@pytest.mark.parametrize("seed", range(12))
def test_a_seed_gives_the_same_damage_again(seed: int) -> None:
    content = json.dumps({"a": [1, 2.5, None, {"b": "text"}], "c": {}}).encode()
    for make in (image_file, lambda random: mutate_json(content, random), lambda random: mutate_bytes(content, random)):
        assert make(Random(seed)) == make(Random(seed))
