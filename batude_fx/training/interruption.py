"""Ctrl-C and SIGTERM during training: the step that is under way is finished, and a checkpoint is written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ACKNOWLEDGED = b"\nstopping after this step; once more to stop at once\n"


class Interruption:
    """Whether the user, or the machine's scheduler, has asked the run to stop.

    Args:
        signals: The signals that ask for it.

    Attributes:
        received: Whether this process was asked.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = _SIGNALS) -> None:
        self.signals, self.received = signals, False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals for a block; a second one stops the process at once, as signals do outside the block.

        In threads other than the main one, Python receives no signals, and nothing is changed. A signal that is ignored
        stays so, as in a process that was started with nohup.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in self.signals}
        handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

        def note(_number: int, _frame: FrameType | None) -> None:
            self.received = True
            for number, handler in handlers.items():
                signal.signal(number, handler)
            with suppress(OSError):  # nobody may read the error stream any more
                os.write(2, _ACKNOWLEDGED)  # print is not reentrant

        for number in handlers:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def outlive_first_signals() -> None:
    """Let a process that loads images run on when a whole group of processes is asked to stop.

    It ends with the process that it loads them for, which stops it by a SIGTERM of its own where it hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
