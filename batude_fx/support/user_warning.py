"""Warnings that point at the caller's line, however deep inside the package they are found."""

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).parents[1]
_OWN = tuple(f"{folder}{os.sep}" for folder in (_PACKAGE, _PACKAGE.with_name("batude_fx_cli")))


def warn_user(text: str, category: type[UserWarning] = UserWarning) -> None:
    """Warn, and name the line outside the package from which it was called.

    Frames of other libraries, such as torch's decorators, may lie between those of the package. So the line is that
    before the first call of the package. `skip_file_prefixes`, which Python has from 3.12 on, stops at the last one.

    Warns:
        UserWarning: With the text, or of a category of it.
    """
    level = outermost = 1
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - inspect.stack reads the source of every frame
    while frame is not None:
        level += 1
        if frame.f_code.co_filename.startswith(_OWN):
            outermost = level
        frame = frame.f_back
    warnings.warn(text, category, stacklevel=outermost + 1)
