"""batude_fx beside its peers: half of the flops of three networks, by every tool, in one table.

Run `make bench-peers`, or `python -m benchmarks.peers [--networks ...] [--rows ...]`; about an hour on two idle cores.
Each row runs in a process of its own, a peer's in an environment of its own under `build/peers`, which shares the
project's torch and holds the pinned peer with what it needs. What is done is kept under `build/peers` and not done
again. A peer that cannot run says why; one that compresses for more than 10 minutes is stopped.

Columns: seconds to compress and the memory that it adds; flops by fvcore; agreement with the original on 400 shop
photos where the weights are real (ResNet-50; calibrated with 256 others); milliseconds of one image and of eight in
eager torch and ONNX Runtime, on one thread and on two, and how many times faster that is than the original, the two
taking turns; megabytes of the tensors. Writes `docs/data/bench/peers-*.json`.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from batude_fx.graph.flops import count_flops
from batude_fx.support.atomic_files import atomic_file
from batude_fx.support.timing import time_calls
from benchmarks.compress_time import resident
from benchmarks.peer_methods import IMAGE, METHODS
from benchmarks.published import environment, publish
from tests.real import inputs

FOLDER = Path("build/peers")
KEEP, TURNS, LIMIT = 0.5, 11, 600
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": inputs.resnet50_torchvision,
    "VGG-16-BN": torchvision.models.vgg16_bn,
}
TIMED = [(batch, threads, runtime) for runtime in ("eager", "ORT") for threads in (1, 2) for batch in (1, 8)]
CONSOLE = Console(width=200)


def main() -> int:
    """Run what is missing, show and publish a table a network; 0 whether or not every peer runs."""
    parser = argparse.ArgumentParser(description="batude_fx beside its peers.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--worker", metavar="FILE", help="measure the one row here, in this process")
    given = parser.parse_args()
    if given.worker:
        measure(given.networks[0], given.rows[0], Path(given.worker))
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    where = environment()
    for network in given.networks:
        for row in given.rows:
            path = FOLDER / f"{network} {row}.json"
            if not path.is_file():
                CONSOLE.print(f"{network}, {row} ...")
                run(network, row, path)
        paths = [path for row in METHODS if (path := FOLDER / f"{network} {row}.json").is_file()]
        shown = table(network, [json.loads(path.read_text(encoding="utf-8")) for path in paths])
        CONSOLE.print(shown)
        ends = sorted(f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d %H:%M}" for path in paths)
        publish(f"peers-{network}", shown, f"{where}; rows ended {ends[0]} to {ends[-1]} UTC")
    return 0


def run(network: str, row: str, path: Path) -> None:
    """One row, or why there is none."""
    python = interpreter(METHODS[row].package)
    command = [
        python, "-W", "ignore", "-m", "benchmarks.peers", "--networks", network, "--rows", row, "--worker", str(path)
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10 * LIMIT)  # noqa: S603
    except subprocess.TimeoutExpired:
        reason = f"did not end in {10 * LIMIT} s"
    else:
        if not done.returncode:
            return
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"stopped after {LIMIT} s" if done.returncode == -signal.SIGALRM else f"does not run: {said[:80]}"
    write_row(path, {"row": row, "reason": reason})


def write_row(path: Path, facts: dict[str, Any]) -> None:
    """A row's file, whole or not at all."""
    with atomic_file(path) as text:
        text.write_text(json.dumps(facts), encoding="utf-8")


