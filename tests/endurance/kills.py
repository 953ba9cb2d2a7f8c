"""`make kills`: processes that save, export, sweep and train are killed at every kind of moment; nothing may be lost.

Each process is killed by SIGKILL just before one of its changes of the file system (see `killed_process`). Then what
was there before must still be readable to the bit, or what takes its place must be. The same command is given again and
killed again, at another change; the third one runs to its end, which must be that of an undisturbed one, with the same
files: no temporary ones are left over. Everything is printed as a table; the exit code is 1 if anything falls short.

Which changes: all of those of `save`, and evenly spread ones of the other commands, which take longer.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import batude_fx
from batude_fx.errors import TrainingError
from batude_fx.report import html_page, sweep_points
from batude_fx.report.record import Record
from batude_fx.saving import saved_folder
from batude_fx.saving.config import SavedArchitecture
from batude_fx.saving.find_architecture import ExampleRun
from batude_fx.support.atomic_files import newest
from batude_fx.support.tables import add_row, new_table
from batude_fx.training import checkpoint_file
from batude_fx_cli.app import app
from tests.endurance.killed_process import End, run_forked
from tests.training.tiny_recipe import tiny_recipe, write_images

IMAGE = torch.zeros(1, 3, 32, 32)
NAME = "test_resnet"
GOLDEN = 0.6180339887  # multiples of it, without their whole part, are spread evenly and never repeat
LEAST_KILLS = 100
_LOADED: set[str | None] = set()  # checksums of the networks that were loaded without an error


@dataclass(frozen=True)
class Kind:
    """A command that is killed.

    Attributes:
        name: What it does.
        work: Gives the command; its argument is the folder that everything happens in.
        read: Returns what a user can read there, part by part. After a kill, each part is what it was before or after
            the undisturbed command, or one of the further values in `harmless`.
        prepare: Fills the folder beforehand.
        kills: Number of evenly spread changes at which the command is killed; None for all.
        last: Number of the last changes, at each of which it is killed too, as files reach their places then.
        harmless: Further values of parts that lose nothing.
        forks: Whether the command runs in forks only, as it leaves threads behind, without which later forks would
            wait for ever. Otherwise the last one, which is not killed, runs in this process, as that is quicker.
    """

    name: str
    work: Callable[[Path], object]
    read: Callable[[Path], Sequence[object]]
    prepare: Callable[[Path], object] = lambda _: None
    kills: int | None = None
    last: int = 0
    harmless: tuple[object, ...] = ()
    forks: bool = False


@dataclass
class Tally:
    """What came of the kills of one kind.

    Attributes:
        name: The kind.
        events: Changes that an undisturbed command makes.
        kills: Processes that were killed.
        lost: Kills after which something could not be read any more.
        failed: Commands that did not succeed, or not with the same result, after others had been killed.
        leftovers: Commands after which files were found that an undisturbed one does not leave.
        notes: What happened, one line each.
    """

    name: str
    events: int = 0
    kills: int = 0
    lost: int = 0
    failed: int = 0
    leftovers: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def falls_short(self) -> bool:
        """Whether anything happened that must not."""
        return bool(self.lost or self.failed or self.leftovers or not self.kills)


def main(names: Sequence[str], *, once: bool) -> int:
    """Kill the commands, print the table, and return the exit code.

    Args:
        names: The first words of the kinds to kill; none for all, of which there must be at least 100 kills then.
        once: Whether each command is killed only once, not again when it is given for the second time.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # other threads would be missing in a fork
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory() as name,
        Progress(*columns, console=console, auto_refresh=False, transient=True) as progress,  # a thread would not fork
        _slow_parts_done_once(),
    ):
        root = Path(name)
        tallies = [
            _kill_all(kind, root / f"{index}", progress, once=once)
            for index, kind in enumerate(all_kinds(root))
            if not names or kind.name.split()[0].strip(",") in names
        ]
    _print(tallies)
    enough = bool(names) or sum(tally.kills for tally in tallies) >= LEAST_KILLS
    return int(any(tally.falls_short for tally in tallies) or not tallies or not enough)


def all_kinds(root: Path) -> Iterator[Kind]:
    """Yield what is killed; networks and images are made once, and forks get them with the memory."""
    small, smaller = networks()
    save_old, save_new = (partial(_save, network) for network in (small, smaller))
    yield Kind("save into a new folder", save_new, _saved)
    yield Kind("save over a network", save_new, _saved, save_old)
    photos = root / "photos"
    write_images(photos)
    yield Kind(
        "sweep into a saved folder", partial(_sweep, photos, "0.7,0.8"), _swept, partial(_prepare_sweep, photos), 12, 8
    )
    yield Kind("train and --resume", partial(_train, photos), _trained, kills=20, last=12)
    for ending in (".onnx", ".xml", ".pt2"):
        exports = [partial(_export, network, ending) for network in (small, smaller)]
        # A pair of files cannot be replaced at once; while it is replaced, a missing .xml says so.
        harmless = (None,) if ending == ".xml" else ()
        yield Kind(
            f"export {ending} over a file", exports[1], partial(_exported, ending), exports[0], harmless=harmless,
            forks=ending == ".xml",
        )  # fmt: skip


