"""Sweep over every model of timm and torchvision: is every convolution found, is every family compressed correctly?

`make zoo` sweeps all models and writes `docs/data/zoo.json`, from which the zoo page of the site is made.
`make zoo-quick` sweeps the smallest model of each family and writes `build/zoo/quick.json`. An interrupted sweep
continues where it stopped: results are stored in `build/zoo/journal.jsonl` and are valid for the same versions of the
libraries. Tasks that failed are repeated.
"""

import argparse
import json
import os
import platform
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import zoo_checks
from benchmarks.workers import follow_parent
from benchmarks.zoo_checks import LARGEST, Record

WORKERS = 2
SECONDS = 120  # limit for the discovery of one model with weights
COMPRESS_SECONDS = 600
MEMORY = 11 * 2**30  # bytes of one worker, on a machine of 24 GiB
NO_MEMORY = ("allocate memory", "could not create a primitive")  # messages of torch and oneDNN, in a RuntimeError
TASKS_PER_WORKER = 40  # then the process is replaced, since models leave caches behind

ROOT = Path(__file__).parents[1]
JOURNAL = ROOT / "build" / "zoo" / "journal.jsonl"
RESULT = ROOT / "docs" / "data" / "zoo.json"
QUICK_RESULT = ROOT / "build" / "zoo" / "quick.json"

Task = tuple[str, str]  # the kind of task, and the model


def main(*, quick: bool) -> int:
    """Run the tasks that the journal lacks, write the result, print the errors."""
    names = zoo_checks.all_models()
    journal = Journal(JOURNAL, versions())
    if quick:
        journal.records |= _published_sizes()
    journal.fill((("size", name) for name in names), "counting parameters")
    families = smallest(names, journal)
    chosen = list(families.values()) if quick else names
    journal.fill((("found", name) for name in largest_first(chosen, journal)), "discovering")
    journal.fill((("compressed", name) for name in largest_first(families.values(), journal)), "compressing")
    result = collected(journal, chosen, families)
    path = QUICK_RESULT if quick else RESULT
    write(path, result)
    Console(width=120).print(summary(result))
    errors = [record for part in ("models", "families") for record in result[part] if "error" in record]
    for record in errors:
        print(f"{record.get('family', '')} {record['name']}: {record['error']}")
    print(f"{path.relative_to(ROOT)} written, {len(errors)} records with an error")
    return 1 if errors else 0


def _published_sizes() -> dict[Task, Record]:
    """Return the parameter counts of the last full sweep, if it used the same versions of the libraries."""
    published = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    if published.get("versions") != versions():
        return {}
    return {("size", model["name"]): {"params": model["params"]} for model in published["models"] if "params" in model}


def versions() -> dict[str, str]:
    """Return the versions for which the results are valid."""
    libraries = {name: version(name) for name in ("batude-fx", "torch", "timm", "torchvision", "fvcore")}
    return {"python": platform.python_version(), **libraries}


class Journal:
    """The results of tasks, one JSON line each, appended as they arrive.

    Args:
        path: The file; it is created if it is missing.
        valid: The versions of the libraries; lines with other versions are ignored.
    """

    def __init__(self, path: Path, valid: Mapping[str, str]) -> None:
        self.path, self.valid = path, dict(valid)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        read = [line for text in lines if (line := _parsed(text)) and line["versions"] == self.valid]
        self.records: dict[Task, Record] = {(line["task"], line["model"]): line["record"] for line in read}

    def fill(self, tasks: Iterable[Task], title: str) -> None:
        """Run the tasks that have no result, or an error."""
        open_ = [task for task in dict.fromkeys(tasks) if "error" in self.records.get(task, {"error": ""})]
        if not open_:
            return
        with self.path.open("a") as file, _progress() as progress:
            bar = progress.add_task(title, total=len(open_))
            for (what, model), record in answers(open_, self.records):
                self.records[what, model] = record
                line = {"task": what, "model": model, "versions": self.valid, "record": record}
                file.write("\n" + json.dumps(line))  # on a new line, also after a line that was written in part
                file.flush()
                progress.update(bar, advance=1, description=f"{title} ({model})")


def _parsed(line: str) -> Any:  # noqa: ANN401 - a line of the journal, or None if it was written in part
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def answers(tasks: list[Task], records: Mapping[Task, Record]) -> Iterator[tuple[Task, Record]]:
    """Run tasks in worker processes, again if one dies; models that are too large are discovered without weights."""
    weightless = {t for t in tasks if t[0] == "found" and records["size", t[1]].get("params", 0) > LARGEST}
    with ProcessPool(WORKERS, TASKS_PER_WORKER, _prepare, context=get_context("spawn")) as pool:
        again = set()
        for task, answer in _asked(pool, tasks, weightless):
            if isinstance(answer, BaseException) and task not in weightless:
                again.add(task)  # in a fresh worker, and discovery without weights
            else:
                yield task, _record(answer, task)
        for task, answer in _asked(pool, list(again), again):
            yield task, _record(answer, task)


