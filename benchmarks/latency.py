"""Milliseconds against flops: how much faster a compressed network is for its flops, and whether latency budgets hold.

Run `make bench-latency`, or `python -m benchmarks.latency [--parts ...]`; forty minutes on idle cores. One thread,
batch 1 and 8; the dense network and its compressed copies take turns in one process, medians of 21 turns with the
fastest and the slowest beside them. Everything in torch is channels-last.

1. ResNet-50 (real weights, calibrated with 256 shop photos) and VGG-16-BN (random weights, weights only, linear layers
   too) at 0.5 and 0.3 of the flops, VGG of the parameters as well: the speed-up over the flop ratio in eager torch
   and in ONNX Runtime. Batch-norms are folded on both sides. Ranks by "flops" are multiples of 32; those by "flops,
   time" have a limit on the time of one image in eager torch too, which demands the ratio. "At most" is what the ratio
   would be if layers took exactly their share of the flops, and everything else what it took before: eager torch runs
   activations, additions and pooling by themselves.
2. Latency budgets, met within 5 % when measured afresh, three times: ResNet-50 and MobileNetV3 in eager torch, as they
   are (batch-norms not folded).
3. ResNet-50 at 0.6, 0.5 and 0.4 of its flops with ranks in multiples of 8, and with the measured time of that network
   for a limit instead, in eager torch, batch-norms folded, on one thread and on two: agreement with the original on
   661 other photos, the dense network and both taking turns.

glibc is told to keep what layers free: by default it gives large tensors back to the system, and page faults take up to
a tenth of the time of VGG-16-BN on eight images.

Exit code 1 when a limit is missed.
"""

import argparse
import ctypes
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import batude_fx
from batude_fx import Budget
from batude_fx.support.timing import now
from benchmarks.published import environment, publish
from tests.real import inputs

BUDGETS = {0.5: 0.9, 0.3: 0.85}  # flops kept, to the least speed-up over flop ratio
MARGIN = 1.01  # by which a limit on the time demands more than the least
ROUND_TO, TURNS = 32, 21
TIMED = {"resnet50": 1.8, "mobilenetv3_large_100": 1.1}  # times faster
CLOSE, REPEATS = 0.05, 3
EQUAL = (0.6, 0.5, 0.4)  # flops kept
CONSOLE = Console(width=120)

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of some turns, sorted."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The one in the middle."""
        return self.seconds[len(self.seconds) // 2]

    def __str__(self) -> str:
        low, middle, high = (1000 * one for one in (self.seconds[0], self.median, self.seconds[-1]))
        return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> int:
    """Measure, show, judge."""
    parts = {"latency_ratio": flop_ratios, "latency_budget": latency_budgets, "latency_equal": equal}
    parser = argparse.ArgumentParser(description="Milliseconds against flops.")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=list(parts))
    chosen = parser.parse_args().parts
    warnings.simplefilter("ignore")
    where = environment()
    CONSOLE.print(where)
    keep_freed_memory()
    torch.set_num_threads(1)
    missed = False
    for name in chosen:
        table = parts[name]()
        CONSOLE.print(table)
        publish(name, table, f"{where}, one thread measured unless the table says")
        missed |= "MISSED" in table.columns[-1].cells
    return int(missed)


def flop_ratios() -> Table:
    """Part 1."""
    table = Table(
        "network", "runtime", "batch", "ranks by", "flops kept", "dense, ms", "compressed, ms", "speed-up",
        "over flop ratio", "at most", "least", "", title="Speed-up over flop ratio",
    )  # fmt: skip
    resnet, vgg = inputs.resnet50_torchvision(), torchvision.models.vgg16_bn().eval()
    photos = inputs.shop_photos("train", 256)
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "ResNet-50": (resnet, {"calibration": photos}),
        "VGG-16-BN": (vgg, {"calibration": None, "layers": "conv+linear"}),
    }
    for name, (model, options) in models.items():
        # Of VGG's parameters 90 % are in linear layers: few flops, and for one image much memory to read.
        budgets = [Budget(flops=keep, params=keep if model is vgg else None) for keep in BUDGETS]
        plan = batude_fx.plan(model, budgets[0], round_to=ROUND_TO, **options)
        dense = batude_fx.fold(model).to(memory_format=torch.channels_last)
        small = [(keep, "flops", *built(plan.at(budget), model)) for keep, budget in zip(BUDGETS, budgets, strict=True)]
        by_time = list(small)
        for (keep, least), budget in zip(BUDGETS.items(), budgets, strict=True):
            limited = budget.model_copy(update={"latency": keep / least / MARGIN})
            plan = batude_fx.plan(dense, limited, example_inputs=image(1), round_to="auto", **options)
            by_time.append((keep, "flops, time", *built(plan, dense)))
        for runtime, callers, chosen in (("eager", eager, by_time), ("ONNX Runtime", onnx_runtime, small)):
            with TemporaryDirectory() as folder:
                networks = [dense, *(network for *_, network in chosen)]
                for batch, calls in callers(networks, Path(folder)).items():
                    before, *after = in_turns(calls, f"{name}, {runtime}, batch {batch}")
                    layers = share_of_layers(calls[0]) if runtime == "eager" else None
                    for (keep, ranks, share, _), times in zip(chosen, after, strict=True):
                        faster = before.median / times.median
                        most = f"{share / (share * layers + 1 - layers):.2f}" if layers else ""
                        verdict = "ok" if faster * share >= BUDGETS[keep] else "MISSED"
                        table.add_row(
                            name, runtime, str(batch), ranks, f"{share:.3f}", str(before), str(times),
                            f"{faster:.2f}x", f"{faster * share:.2f}", most, str(BUDGETS[keep]), verdict,
                        )  # fmt: skip
    return table