def networks() -> tuple[nn.Module, nn.Module]:
    """Return two compressed networks with the same layers and other ranks."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3).eval()
    small, smaller = (
        batude_fx.compress(model, budget, calibration=None, example_inputs=IMAGE) for budget in (0.8, 0.6)
    )
    return small, smaller


@contextmanager
def _slow_parts_done_once() -> Iterator[None]:
    """Do once what takes most of the time of `save` and changes no file: drawing, and finding the architecture."""
    pages: dict[str, str] = {}
    found: dict[nn.Module, SavedArchitecture] = {}
    render, find = html_page.render, saved_folder.find_architecture

    def render_once(record: Record, points: Sequence[sweep_points.Point] = ()) -> str:
        key = f"{record.model_dump_json()} {points}"
        if key not in pages:
            pages[key] = render(record, points)
        return pages[key]

    def find_once(model: nn.Module, weights: Path, run: ExampleRun) -> SavedArchitecture:
        if model not in found:
            found[model] = find(model, weights, run)
        return found[model]

    html_page.render, saved_folder.find_architecture = render_once, find_once
    try:
        yield
    finally:
        html_page.render, saved_folder.find_architecture = render, find


def _kill_all(kind: Kind, folder: Path, progress: Progress, *, once: bool) -> Tally:
    """Kill one command at all of its changes, or at evenly spread ones."""
    tally = Tally(kind.name)
    bar = progress.add_task(f"{kind.name}: undisturbed", total=None)

    (template := folder / "template").mkdir(parents=True)
    (run_in_fork if kind.forks else run_here)(lambda: kind.prepare(template))

    def fresh(name: str) -> Path:
        return Path(shutil.copytree(template, folder / name))

    place = fresh("undisturbed")
    before = kind.read(place)
    if not kind.forks:
        run_here(lambda: kind.work(fresh("warm-up")))  # imports modules, which forks need not import again
    end = run_forked(lambda: kind.work(place), place)
    if end.error:
        tally.failed += 1
        tally.notes.append(f"undisturbed: {end.error}")
        return tally
    after, files = kind.read(place), _files(place)
    tally.events = end.events
    count = min(kind.kills or end.events, end.events)
    moments = {1 + index * end.events // count for index in range(count)}
    moments |= set(range(end.events + 1 - min(kind.last, end.events), end.events + 1))
    progress.update(bar, total=len(moments), description=kind.name)
    for index, first in enumerate(sorted(moments)):
        place = fresh(f"{index}")
        killed_at = [first] if once else [first, 1 + int(index * GOLDEN % 1 * end.events)]
        moment = f"killed at {', then at '.join(map(str, killed_at))}"
        for number in killed_at:
            _check_kept(
                kind, place, (before, after), tally, moment, run_forked(partial(kind.work, place), place, number)
            )
        last = (run_in_fork if kind.forks else run_here)(partial(kind.work, place))
        if last or kind.read(place) != after or files - _files(place):
            tally.failed += 1
            tally.notes.append(f"{moment}: {last or 'another result'}")
        if left := _files(place) - files:
            tally.leftovers += 1
            tally.notes.append(f"{moment}: left {', '.join(sorted(left))}")
        progress.update(bar, advance=1, refresh=True)
    return tally


def run_in_fork(work: Callable[[], object]) -> str:
    """Run a function in a fork; return its error, or nothing."""
    return run_forked(work, Path("/nowhere")).error


def run_here(work: Callable[[], object]) -> str:
    """Run a function in this process, printing nothing; return its error, or nothing."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            work()
    except Exception:  # noqa: BLE001 - whatever it is, it is told
        return traceback.format_exc()
    return ""


def _check_kept(
    kind: Kind, place: Path, before_and_after: tuple[Sequence[object], Sequence[object]], tally: Tally, moment: str,
    end: End,
) -> None:  # fmt: skip
    """Note what is not readable any more after a kill, or that a command failed."""
    tally.kills += end.killed
    if end.error:
        tally.failed += 1
        tally.notes.append(f"{moment}: {end.error}")
        return
    try:
        now = kind.read(place)
    except Exception as error:  # noqa: BLE001 - whatever it is, something cannot be read
        now = [f"{type(error).__name__}: {error}"]
    allowed = list(zip(*before_and_after, strict=True))
    if len(now) != len(allowed) or any(
        part not in pair and part not in kind.harmless for part, pair in zip(now, allowed, strict=True)
    ):
        tally.lost += 1
        tally.notes.append(f"{moment}: lost, {now}")