def _asked(pool: ProcessPool, tasks: list[Task], weightless: Collection[Task]) -> Iterator[tuple[Task, Any]]:
    """Yield the results as they arrive; an error of a worker is a result, too."""
    futures: dict[Future[Record], Task] = {}
    for task in tasks:
        limit = COMPRESS_SECONDS if task[0] == "compressed" else SECONDS
        futures[pool.schedule(_ask, (task, task in weightless), timeout=limit)] = task
    for future in as_completed(futures):
        error = future.exception()
        yield futures[future], future.result() if error is None else error


def _record(answer: Record | BaseException, task: Task) -> Record:
    if not isinstance(answer, BaseException):
        return answer
    if task[0] == "compressed" and isinstance(answer, TimeoutError | ProcessExpired):
        limits = f"{COMPRESS_SECONDS // 60} minutes and {MEMORY // 2**30} GiB"
        return {"note": f"too large for the sweep's {limits} per model ({type(answer).__name__})"}
    return {"error": f"{type(answer).__name__}: {answer}"}


def _prepare() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.backends.mha.set_fastpath_enabled(False)  # fvcore does not count fused attention
    follow_parent()


def _ask(task: Task, weightless: bool) -> Record:  # noqa: FBT001 - pebble passes positions
    """Return the result of a task, in the worker; an error of the model or the check is a result, too."""
    what, model = task
    try:
        if what == "size":
            return zoo_checks.size(model)
        return zoo_checks.found(model, weightless=weightless) if what == "found" else zoo_checks.compressed(model)
    except Exception as error:  # noqa: BLE001 - any error of a model or a check is a result
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            os._exit(1)  # the memory of this worker is not freed; a new worker replaces it
        return {"error": f"{type(error).__name__}: {error}"}


def largest_first(names: Iterable[str], journal: Journal) -> list[str]:
    """Sort models by size, so that no worker ends with a large model alone."""
    return sorted(names, key=lambda name: -journal.records["size", name].get("params", LARGEST))


def smallest(names: Iterable[str], journal: Journal) -> dict[str, str]:
    """Return the model with the fewest parameters of each family."""
    families: dict[str, str] = {}
    for name in sorted(names, key=lambda name: journal.records["size", name].get("params", LARGEST)):
        families.setdefault(zoo_checks.family(name), name)
    return dict(sorted(families.items()))


def collected(journal: Journal, names: Iterable[str], families: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of the result file."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {WORKERS} workers",
        "versions": journal.valid,
        "models": [
            {"name": name, "family": zoo_checks.family(name), **journal.records["size", name]}
            | journal.records["found", name]
            for name in names
        ],
        "families": [
            {"family": family, "name": name, **journal.records["compressed", name]} for family, name in families.items()
        ],
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write one line per record, so that the diff to a later sweep is readable."""
    head = {key: value for key, value in result.items() if not isinstance(value, list)}
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lists = {key: ",\n".join(json.dumps(record) for record in result[key]) for key in ("models", "families")}
    parts += [f"{json.dumps(key)}: [\n{lines}\n]" for key, lines in lists.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{" + ",\n".join(parts) + "}\n")
    temporary.replace(path)


def summary(result: Mapping[str, Any]) -> Table:
    """Return a table of the totals."""
    table = Table("", "number", title=f"{result['date']}, {result['machine']}")
    models, families = result["models"], result["families"]
    table.add_row("models", f"{len(models)}")
    table.add_row("discovered on the meta device", f"{sum(record.get('weightless', False) for record in models)}")
    table.add_row("convolutions", f"{sum(record.get('convolutions', 0) for record in models):,}")
    table.add_row("of them eligible", f"{sum(record.get('eligible', 0) for record in models):,}")
    for how, count in sum((Counter(record.get("found_by", {})) for record in models), Counter()).items():
        table.add_row(f"found by {how}", f"{count:,}")
    table.add_row("models with an error", f"{sum('error' in record for record in models)}")
    table.add_row("families compressed", f"{sum('replaced' in record for record in families)} of {len(families)}")
    table.add_row("families with an error", f"{sum('error' in record for record in families)}")
    return table


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the smallest model of each family")
    sys.exit(main(**vars(parser.parse_args())))
