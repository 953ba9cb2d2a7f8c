"""Sweep every model of timm and torchvision: is every convolution found, is every family compressed right?

`make zoo` runs all of it and writes `docs/data/zoo.json`, which the zoo page of the site is made from. `make zoo-quick`
takes the smallest model of each family and writes `build/zoo/quick.json`. A sweep that was killed goes on where it
stopped: what is done stands in `build/zoo/journal.jsonl`, valid for the same versions of the libraries; what failed is
tried again.
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
SECONDS = 120  # most that discovery of one model with weights may take
COMPRESS_SECONDS = 600
MEMORY = 11 * 2**30  # bytes of one worker, on a machine of 24 GiB
NO_MEMORY = ("allocate memory", "could not create a primitive")  # torch's words and oneDNN's, in a RuntimeError
TASKS_PER_WORKER = 40  # then a fresh process takes over: models leave caches behind

ROOT = Path(__file__).parents[1]
JOURNAL = ROOT / "build" / "zoo" / "journal.jsonl"
RESULT = ROOT / "docs" / "data" / "zoo.json"
QUICK_RESULT = ROOT / "build" / "zoo" / "quick.json"

Task = tuple[str, str]  # what is asked, of which model


def main(*, quick: bool) -> int:
    """Run what the journal lacks, write the result, print what is wrong."""
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
    wrong = [record for part in ("models", "families") for record in result[part] if "error" in record]
    for record in wrong:
        print(f"{record.get('family', '')} {record['name']}: {record['error']}")
    print(f"{path.relative_to(ROOT)} written, {len(wrong)} records with an error")
    return 1 if wrong else 0


def _published_sizes() -> dict[Task, Record]:
    """Parameters as the last whole sweep counted them, where it had the same libraries."""
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    if known.get("versions") != versions():
        return {}
    return {("size", model["name"]): {"params": model["params"]} for model in known["models"] if "params" in model}


def versions() -> dict[str, str]:
    """What the results hold for."""
    libraries = {name: version(name) for name in ("batude-fx", "torch", "timm", "torchvision", "fvcore")}
    return {"python": platform.python_version(), **libraries}


class Journal:
    """Answers to tasks, one JSON line each, appended as they come.

    Args:
        path: The file; made where it is missing.
        valid: Versions that lines must carry to count.
    """

    def __init__(self, path: Path, valid: Mapping[str, str]) -> None:
        self.path, self.valid = path, dict(valid)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        read = [line for text in lines if (line := _parsed(text)) and line["versions"] == self.valid]
        self.records: dict[Task, Record] = {(line["task"], line["model"]): line["record"] for line in read}

    def fill(self, tasks: Iterable[Task], title: str) -> None:
        """Answer the tasks that have no answer or an error."""
        open_ = [task for task in dict.fromkeys(tasks) if "error" in self.records.get(task, {"error": ""})]
        if not open_:
            return
        with self.path.open("a") as file, _progress() as progress:
            bar = progress.add_task(title, total=len(open_))
            for (what, model), record in answers(open_, self.records):
                self.records[what, model] = record
                line = {"task": what, "model": model, "versions": self.valid, "record": record}
                file.write("\n" + json.dumps(line))  # on a line of its own, also after half a one
                file.flush()
                progress.update(bar, advance=1, description=f"{title} ({model})")


def _parsed(line: str) -> Any:  # noqa: ANN401 - one of our own lines, or None for the half one of a killed run
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def answers(tasks: list[Task], known: Mapping[Task, Record]) -> Iterator[tuple[Task, Record]]:
    """Ask in worker processes, twice where one dies; a model that is too large with weights is discovered without."""
    weightless = {t for t in tasks if t[0] == "found" and known["size", t[1]].get("params", 0) > LARGEST}
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
    """Answers as they come; what a worker dies of is one, too."""
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
    torch.backends.mha.set_fastpath_enabled(False)  # fvcore does not see attention that is fused
    follow_parent()


def _ask(task: Task, weightless: bool) -> Record:  # noqa: FBT001 - pebble passes positions
    """In the worker: the answer to a task; what the model or the check raises is an answer too."""
    what, model = task
    try:
        if what == "size":
            return zoo_checks.size(model)
        return zoo_checks.found(model, weightless=weightless) if what == "found" else zoo_checks.compressed(model)
    except Exception as error:  # noqa: BLE001 - whatever a model or a check raises is an answer
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            os._exit(1)  # what a worker holds when it runs out is never given back; another takes over
        return {"error": f"{type(error).__name__}: {error}"}


def largest_first(names: Iterable[str], journal: Journal) -> list[str]:
    """So that no worker is left with a large one at the end."""
    return sorted(names, key=lambda name: -journal.records["size", name].get("params", LARGEST))


def smallest(names: Iterable[str], journal: Journal) -> dict[str, str]:
    """The model with the fewest parameters of each family."""
    families: dict[str, str] = {}
    for name in sorted(names, key=lambda name: journal.records["size", name].get("params", LARGEST)):
        families.setdefault(zoo_checks.family(name), name)
    return dict(sorted(families.items()))


def collected(journal: Journal, names: Iterable[str], families: Mapping[str, str]) -> dict[str, Any]:
    """The content of the result file."""
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
    """One line per record, so that a later sweep shows what changed."""
    head = {key: value for key, value in result.items() if not isinstance(value, list)}
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lists = {key: ",\n".join(json.dumps(record) for record in result[key]) for key in ("models", "families")}
    parts += [f"{json.dumps(key)}: [\n{lines}\n]" for key, lines in lists.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{" + ",\n".join(parts) + "}\n")
    temporary.replace(path)


def summary(result: Mapping[str, Any]) -> Table:
    """Totals."""
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
