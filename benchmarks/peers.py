"""Comparison of batude_fx with other tools: three networks compressed to half of their flops by each tool.

Run `make bench-peers`, or `python -m benchmarks.peers [--networks ...] [--rows ...]`; about an hour on two idle cores.
Each row runs in a process of its own. Another tool (a peer) runs in an environment of its own under `build/peers`,
which shares the project's torch and holds the tool in a pinned version with its dependencies. Finished rows are stored
under `build/peers` and not measured again. A tool that fails gets a row with the reason; one that compresses for more
than 10 minutes is stopped.

Columns: seconds to compress, and the memory that this adds; flops by fvcore; agreement with the original on 400 shop
photos for the network with trained weights (ResNet-50; calibrated with 256 others); milliseconds of one image and of
eight in eager torch and ONNX Runtime, on one thread and on two, with the speed-up over the original, the two running
alternately; megabytes of the tensors. Writes `docs/data/bench/peers-*.json`.
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
from batude_fx.support.atomic_files import write_text
from batude_fx.support.inputs import Inputs
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
    """Measure the missing rows, print and publish a table per network; return 0 even if a tool fails."""
    parser = argparse.ArgumentParser(description="Comparison of batude_fx with other tools.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--worker", metavar="FILE", help="measure one row in this process")
    options = parser.parse_args()
    if options.worker:
        measure(options.networks[0], options.rows[0], Path(options.worker))
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    where = environment()
    for network in options.networks:
        for row in options.rows:
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
    """Measure one row in a process of its own, or write the reason why there is none."""
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
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"stopped after {LIMIT} s" if done.returncode == -signal.SIGALRM else f"does not run: {message[:80]}"
    write_row(path, {"row": row, "reason": reason})


def write_row(path: Path, facts: dict[str, Any]) -> None:
    """Write the file of a row atomically."""
    write_text(path, json.dumps(facts))


def interpreter(package: str | None) -> str:
    """Return a Python that has some packages in addition to everything that this one has."""
    if package is None:
        return sys.executable
    place = FOLDER / package.partition("==")[0]
    python = place / "bin" / "python"
    if not (place / "installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)  # noqa: S603
        for site_packages in place.glob("lib/python*/site-packages"):
            (site_packages / "shared.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *package.split()], check=True)  # noqa: S603
        (place / "installed").touch()
    return str(python)


def measure(network: str, row: str, path: Path) -> None:
    """Compress, count, time and compare; runs in the row's own process."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, method = NETWORKS[network]().eval(), METHODS[row]
    photos, held_out = inputs.shop_photos("train", 256), inputs.shop_photos("test", 400)
    dense = count_flops(model, Inputs((IMAGE,)))
    call = method.prepare(model, photos, KEEP)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the memory
    before, start = resident("VmRSS"), time.perf_counter()
    signal.alarm(LIMIT)  # ends the process
    small = call().eval()
    signal.alarm(0)
    facts: dict[str, Any] = {
        "row": row, "data": method.data, "seconds": time.perf_counter() - start,
        "memory": resident("VmHWM") - before, "keep": count_flops(small, Inputs((IMAGE,))) / dense,
        "bytes": sum(tensor.nbytes for tensor in small.state_dict().values()), "times": times(model, small),
    }  # fmt: skip
    if network == "ResNet-50":
        facts["agreement"] = float((classes(small, held_out) == original_classes(model, held_out)).float().mean())
    write_row(path, facts)


@torch.inference_mode()
def times(model: nn.Module, small: nn.Module) -> list[tuple[float, float] | str]:
    """Return the seconds and the speed-up for each of `TIMED`, or the name of the error."""
    cells: list[tuple[float, float] | str] = []
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
                cells.append((ours, theirs / ours))
            except Exception as error:  # noqa: BLE001 - a peer's network may fail to export in any way
                cells.append(type(error).__name__)
    torch.set_num_threads(2)
    return cells


def runner(network: nn.Module, runtime: str, threads: int, images: Tensor, path: Path) -> Callable[[], object]:
    """Return a call that runs the images through the network; ONNX Runtime needs a file, written to the path."""
    if runtime == "eager":
        return lambda: network(images)
    if not path.exists():
        torch.onnx.export(
            network, (images,), path, input_names=["input"], dynamo=True, verbose=False, external_data=False
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of the waiting session must not occupy the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options)
    return lambda: session.run(None, {"input": images.numpy()})


@torch.no_grad()
def classes(network: nn.Module, images: Tensor) -> Tensor:
    """Return the class of every image, (N,)."""
    return torch.cat([network(batch).argmax(1) for batch in torch.split(images, 16)])


def original_classes(model: nn.Module, images: Tensor) -> Tensor:
    """Return the classes of the original, computed once for all rows."""
    path = FOLDER / "classes.json"
    if not path.is_file():
        path.write_text(json.dumps(classes(model, images).tolist()), encoding="utf-8")
    return torch.tensor(json.loads(path.read_text(encoding="utf-8")))


def table(network: str, rows: list[dict[str, Any]]) -> Table:
    """Return the table; milliseconds are followed by the speed-up."""
    heads = [f"{runtime} {batch}x, {threads} thr., ms" for batch, threads, runtime in TIMED]
    shown = Table(
        "tool", "sees", "seconds", "MiB added", "flops kept", "agreement", *heads, "MB",
        title=f"{network} at {KEEP} of its flops",
    )  # fmt: skip
    for row in rows:
        if "reason" in row:
            shown.add_row(row["row"], METHODS[row["row"]].data, row["reason"])
            continue
        shown.add_row(
            row["row"], row["data"], f"{row['seconds']:.2f}", f"{row['memory'] / 2**20:.0f}", f"{row['keep']:.3f}",
            f"{row['agreement']:.4f}" if "agreement" in row else "",
            *(pair if isinstance(pair, str) else f"{1000 * pair[0]:.1f} ({pair[1]:.2f}x)" for pair in row["times"]),
            f"{row['bytes'] / 1e6:.1f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    sys.exit(main())
