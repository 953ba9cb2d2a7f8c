"""Set-up of the worker processes of benchmarks."""

import os
from multiprocessing import parent_process
from threading import Thread


def follow_parent() -> None:
    """End this worker when its parent ends, so that it does not continue after a benchmark was killed."""
    Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
