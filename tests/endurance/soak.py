"""`make soak`: eight threads discover, compress, save, load and run the same networks; nothing may go wrong.

What each call must return was computed by one thread alone, before: sites, weights to the bit, outputs, gradients. The
networks that all threads share are run by some of them while others compress them. In the end the networks, torch's
global flags and random generators, the warnings filters and the methods of `nn.Module` must be what they were. What was
called how often, with how many wrong results and errors, is printed as a table; the exit code is 1 if there are any.
"""

import argparse
import copy
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torchvision.models import DenseNet, MobileNetV2, VisionTransformer, squeezenet1_1

import batude_fx
from batude_fx.errors import BudgetError
from batude_fx.support.tables import add_row, new_table
from tests.compression.common import fingerprint

THREADS, SERVING = 8, 3
SIDE = 32
TOLERANCE = 1e-5  # for networks with attention: torch's fast path, which fvcore's count needs switched off, rounds anew
BUDGET = 0.8
_PATIENCE = 300.0  # seconds after which a thread that has not ended is taken to hang


@dataclass(frozen=True)
class Known:
    """A network that all threads share, and what calls of it return.

    Attributes:
        name: Its name in the table.
        model: The dense network.
        images: (4, 3, SIDE, SIDE).
        example: (1, 3, SIDE, SIDE), what flops are counted for.
        outputs: (4, classes), those of the dense network.
        gradient: That of the mean square of the outputs, by the images.
        sites: What `discover` returns.
        small: Calibration to the compressed network.
        small_outputs: Calibration to its outputs.
        saved: Calibration to a folder with the compressed network, which is only read.
        tolerance: Largest difference of outputs that is right.
    """

    name: str
    model: nn.Module
    images: Tensor
    example: Tensor
    outputs: Tensor
    gradient: Tensor
    sites: Any
    small: Mapping[str, nn.Module]
    small_outputs: Mapping[str, Tensor]
    saved: Mapping[str, Path]
    tolerance: float

    @classmethod
    def of(cls, name: str, model: nn.Module, folder: Path) -> "Known":
        """Compute all of it."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, 3, SIDE, SIDE, generator=generator)
        example = torch.zeros(1, 3, SIDE, SIDE)
        small = {how: compress(model, example, how) for how in CALIBRATIONS}
        saved = {how: folder / f"{name} {how}" for how in small}
        for how, network in small.items():
            batude_fx.save(network, saved[how])
        return cls(
            name=name, model=model, images=images, example=example, outputs=run(model, images),
            gradient=gradient(model, images), sites=batude_fx.discover(model, example), small=small,
            small_outputs={how: run(network, images) for how, network in small.items()}, saved=saved,
            tolerance=TOLERANCE if any(isinstance(part, nn.MultiheadAttention) for part in model.modules()) else 0,
        )  # fmt: skip

    def same(self, output: Tensor, expected: Tensor) -> bool:
        """Return whether an output is right."""
        return torch.equal(output, expected) or bool((output - expected).abs().max() <= self.tolerance)


CALIBRATIONS = ("weights", "images")
BY_HAND = {"DenseNet", "MobileNetV2", "VisionTransformer"}  # networks whose arguments are not those of a name


def compress(model: nn.Module, example: Tensor, how: str) -> nn.Module:
    """Compress a network by its weights alone, or by eight images."""
    images = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    calibration = {"weights": None, "images": images}[how]
    return batude_fx.compress(
        model, BUDGET, example_inputs=example, calibration=calibration, round_to=4, layers="conv+linear"
    ).eval()


def run(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of a network."""
    with torch.no_grad():
        return cast("Tensor", model(images))


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    """Return the gradient by the images, as whoever trains with a frozen network needs it."""
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images).square().mean(), images)[0]


def shared_networks() -> dict[str, nn.Module]:
    """Return small networks of timm and torchvision."""
    torch.manual_seed(0)
    networks: dict[str, nn.Module] = {
        name: timm.create_model(name, num_classes=5) for name in ("test_resnet", "test_byobnet", "test_efficientnet")
    }
    networks |= {
        "DenseNet": DenseNet(8, (2, 2, 2), 16, num_classes=5),
        "MobileNetV2": MobileNetV2(num_classes=5, width_mult=0.25),
        "squeezenet1_1": squeezenet1_1(num_classes=5),
        "VisionTransformer": VisionTransformer(SIDE, 8, 2, 2, 32, 64, num_classes=5),
    }
    for network in networks.values():
        network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
    return networks