def _files(folder: Path) -> set[str]:
    """Return the names of all files and folders in a folder; those of TensorBoard hold the time of the day."""
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("events.out.tfevents")
    }


def _digest(*files: Path) -> str | None:
    """Return a checksum of files; None if the first one is missing."""
    if not files[0].is_file():
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"missing")
    return digest.hexdigest()[:16]


def _save(network: nn.Module, place: Path) -> None:
    batude_fx.save(network, place / "network")


def _saved(place: Path) -> list[object]:
    """Return a checksum of all files of a saved network that can be loaded; None if there is no network."""
    folder = newest(place / "network")
    files = tuple(folder / name for name in ("config.json", "model.safetensors", "report.json", "report.html"))
    if not files[0].exists() and not files[1].exists():
        return [None]
    digest = _digest(*files)
    if digest not in _LOADED:
        batude_fx.load(folder)
        _LOADED.add(digest)
    return [digest]


def _command(*arguments: object) -> None:
    code = app([str(argument) for argument in arguments], standalone_mode=False)
    if code:
        raise RuntimeError(f"{arguments[0]} ended with {code}")


def _sweep(photos: Path, budgets: str, place: Path) -> None:
    options = "--input-size", 32, "--calibration", "none", "--no-pretrained", "--output", place / "network"
    _command("sweep", NAME, "--budgets", budgets, "--evaluate", photos / "validation", *options, "--json")


def _prepare_sweep(photos: Path, place: Path) -> None:
    options = "--input-size", 32, "--calibration", "none", "--no-pretrained", "--output", place / "network"
    _command("compress", NAME, "--budget", 0.6, *options, "--json")
    _sweep(photos, "0.9", place)


def _swept(place: Path) -> list[object]:
    """Return a checksum of the network, the budgets of its sweep, and whether its page is whole."""
    folder = newest(place / "network")
    batude_fx.load(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    budgets = tuple(point.budget for point in sweep_points.read(folder))
    return [
        _digest(folder / "config.json", folder / "model.safetensors", folder / "report.json"), budgets,
        'id="sweep"' in page and page.rstrip().endswith("</html>"),
    ]  # fmt: skip


def _train(photos: Path, place: Path) -> None:
    """Give the command that its messages ask for: with --resume where there is a run."""
    recipe, folder = tiny_recipe(photos), place / "run"
    if (folder / "result.json").exists():
        with suppress(TrainingError):  # it is finished
            batude_fx.run(recipe, folder, resume=True)
    else:
        batude_fx.run(recipe, folder, resume=(folder / "recipe.yaml").exists())


def _trained(place: Path) -> list[object]:
    """Return checksums of the trained network and of the result with its log; the checkpoint must be whole."""
    folder = place / "run"
    if (folder / "checkpoint.safetensors").exists():
        checkpoint_file.read(folder / "checkpoint.safetensors")
    result = folder / "result.json"
    facts = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
    network = newest(folder / "model")
    if (network / "config.json").exists():
        batude_fx.load(network)
    log = (folder / "log.jsonl").read_text(encoding="utf-8") if facts else None
    return [
        _digest(network / "model.safetensors", network / "config.json", network / "report.json"),
        json.dumps(facts), log,
    ]  # fmt: skip


def _export(network: nn.Module, ending: str, place: Path) -> None:
    batude_fx.export(network, place / f"network{ending}", example_inputs=IMAGE)


def _exported(ending: str, place: Path) -> list[object]:
    """Return a checksum of an exported file, and of the weights beside an .xml."""
    file = place / f"network{ending}"
    return [_digest(file, *([file.with_suffix(".bin")] if ending == ".xml" else []))]


def _print(tallies: Sequence[Tally]) -> None:
    table = new_table("kind")
    for column in ("events", "kills", "lost", "retries failed", "leftovers"):
        table.add_column(column, justify="right")
    for tally in tallies:
        numbers = tally.events, tally.kills, tally.lost, tally.failed, tally.leftovers
        add_row(table, tally.name, *map(str, numbers))
    totals = [sum(getattr(tally, name) for tally in tallies) for name in ("kills", "lost", "failed", "leftovers")]
    add_row(table, "all", "", *map(str, totals))
    console = Console(width=120, soft_wrap=True)
    for tally in tallies:
        for note in tally.notes[:10]:
            console.print(f"{tally.name}, {note}", markup=False, highlight=False)
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="save, sweep, train, export; all by default")
    parser.add_argument("--once", action="store_true", help="kill each command once only")
    sys.exit(main(**vars(parser.parse_args())))
