"""One case in a worker process: its files are written, then read in every way, watched, timed and weighed."""

import gc
import os
import random
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

import batude_fx
from batude_fx.errors import BatudeError
from benchmarks.workers import follow_parent
from tests.fuzz.cases import BASES, KINDS, recipe_of_the_run
from tests.fuzz.watch import Watch

SECONDS, BYTES = 5.0, 2 * 2**30
_MOST_BYTES = 7 * 2**30  # beyond this, allocations fail; more than BYTES, so that who asks for more is seen
SUCCESS, REFUSED, FOREIGN = "success", "BatudeError", "refused by timm"
_PACKAGE = str(Path(batude_fx.__file__).parent)


@dataclass(frozen=True)
class Case:
    """A case, which its three attributes determine.

    Attributes:
        kind: A key of `KINDS`.
        seed: Seed of the whole run.
        index: Number of the case within its kind.
    """

    kind: str
    seed: int
    index: int

    def __str__(self) -> str:
        """Return the options that run this case alone."""
        return f"--seed {self.seed} --kind '{self.kind}' --case {self.index}"

    def write(self, folder: Path) -> None:
        """Write the files of the case into an empty folder."""
        generator = random.Random(f"{self.seed}/{self.kind}/{self.index}")
        KINDS[self.kind].write(generator, Path(os.environ[BASES]), folder)


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        results: Name of the reading to its result: `SUCCESS`, `REFUSED` or `FOREIGN`.
        seconds: Processor time of the slowest reading; other programs share the machine, and its wall time with them.
        wall_seconds: Wall time of the slowest reading.
        bytes: Largest growth of the memory over a reading.
        failures: What fell short, one text each.
    """

    results: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    wall_seconds: float = 0.0
    bytes: int = 0
    failures: list[str] = field(default_factory=list)


@cache
def _watch() -> Watch:
    return Watch()


def prepare() -> None:
    """Set up a worker: one thread, limits, and everything imported and cached that valid files need."""
    follow_parent()
    os.environ["MPLBACKEND"] = "agg"
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    recipe_of_the_run()
    for kind in KINDS:
        for index in range(-3, 0):
            run(Case(kind, 0, index))
    gc.collect()
    gc.freeze()  # the libraries stay, and searching them before each case would take most of the time


def run(case: Case) -> Outcome:
    """Read the files of a case in every way, those that write into the folder last."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(dir=Path(os.environ[BASES]).parent / "cases") as place:
        folder = Path(place).resolve()
        case.write(folder)
        os.chdir(folder)
        for name in KINDS[case.kind].readings:
            _read(case, name, folder, outcome)
        os.chdir("/")
    return outcome


def _read(case: Case, name: str, folder: Path, outcome: Outcome) -> None:
    gc.collect()
    before, failure = _reset_peak(), ""
    start, wall_start = time.process_time(), time.perf_counter()
    with _watch().over(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            KINDS[case.kind].readings[name](folder)
            result = SUCCESS
        except BatudeError:
            result = REFUSED
        except BaseException as error:  # noqa: BLE001 - whatever it is, it falls short
            result = FOREIGN if name == "timm" and not _is_in_package(error) else type(error).__name__
            failure = "" if result == FOREIGN else "".join(traceback.format_exception(error))[-3000:]
    seconds, growth = time.process_time() - start, _peak() - before
    wall_seconds = time.perf_counter() - wall_start
    outcome.results[name] = result
    outcome.seconds, outcome.bytes = max(outcome.seconds, seconds), max(outcome.bytes, growth)
    outcome.wall_seconds = max(outcome.wall_seconds, wall_seconds)
    if seconds > SECONDS:
        failure += f"\n{seconds:.1f} s"
    if growth > BYTES:
        failure += f"\n{growth / 2**30:.1f} GiB"
    # What timm does with a config that names another package is none of our business.
    for violation in [] if result == FOREIGN else _watch().violations:
        failure += f"\n{violation}"
    if failure:
        outcome.failures.append(f"{name}: {failure.strip()}")


def _is_in_package(error: BaseException) -> bool:
    """Return whether a file of batude_fx raised an error, or called what raised it."""
    return any(frame.filename.startswith(_PACKAGE) for frame in traceback.extract_tb(error.__traceback__))


def _reset_peak() -> int:
    """Return the bytes of this process's memory, and measure its peak from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def clean(place: Path) -> Path:
    """Return a folder that exists and is empty."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place