@dataclass
class Counts:
    """What came of the calls.

    Attributes:
        calls: Kind of call to number of calls.
        wrong: Kind of call to number of wrong results.
        errors: Kind of call to number of errors.
        notes: What was wrong, one text each.
    """

    calls: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


class Worker(threading.Thread):
    """A thread that makes one call after another until its time is over.

    Args:
        index: Its number, which is the seed of its choices, too.
        known: What all threads share.
        folder: A folder of its own.
        until: When it ends, by `time.monotonic`.
    """

    def __init__(self, index: int, known: Sequence[Known], folder: Path, until: float) -> None:
        super().__init__(daemon=True)
        self.counts = Counts()
        self._index, self._known, self._folder, self._until = index, known, folder, until
        self._own = {item.name: copy.deepcopy(item.model) for item in known}
        self._choices = random.Random(index)  # noqa: S311 - what to call next
        self._latest = folder.parent / "latest"

    def run(self) -> None:
        """Make calls, most of them of the cheap kinds."""
        calls = self._calls()
        names, weights = list(calls), [weight for _, weight in calls.values()]
        while time.monotonic() < self._until:
            (name,) = self._choices.choices(names, weights)
            self.counts.calls[name] += 1
            try:
                right = calls[name][0](self._choices.choice(self._known), self._choices.choice(CALIBRATIONS))
                right = right and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            except Exception:  # noqa: BLE001 - every error is counted
                self.counts.errors[name] += 1
                self.counts.notes.append(f"{name}: {traceback.format_exc()}")
            else:
                self.counts.wrong[name] += not right
                if not right:
                    self.counts.notes.append(f"{name}: a wrong result")

    def _calls(self) -> dict[str, tuple[Callable[[Known, str], bool], int]]:
        """Return the kinds of calls, each with how often it is made in comparison to others.

        Three threads do what a server does, which never waits for the others.
        """
        serving: dict[str, tuple[Callable[[Known, str], bool], int]] = {
            "run a shared network": (self._run_shared, 8),
            "run a shared compressed network": (self._run_small, 6),
            "gradient of a shared network": (self._gradient, 4),
            "load a shared folder": (self._load, 3),
            "load from that folder meanwhile": (self._load_latest, 2),
        }
        compressing: dict[str, tuple[Callable[[Known, str], bool], int]] = {
            "discover a shared network": (lambda known, _: self._discover(known, known.model), 4),
            "discover an own network": (lambda known, _: self._discover(known, self._own[known.name]), 4),
            "compress a shared network": (lambda known, how: self._compress(known, known.model, how), 4),
            "compress an own network": (lambda known, how: self._compress(known, self._own[known.name], how), 4),
            "refuse a budget": (self._refuse, 2),
            "save and load": (self._save_and_load, 2),
            "save into one folder": (self._save_latest, 2),
        }
        return serving if self._index < SERVING else serving | compressing

    def _run_shared(self, known: Known, _: str) -> bool:
        return all(known.same(run(known.model, known.images), known.outputs) for _ in range(5))

    def _run_small(self, known: Known, how: str) -> bool:
        return known.same(run(known.small[how], known.images), known.small_outputs[how])

    def _gradient(self, known: Known, _: str) -> bool:
        return known.same(gradient(known.model, known.images), known.gradient)

    def _discover(self, known: Known, model: nn.Module) -> bool:
        return bool(batude_fx.discover(model, known.example) == known.sites)

    def _compress(self, known: Known, model: nn.Module, how: str) -> bool:
        small = compress(model, known.example, how)
        return _same_weights(small, known.small[how]) and known.same(run(small, known.images), known.small_outputs[how])

    def _refuse(self, known: Known, _: str) -> bool:
        try:
            batude_fx.compress(known.model, 1e-4, calibration=None, example_inputs=known.example)
        except BudgetError:
            return True
        return False

    def _save_and_load(self, known: Known, how: str) -> bool:
        batude_fx.save(known.small[how], self._folder)
        return self._is_saved(known, how, self._folder)

    def _load(self, known: Known, how: str) -> bool:
        return self._is_saved(known, how, known.saved[how])

    def _is_saved(self, known: Known, how: str, folder: Path) -> bool:
        by_hand = self._own[known.name] if known.name in BY_HAND else None  # what no library can rebuild by its name
        network = batude_fx.load(folder, model=by_hand)
        return _same_weights(network, known.small[how]) and known.same(
            run(network, known.images), known.small_outputs[how]
        )

    def _save_latest(self, _: Known, how: str) -> bool:
        batude_fx.save(self._known[0].small[how], self._latest)
        return True

    def _load_latest(self, _: Known, __: str) -> bool:
        """Load from a folder that other threads save to: one of its two networks, never parts of both."""
        network = batude_fx.load(self._latest)
        return any(_same_weights(network, small) for small in self._known[0].small.values())


