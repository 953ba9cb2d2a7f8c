"""Files that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside the path that takes its place if all goes well: a reader sees the old file or the new one.

    It gets the permissions of any new file; safetensors would let nobody but the owner read.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{_SUFFIX}")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def visible_entries(folder: Path) -> list[Path]:
    """What a folder holds, but for what a process that was killed left of `replacing`; nothing where there is none."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if not (path.name.startswith(".") and path.suffix == _SUFFIX)]
