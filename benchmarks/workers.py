"""What worker processes of benchmarks share."""

import os
from multiprocessing import parent_process
from threading import Thread


def follow_parent() -> None:
    """End this worker when its parent ends: it must not compute on for a benchmark that was killed."""
    Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