def _same_weights(network: nn.Module, other: nn.Module) -> bool:
    state, expected = network.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def _state(model: nn.Module) -> list[object]:
    return fingerprint(model)[:-1]  # the last are the random generators, which `process_state` has


def process_state() -> dict[str, object]:
    """Return what calls might leave changed in the whole process, by name."""
    generator: Any = np.random.get_state()  # noqa: NPY002 - the global one is what is looked at
    return {
        "nn.Module.__call__": nn.Module.__call__,
        "nn.Module.__getattr__": nn.Module.__getattr__,
        "warnings filters": (warnings.filters[:], warnings.showwarning),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "cudnn flags": (
            torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
        ),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "torch's random generator": torch.get_rng_state().numpy().tobytes(),
        "Python's random generator": random.getstate(),
        "NumPy's random generator": (generator[0], generator[1].tobytes(), *generator[2:]),
        "limits of Python": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "global hooks of modules": tuple(
            len(hooks) for name, hooks in sorted(vars(nn.modules.module).items()) if name.endswith("_hooks")
        ),
    }  # fmt: skip


@contextmanager
def _progress(seconds: float) -> Iterator[Callable[[], None]]:
    """Show a bar; yields what moves it on to the present time."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar, start = progress.add_task(f"{THREADS} threads", total=seconds), time.monotonic()
        yield lambda: progress.update(bar, completed=time.monotonic() - start)


def main(seconds: float) -> int:
    """Let the threads work, print the table, and return the exit code."""
    torch.set_num_threads(1)  # the sums of one thread are the same each time
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # before the threads begin, as filters belong to the whole process
        root = Path(name)
        known = [Known.of(name, model, root) for name, model in shared_networks().items()]
        batude_fx.save(known[0].small["weights"], root / "latest")
        shared = [model for item in known for model in (item.model, *item.small.values())]
        models_before, state_before = [_state(model) for model in shared], process_state()
        end = time.monotonic() + seconds
        workers = [Worker(index, known, root / f"{index}", end) for index in range(THREADS)]
        for worker in workers:
            worker.start()
        with _progress(seconds) as advance:
            while time.monotonic() < end:
                time.sleep(0.5)
                advance()
        for worker in workers:
            worker.join(max(0.0, end + _PATIENCE - time.monotonic()))
        hanging = sum(worker.is_alive() for worker in workers)
        state = process_state()
        changed = [name for name, value in state_before.items() if state[name] != value]
        changed += [
            type(model).__name__ for model, before in zip(shared, models_before, strict=True) if _state(model) != before
        ]
        return _print([worker.counts for worker in workers], changed, hanging, seconds)


def _print(counts: Sequence[Counts], changed: Sequence[str], hanging: int, seconds: float) -> int:
    calls, wrong, errors = (
        sum((getattr(item, name) for item in counts), Counter[str]()) for name in ("calls", "wrong", "errors")
    )
    table = new_table("call", title=f"{THREADS} threads, {seconds:g} seconds")
    for column in ("calls", "wrong", "errors"):
        table.add_column(column, justify="right")
    for name in calls:
        add_row(table, name, f"{calls[name]:,}", str(wrong[name]), str(errors[name]))
    totals = calls.total(), wrong.total(), errors.total()
    add_row(table, "all", *(f"{total:,}" for total in totals))
    console = Console(width=120, soft_wrap=True)
    for note in [note for item in counts for note in item.notes][:10]:
        console.print(note, markup=False, highlight=False)
    console.print(table)
    console.print(f"changed afterwards: {', '.join(changed) or 'nothing'}; threads that hang: {hanging}")
    return int(bool(wrong.total() or errors.total() or changed or hanging or not calls))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="how long the threads work")
    sys.exit(main(**vars(parser.parse_args())))
