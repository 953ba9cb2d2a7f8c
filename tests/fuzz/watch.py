"""An audit hook that notes what reading a file must never do: other files, processes, sockets, code from the file.

Source: the table of audit events in Python's documentation, https://docs.python.org/3/library/audit_events.html. What
compiled libraries do by themselves, as safetensors does when it opens a file, raises no audit event.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

MARKER = "fuzz_marker_7f3a"
"""A word in all hostile texts: where Python is asked to compile or import it, a file's content is being executed."""

_REPOSITORY = Path(__file__).parents[2]
_READABLE = (
    *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, mpl.get_cachedir(), mpl.get_configdir(),
    *(str(_REPOSITORY / name) for name in ("batude_fx", "batude_fx_cli", "recipes", "tests")), "/proc", "/sys",
    "/dev/urandom", "/usr/share/fonts", "/usr/local/share/fonts", "/usr/lib", "/lib", "/etc/localtime",
)  # fmt: skip
_READABLE_REAL = tuple(os.path.realpath(path) for path in _READABLE)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
# Events whose first arguments are paths that are changed, and how many they are.
_CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2,
}  # fmt: skip
_FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.startfile", "pty.spawn",
    "socket.", "pickle.", "urllib.", "webbrowser.", "ftplib.", "smtplib.", "http.",
)  # fmt: skip
_HARMLESS = {"socket.gethostname"}
_WITH_SOURCE = {"compile", "exec", "import", "cpython.run_command"}


class Watch:
    """What was noted while a block ran; the hook itself stays installed, as Python removes none.

    Attributes:
        violations: One line for each forbidden event.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._folder: str | None = None
        sys.addaudithook(self._note)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Note all that happens in a block that may read and write one folder only."""
        self.violations, self._folder = [], os.path.realpath(folder)
        try:
            yield
        finally:
            self._folder = None

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        folder = self._folder
        if folder is None:
            return
        self._folder = None  # what this function does is not noted
        try:
            if complaint := _complaint(event, arguments, folder):
                self.violations.append(f"{event}: {complaint}"[:500])
        finally:
            self._folder = folder


def _complaint(event: str, arguments: tuple[Any, ...], folder: str) -> str | None:
    """Return what is wrong with an event; None if it is harmless."""
    if event == "open":
        path, mode, flags = arguments
        is_write = bool((flags or 0) & _WRITES) or any(letter in (mode or "") for letter in "wax+")
        return None if _is_allowed(path, folder, is_write=is_write) else f"{path!r} for {'wr' if is_write else 'read'}"
    if event in _CHANGES:
        paths = arguments[: _CHANGES[event]]
        return None if all(_is_allowed(path, folder, is_write=True) for path in paths) else repr(paths)
    if event == "ctypes.dlopen":
        return None if arguments[0] is None or _is_allowed(arguments[0], folder, is_write=False) else repr(arguments)
    if event in _WITH_SOURCE:
        return "the content of a file" if MARKER in _source(arguments[0]) else None
    return repr(arguments) if event.startswith(_FORBIDDEN) and event not in _HARMLESS else None


def _source(code: object) -> str:
    """Return the text of what is compiled, executed or imported."""
    if isinstance(code, bytes):
        return code.decode(errors="replace")
    if isinstance(code, str):
        return code
    return repr((getattr(code, "co_names", ()), getattr(code, "co_consts", ()), getattr(code, "co_filename", "")))


def _is_allowed(path: object, folder: str, *, is_write: bool) -> bool:
    if isinstance(path, int) or path == os.devnull:  # a descriptor, which was opened before
        return True
    real = os.path.realpath(os.fsdecode(path))
    if _is_below(real, folder):
        return True
    return not is_write and any(_is_below(real, place) for place in _READABLE_REAL)


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}{os.sep}")
