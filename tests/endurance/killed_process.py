"""Run a function in a forked process that kills itself by SIGKILL at its n-th change of the files in a folder.

Python's audit events tell of every change before it is made: opening a file for writing, renaming, linking, removing,
making a folder and so on; `os.fsync` is wrapped to be counted too. What libraries in C++ or Rust write themselves is
not seen, but they write into files and folders whose creation and renaming is.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGES = frozenset({
    "open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime",
})  # fmt: skip
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        killed: Whether it was killed at the event that it was to be killed at.
        events: Number of changes that a process made which was not killed.
        error: The traceback or the signal of a process that failed; empty otherwise.
    """

    killed: bool = False
    events: int = 0
    error: str = ""


def run_forked(work: Callable[[], object], folder: Path, kill_at: int | None = None) -> End:
    """Run a function in a fork of this process, whose output is discarded.

    Args:
        work: The function. What it does in memory is not seen by this process.
        folder: Changes of files in this folder are counted, at any depth.
        kill_at: The change before which the process is killed, counted from 1; None lets it run to its end.
    """
    receiver, sender = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(receiver)
        _be_the_child(work, folder.resolve(), kill_at, sender)
    os.close(sender)
    with open(receiver, encoding="utf-8") as pipe:  # noqa: PTH123 - a descriptor
        message = pipe.read()
    _, status = os.waitpid(process, 0)  # which is gone for good then: its temporary files may be swept up
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return End(events=int(message))
    if code == -signal.SIGKILL and kill_at is not None and not message:
        return End(killed=True)
    return End(error=message or f"ended with {code}")


def _be_the_child(work: Callable[[], object], folder: Path, kill_at: int | None, sender: int) -> None:
    """Do the work, tell the parent how it ended, and end without any of the parent's clean-up."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    counter = _Counter(folder, kill_at)
    sys.addaudithook(counter.hear)
    fsync = os.fsync

    def counted_fsync(fd: Any) -> None:
        counter.see(fd if isinstance(fd, int) else fd.fileno())
        fsync(fd)

    os.fsync = counted_fsync
    code = 1
    try:
        work()
        message, code = str(counter.events), 0
    except BaseException:  # noqa: BLE001 - the parent tells what it was
        message = traceback.format_exc()
    os.write(sender, message.encode()[-60_000:])  # a pipe takes that much at once
    os._exit(code)


class _Counter:
    """Count the changes of a folder, and kill this process before one of them."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self._folder, self._kill_at = str(folder), kill_at
        self.events = 0

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Receive an audit event of Python."""
        if event not in _CHANGES or (event == "open" and not (arguments[2] or 0) & _FOR_WRITING):
            return
        paths = arguments[:2] if event in {"os.rename", "os.link", "os.symlink"} else arguments[:1]
        descriptors = [item for item in arguments[len(paths) :] if isinstance(item, int) and item >= 0]
        base = descriptors[-1] if event in {"os.remove", "os.rmdir"} and descriptors else None
        self.see(*paths, base=base)

    def see(self, *files: Any, base: int | None = None) -> None:
        """Count one change, if it concerns the folder.

        Args:
            *files: Paths or descriptors of the files that are changed.
            base: The descriptor of the folder that paths are relative to; None for the working directory.
        """
        if any(self._is_inside(file, base) for file in files):
            self.events += 1
            if self.events == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def _is_inside(self, file: Any, base: int | None) -> bool:
        try:
            if isinstance(file, int):
                path = _path_of(file)
            elif base is None:
                path = os.path.abspath(os.fsdecode(file))  # noqa: PTH100 - Path is slower, and this is called often
            else:
                path = f"{_path_of(base)}/{os.fsdecode(file)}"
        except OSError:
            return False
        return path == self._folder or path.startswith(self._folder + os.sep)


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
