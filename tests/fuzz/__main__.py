"""Read thousands of damaged and hostile files: `make fuzz`, or `python -m tests.fuzz`.

None of them may end in anything but success or `BatudeError`, take over 5 s or 2 GiB, kill the process, or make it open
other files, start programs, use the network or execute what the file holds. The files of cases that do are kept in
`build/fuzz/failures`. A case is determined by the seed, its kind and its number: `--seed 5 --kind recipes --case 17`
runs one alone.
"""

import argparse
import os
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from random import Random

from pebble import ProcessPool
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.fuzz import bases, worker
from tests.fuzz.cases import BASES, KINDS
from tests.fuzz.worker import FOREIGN, REFUSED, SUCCESS, Case, Outcome

WORKERS = 2
CASES_PER_WORKER = 2000  # then the process is replaced, since networks leave caches behind
HANGING = 60  # seconds after which a worker is ended
ROOT = Path(__file__).parents[2]
FAILURES, VALID = ROOT / "build" / "fuzz" / "failures", ROOT / "build" / "fuzz" / "valid"


def main(seed: int, count: float, kinds: list[str], case: int | None) -> int:
    """Run the cases, print the table, and return the exit code."""
    console = Console(width=120, soft_wrap=True)
    console.print(f"seed {seed}; the same cases again: python -m tests.fuzz --seed {seed} --count {count:g}")
    start = time.monotonic()
    os.environ[BASES] = str(VALID)
    os.environ["OMP_NUM_THREADS"] = "1"
    with console.status("writing the valid files that are damaged"):
        bases.write_all(worker.clean(VALID))
        worker.clean(VALID.parent / "cases")  # a worker that is killed leaves its files there
    cases = [
        Case(kind, seed, index)
        for kind in kinds
        for index in ([case] if case is not None else range(max(1, round(count * KINDS[kind].count))))
    ]
    Random(seed).shuffle(cases)  # so that a run that is interrupted has tried some of each kind
    outcomes: dict[Case, Outcome] = {}
    with suppress(KeyboardInterrupt), _progress() as progress:
        bar = progress.add_task("", total=len(cases))
        for done, outcome in _outcomes(cases):
            progress.update(bar, advance=done not in outcomes, description=done.kind)
            outcomes[done] = outcome
            keep(done, outcome)
            if outcome.failures:
                progress.console.print(f"{done}\n" + "\n".join(outcome.failures), markup=False, highlight=False)
    console.print(table(outcomes, f"seed {seed}, {time.monotonic() - start:.0f} s"))
    failed = sum(bool(outcome.failures) for outcome in outcomes.values())
    console.print(f"{failed} of {len(outcomes)} cases fell short, {len(cases)} were asked for", highlight=False)
    return 1 if failed or len(outcomes) < len(cases) else 0


def _outcomes(cases: Iterable[Case]) -> Iterator[tuple[Case, Outcome]]:
    """Run cases in workers; those that fell short, once more and alone, as other programs share the machine."""
    again = []
    for case, outcome in _asked(cases, WORKERS):
        yield case, outcome
        if outcome.failures:
            again.append(case)
    if again:
        yield from _asked(again, 1)


def _asked(cases: Iterable[Case], workers: int) -> Iterator[tuple[Case, Outcome]]:
    with ProcessPool(workers, CASES_PER_WORKER, worker.prepare, context=get_context("spawn")) as pool, _stopping(pool):
        futures: dict[Future[Outcome], Case] = {}
        for case in cases:
            futures[pool.schedule(worker.run, (case,), timeout=HANGING)] = case
        for future in as_completed(futures):
            error = future.exception()
            failed = Outcome(failures=[f"the worker died or hung: {type(error).__name__}: {error}"])
            yield futures[future], future.result() if error is None else failed


@contextmanager
def _stopping(pool: ProcessPool) -> Iterator[None]:
    """End the workers at once when the run is interrupted; the pool alone would finish what it was asked for."""
    try:
        yield
    except BaseException:
        pool.stop()  # type: ignore[no-untyped-call]
        raise


def table(outcomes: dict[Case, Outcome], title: str) -> Table:
    """Return a table with a row per kind."""
    result = Table(title=title)
    for heading in ("kind", "cases", SUCCESS, REFUSED, FOREIGN, "fell short", "slowest", "by the clock", "most memory"):
        result.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind in KINDS:
        of_kind = [outcome for case, outcome in outcomes.items() if case.kind == kind]
        if of_kind:
            ends = Counter(_end(outcome) for outcome in of_kind)
            slowest = max(outcome.seconds for outcome in of_kind), max(outcome.wall_seconds for outcome in of_kind)
            mebibytes = max(outcome.bytes for outcome in of_kind) / 2**20
            numbers = [len(of_kind), *(ends[end] for end in (SUCCESS, REFUSED, FOREIGN, ""))]
            seconds = [f"{time:.1f} s" for time in slowest]
            result.add_row(kind, *(f"{number:,}" for number in numbers), *seconds, f"{mebibytes:,.0f} MiB")
    result.caption = (
        "A case is a success where every way of reading it is. In the others, timm refused a config.json before it "
        "asked batude_fx."
    )
    return result


def _end(outcome: Outcome) -> str:
    results = set(outcome.results.values())
    return "" if outcome.failures else next(end for end in (REFUSED, FOREIGN, SUCCESS) if end in results)


def keep(case: Case, outcome: Outcome) -> None:
    """Keep the files of a case that fell short, with what it ended in; drop them if it did not the second time."""
    place = FAILURES / f"{case.kind} {case.seed} {case.index}"
    if outcome.failures:
        case.write(worker.clean(place))
        (place / "FAILURE.txt").write_text("\n".join([str(case), *outcome.failures]), encoding="utf-8")
    elif place.is_dir():
        shutil.rmtree(place)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of all cases; by default drawn")
    parser.add_argument("--count", type=float, default=1, help="factor of the numbers of cases")
    parser.add_argument("--kind", dest="kinds", action="append", choices=list(KINDS), help="only this kind")
    parser.add_argument("--case", type=int, help="only the case of this number")
    options = parser.parse_args()
    sys.exit(main(options.seed, options.count, options.kinds or list(KINDS), options.case))
