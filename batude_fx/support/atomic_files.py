"""Files that are written completely or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` if the block raises no error.

    Other processes therefore see the old file or the new one, never a part of it. The file keeps the permissions of
    any new file, where safetensors would let only the owner read it.
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
    """Return the entries of a folder without the temporary files of processes that were killed inside `atomic_file`.

    A folder that does not exist has no entries.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    return [path for path in entries if not (path.name.startswith(".") and path.suffix == _SUFFIX)]