def built(plan: batude_fx.Plan, model: nn.Module) -> tuple[float, nn.Module]:
    """The flops that remain, and the network, batch-norms folded."""
    return plan.flops / plan.dense_flops, batude_fx.fold(plan.apply(model))


def image(batch: int) -> Tensor:
    """(batch, 3, 224, 224), channels-last."""
    return torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)


def keep_freed_memory() -> None:
    """As the environment variables MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=... do; see `man mallopt`."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def share_of_layers(call: Call) -> float:
    """Of the time of a network in eager torch, what convolutions and linear layers take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            call()
    taken = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    layers = [time for name, time in taken.items() if "conv" in name or "addmm" in name]
    return float(sum(layers) / sum(taken.values()))


def eager(networks: list[nn.Module], _: Path) -> Mapping[int, list[Call]]:
    """torch."""
    ready = [network.to(memory_format=torch.channels_last) for network in networks]
    return {batch: [runs(network, x) for network in ready] for batch, x in ((1, image(1)), (8, image(8)))}


def onnx_runtime(networks: list[nn.Module], folder: Path) -> Mapping[int, list[Call]]:
    """What `export` writes, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = []
    for index, network in enumerate(networks):
        batude_fx.export(network, folder / f"{index}.onnx", example_inputs=torch.zeros(1, 3, 224, 224))
        sessions.append(onnxruntime.InferenceSession(folder / f"{index}.onnx", options))

    def call(session: onnxruntime.InferenceSession, x: Tensor) -> Call:
        return lambda: session.run(None, {"input": x.numpy()})

    images = {batch: torch.randn(batch, 3, 224, 224) for batch in (1, 8)}
    return {batch: [call(session, x) for session in sessions] for batch, x in images.items()}


def latency_budgets() -> Table:
    """Part 2."""
    table = Table(
        "network", "limit", "flops kept", "dense, ms", "compressed, ms", "times faster", "of the limit", "within", "",
        title="Latency budgets, measured afresh",
    )  # fmt: skip
    x = image(1)
    for name, factor in TIMED.items():
        model = timm.create_model(name).eval().to(memory_format=torch.channels_last)
        limit = Budget(latency=f"{factor}x")
        plan = batude_fx.plan(model, limit, example_inputs=x, calibration=None, round_to="auto")
        calls = [runs(network, x) for network in (model, plan.apply(model))]
        for _ in range(REPEATS):
            dense, small = in_turns(calls, name)
            share = factor * small.median / dense.median
            verdict = "ok" if abs(share - 1) <= CLOSE else "MISSED"
            table.add_row(
                name, f"{factor}x", f"{plan.flops / plan.dense_flops:.3f}", str(dense), str(small),
                f"{dense.median / small.median:.3f}x", f"{share:.1%}", f"{CLOSE:.0%}", verdict,
            )  # fmt: skip
    return table


def equal() -> Table:
    """Part 3."""
    table = Table(
        "threads", "flops kept", "time of the dense", "agreement", "flops kept, by latency",
        "time of the dense, by latency", "agreement, by latency", "",
        title="ResNet-50, a latency limit against a flop limit of equal time",
    )  # fmt: skip
    model = batude_fx.fold(inputs.resnet50_torchvision()).to(memory_format=torch.channels_last)
    x = image(1)
    photos, others = inputs.shop_photos("train", 256), inputs.shop_photos("test", 661)
    classes = predicted(model, others)
    by_flops = batude_fx.plan(model, 0.5, example_inputs=x, calibration=photos)
    for threads, keep in product((1, 2), EQUAL):
        torch.set_num_threads(threads)
        plans = [by_flops.at(keep)]
        dense, small = in_turns([runs(model, x), runs(plans[0].apply(model), x)], f"{keep}")
        share = small.median / dense.median
        if share >= 1:
            table.add_row(str(threads), f"{keep:.3f}", f"{share:.3f}", *[""] * 4, "no faster than the dense one")
            continue
        limit = Budget(latency=share)
        plans.append(batude_fx.plan(model, limit, example_inputs=x, calibration=photos, round_to="auto"))
        networks = [plan.apply(model) for plan in plans]
        dense, *times = in_turns([runs(network, x) for network in (model, *networks)], f"{keep}, both")
        agreement = [float((predicted(network, others) == classes).float().mean()) for network in networks]
        cells = [
            [f"{plan.flops / plan.dense_flops:.3f}", f"{one.median / dense.median:.3f}", f"{same:.4f}"]
            for plan, one, same in zip(plans, times, agreement, strict=True)
        ]
        table.add_row(str(threads), *cells[0], *cells[1], "ok" if agreement[1] >= agreement[0] else "MISSED")
    return table


@torch.inference_mode()
def predicted(network: nn.Module, images: Tensor) -> Tensor:
    """(N,) classes."""
    return torch.cat([network(batch).argmax(1) for batch in torch.split(images, 16)])


def runs(network: nn.Module, x: Tensor) -> Call:
    """A call of the network in eager torch."""
    return torch.inference_mode()(lambda: network(x))


def in_turns(calls: list[Call], description: str) -> list[Times]:
    """Seconds of every call, all of them taking turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in track(range(TURNS + 2), description, console=CONSOLE, transient=True):
        for call, times in zip(calls, taken, strict=True):
            start = now()
            call()
            if turn > 1:
                times.append(now() - start)
    return [Times(sorted(times)) for times in taken]


if __name__ == "__main__":
    sys.exit(main())
