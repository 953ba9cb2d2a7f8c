"""Files, and groups of files, that are replaced completely or not at all, whenever the process is killed.

What takes the place of a file is on the disk before it does, so that a power failure leaves the old file or the new
one. The temporary files of a process that was killed are removed when the same file is written again.
"""

import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout

_HOST = re.sub(r"\W", "-", platform.node())[:40] or "localhost"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)@(?P<host>[\w-]+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_PENDING = ".pending"
_LOCK, _OWNER = ".lock", ".lock-owner"
_IN_USE: set[Path] = set()  # the temporary files of this process; an earlier one may have had the same number

ResultT = TypeVar("ResultT")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` if the block raises no error.

    Other processes therefore see the old file or the new one, never a part of it. The file keeps the permissions of
    any new file, where safetensors would let only the owner read it. Where a killed process has left the newest files
    of the folder in `.pending`, the file joins them, and moves on with them.
    """
    path = newest(path.parent) / path.name
    _sweep(path)
    with _temporary(path) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def move(source: Path, path: Path) -> None:
    """Replace a file by one that was written to a temporary folder on the same disk."""
    _sync(source)
    source.replace(path)
    _sync(path.parent)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder beside a file, on the same disk, so that what is written there can be moved to its place."""
    _sweep(path)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def atomic_files(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder whose files replace several files of `folder` all at once, if the block raises no error.

    The new files are moved to the subfolder `.pending` in one step. From then on they are what `newest` returns; a
    process that is killed before they have reached their places leaves them there, and the next one moves them on.

    Args:
        folder: The folder; it is created where it is missing.
        names: Names of the files to replace. Those that the block does not write are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        _sweep(folder / name)
    _move_pending(folder, names)
    with temporary_folder(folder / _PENDING) as temporary:
        yield temporary
        _sync(temporary)
        temporary.rename(folder / _PENDING)
    _sync(folder)
    _move_pending(folder, names)


def newest(folder: Path) -> Path:
    """Return the folder that holds the newest complete files of a folder that `atomic_files` writes to."""
    pending = folder / _PENDING
    return pending if pending.is_dir() else folder


def read_newest(folder: Path, read: Callable[[Path], ResultT]) -> ResultT:
    """Return what a function reads from the newest complete files of a folder, all of them from the same writing.

    Another process or thread may replace them meanwhile; then they are read again.

    Args:
        folder: The folder, which `atomic_files` writes to.
        read: Reads files; its argument is the folder that holds them. Its errors are raised if the files stayed.
    """
    while True:
        before = _version(folder)
        try:
            result = read(before[0])
        except Exception:
            if _version(folder) == before:
                raise
        else:
            if _version(folder) == before:
                return result


def _version(folder: Path) -> tuple[Path, frozenset[tuple[str, int, int]]]:
    """Return the folder of the newest files, and for each of them what is another when it is replaced."""
    place = newest(folder)
    with suppress(FileNotFoundError):  # where they are moved at this moment
        files = {entry.name: entry.stat() for entry in visible_entries(place)}
        return place, frozenset((name, file.st_ino, file.st_mtime_ns) for name, file in files.items())
    return place, frozenset()


def _move_pending(folder: Path, names: Collection[str]) -> None:
    """Bring the files of the subfolder `.pending` to their places; they stay complete there until all have arrived."""
    pending = folder / _PENDING
    if not pending.is_dir():
        return
    new = [entry for entry in visible_entries(pending) if entry.is_file()]
    for file in new:
        _replace_by_copy(file, folder / file.name)
    for name in set(names) - {file.name for file in new}:
        (folder / name).unlink(missing_ok=True)
    _sync(folder)
    with temporary_folder(pending) as temporary:
        pending.rename(temporary / _PENDING)


def _replace_by_copy(source: Path, path: Path) -> None:
    """Replace a file by another one, which stays where it is."""
    with _temporary(path) as temporary:
        try:
            temporary.hardlink_to(source)
        except OSError:  # a file system without hard links
            shutil.copy(source, temporary)
            _sync(temporary)
        temporary.replace(path)  # which leaves both where they are links to the same file


def visible_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder without temporary files and locks, which a killed process may have left.

    A folder that does not exist has no entries.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    return [path for path in entries if not (_TEMPORARY.fullmatch(path.name) or path.name in {_LOCK, _OWNER})]


def check_writable(folder: Path) -> None:
    """Write into a folder or, while it does not exist, into the nearest one above it, before anything is computed.

    Raises:
        OSError: When that fails; the disk may be full, or the folder a file.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    probe = nearest / "probe"  # only a temporary file of this name is written, which the next process sweeps up
    _sweep(probe)
    with _temporary(probe) as temporary:
        temporary.write_bytes(b"\0")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes, and other threads, from working in a folder for a while.

    Raises:
        BlockingIOError: When one is working there; with the process and its host.
    """
    lock, owner = FileLock(folder / _LOCK, timeout=0), folder / _OWNER
    try:
        lock.acquire()
    except Timeout:
        holder = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise BlockingIOError(holder) from None
    try:
        write_text(owner, f"process {os.getpid()} on {_HOST}")
        yield
    finally:
        for file in (owner, folder / _LOCK):  # while the lock is held, so that nobody loses a lock of his own
            with suppress(OSError):
                file.unlink()
        lock.release()


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a path for a temporary file or folder, and remove what is there when the block ends."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{_HOST}.{uuid4().hex[:8]}.tmp")
    _IN_USE.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _IN_USE.discard(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes of this machine that no longer run have left of earlier attempts to write a file."""
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and match["name"] == path.name and match["host"] == _HOST and not _is_in_use(entry, match["process"]):
            _remove(entry)


def _is_in_use(temporary: Path, process: str) -> bool:
    """Return whether a process that runs is writing a temporary file; True where another process has its number."""
    return temporary in _IN_USE if int(process) == os.getpid() else _is_running(int(process))


def _is_running(process: int) -> bool:
    """Return whether a process of this machine is running; True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to somebody else
        return True
    return True


def _sync(path: Path) -> None:
    """Wait until a file, or the list of the files in a folder, is on the disk."""
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext():  # not all systems can do that with folders
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