def interpreter(package: str | None) -> str:
    """Python with packages of its own beside everything that this one has."""
    if package is None:
        return sys.executable
    place = FOLDER / package.partition("==")[0]
    python = place / "bin" / "python"
    if not (place / "installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)  # noqa: S603
        for one in place.glob("lib/python*/site-packages"):
            (one / "shared.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *package.split()], check=True)  # noqa: S603
        (place / "installed").touch()
    return str(python)


def measure(network: str, row: str, path: Path) -> None:
    """Compress, count, time, compare; in the row's own process."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, method = NETWORKS[network]().eval(), METHODS[row]
    photos, held_out = inputs.shop_photos("train", 256), inputs.shop_photos("test", 400)
    dense = count_flops(model, (IMAGE,))
    call = method.prepare(model, photos, KEEP)
    Path("/proc/self/clear_refs").write_text("5")  # forget the memory's peak so far
    before, start = resident("VmRSS"), time.perf_counter()
    signal.alarm(LIMIT)  # ends the process
    small = call().eval()
    signal.alarm(0)
    facts: dict[str, Any] = {
        "row": row, "data": method.data, "seconds": time.perf_counter() - start,
        "memory": resident("VmHWM") - before, "keep": count_flops(small, (IMAGE,)) / dense,
        "bytes": sum(tensor.nbytes for tensor in small.state_dict().values()), "times": times(model, small),
    }  # fmt: skip
    if network == "ResNet-50":
        facts["agreement"] = float((classes(small, held_out) == original_classes(model, held_out)).float().mean())
    write_row(path, facts)


@torch.inference_mode()
def times(model: nn.Module, small: nn.Module) -> list[tuple[float, float] | str]:
    """Seconds, and how many times faster, for each of `TIMED`; or why there are none."""
    found: list[tuple[float, float] | str] = []
    with TemporaryDirectory() as folder:
        for batch, threads, runtime in TIMED:
            torch.set_num_threads(threads)
            images = torch.randn(batch, 3, 224, 224)
            try:
                calls = [
                    runner(network, runtime, threads, images, Path(folder) / f"{index} {batch}.onnx")
                    for index, network in enumerate((small, model))
                ]
                ours, theirs = time_calls(calls, TURNS)
                found.append((ours, theirs / ours))
            except Exception as error:  # noqa: BLE001 - a peer's network may fail to export in any way
                found.append(type(error).__name__)
    torch.set_num_threads(2)
    return found


def runner(network: nn.Module, runtime: str, threads: int, images: Tensor, path: Path) -> Callable[[], object]:
    """A call that runs the images through the network, by way of an ONNX file of that path where it is needed."""
    if runtime == "eager":
        return lambda: network(images)
    if not path.exists():
        torch.onnx.export(
            network, (images,), path, input_names=["input"], dynamo=True, verbose=False, external_data=False
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of a session that waits for its turn must not keep the cores from the other one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options)
    return lambda: session.run(None, {"input": images.numpy()})


@torch.no_grad()
def classes(network: nn.Module, images: Tensor) -> Tensor:
    """(N,) the class of every image."""
    return torch.cat([network(batch).argmax(1) for batch in torch.split(images, 16)])


def original_classes(model: nn.Module, images: Tensor) -> Tensor:
    """Those of the original, computed once for all rows."""
    path = FOLDER / "classes.json"
    if not path.is_file():
        path.write_text(json.dumps(classes(model, images).tolist()), encoding="utf-8")
    return torch.tensor(json.loads(path.read_text(encoding="utf-8")))


def table(network: str, found: list[dict[str, Any]]) -> Table:
    """A line a row; milliseconds with how many times faster."""
    heads = [f"{runtime} {batch}x, {threads} thr., ms" for batch, threads, runtime in TIMED]
    shown = Table(
        "tool", "sees", "seconds", "MiB added", "flops kept", "agreement", *heads, "MB",
        title=f"{network} at {KEEP} of its flops",
    )  # fmt: skip
    for one in found:
        if "reason" in one:
            shown.add_row(one["row"], METHODS[one["row"]].data, one["reason"])
            continue
        shown.add_row(
            one["row"], one["data"], f"{one['seconds']:.2f}", f"{one['memory'] / 2**20:.0f}", f"{one['keep']:.3f}",
            f"{one['agreement']:.4f}" if "agreement" in one else "",
            *(pair if isinstance(pair, str) else f"{1000 * pair[0]:.1f} ({pair[1]:.2f}x)" for pair in one["times"]),
            f"{one['bytes'] / 1e6:.1f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    sys.exit(main())
