"""Ctrl-C and SIGTERM during training: the step that is under way is finished, and a checkpoint is written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether the user, or the machine's scheduler, has asked the run to stop.

    Attributes:
        received: Whether this process was asked.
    """

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals for a block; a second one stops the process at once, as signals do outside the block.

        In threads other than the main one, Python receives no signals, and nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}

        def note(_number: int, _frame: FrameType | None) -> None:
            self.received = True
            for number, handler in handlers.items():
                signal.signal(number, handler)

        for number in _SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def ignore_signals() -> None:
    """Let a process that loads images run on; it ends with the process that it loads them for."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
