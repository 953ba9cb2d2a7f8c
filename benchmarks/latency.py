"""Speed-up of compressed networks relative to their flop ratio, and whether latency budgets hold.

Run `make bench-latency`, or `python -m benchmarks.latency [--parts ...]`; forty minutes on idle cores. Networks run on
one thread with batches of 1 and 8. The dense network and its compressed copies run alternately in one process; the
tables show medians of 21 turns with the fastest and the slowest turn. In torch, everything is channels-last.

1. The speed-up divided by the flop ratio, in eager torch and in ONNX Runtime: ResNet-50 (ImageNet weights, calibrated
   with 256 shop photos) at 0.5 and 0.3 of the flops, and VGG-16-BN (random weights, weights only, linear layers too) at
   0.5 and 0.3 of the flops and of the parameters. Batch-norms are folded on both sides. Ranks by "flops" are multiples
   of 32. Ranks by "flops, time" also have a limit on the time of one image in eager torch, which demands the least
   ratio. "At most" is the ratio if layers took exactly their share of the flops and everything else took as long as
   before; eager torch runs activations, additions and pooling separately.
2. Latency budgets, measured three times after the compression: ResNet-50 and MobileNetV3 in eager torch, with
   batch-norms not folded. The limit must be met within 5 %.
3. Agreement with the original on 661 other photos: ResNet-50 at 0.6, 0.5 and 0.4 of its flops with ranks in multiples
   of 8, and ResNet-50 under a latency limit equal to the measured time of that network; in eager torch, batch-norms
   folded, on one thread and on two, the dense network and both others running alternately.

glibc is set to keep freed memory: by default it returns large tensors to the system, and page faults take up to a tenth
of the time of VGG-16-BN on eight images.

The exit code is 1 if a limit is missed.
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

BUDGETS = {0.5: 0.9, 0.3: 0.85}  # fraction of flops kept: least speed-up over flop ratio
MARGIN = 1.01  # factor by which a limit on the time demands more than the least ratio
ROUND_TO, TURNS = 32, 21
TIMED = {"resnet50": 1.8, "mobilenetv3_large_100": 1.1}  # speed-up demanded
CLOSE, REPEATS = 0.05, 3
EQUAL = (0.6, 0.5, 0.4)  # fraction of flops kept
CONSOLE = Console(width=120)

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """The seconds of all turns of one network, sorted."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median seconds."""
        return self.seconds[len(self.seconds) // 2]

    def __str__(self) -> str:
        low, middle, high = (1000 * seconds for seconds in (self.seconds[0], self.median, self.seconds[-1]))
        return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> int:
    """Measure the chosen parts, print and publish their tables."""
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
    """Measure part 1, the speed-up over the flop ratio."""
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
        # 90 % of VGG's parameters are in linear layers, which have few flops but take time to read for one image.
        budgets = [Budget(flops=keep, params=keep if model is vgg else None) for keep in BUDGETS]
        plan = batude_fx.plan(model, budgets[0], round_to=ROUND_TO, **options)
        dense = batude_fx.fold(model).to(memory_format=torch.channels_last)
        small = [(keep, "flops", *build(plan.at(budget), model)) for keep, budget in zip(BUDGETS, budgets, strict=True)]
        by_time = list(small)
        for (keep, least), budget in zip(BUDGETS.items(), budgets, strict=True):
            limited = budget.model_copy(update={"latency": keep / least / MARGIN})
            plan = batude_fx.plan(dense, limited, example_inputs=image(1), round_to="auto", **options)
            by_time.append((keep, "flops, time", *build(plan, dense)))
        for runtime, callers, compressed in (("eager", eager, by_time), ("ONNX Runtime", onnx_runtime, small)):
            with TemporaryDirectory() as folder:
                networks = [dense, *(network for *_, network in compressed)]
                for batch, calls in callers(networks, Path(folder)).items():
                    before, *after = in_turns(calls, f"{name}, {runtime}, batch {batch}")
                    layers = share_of_layers(calls[0]) if runtime == "eager" else None
                    for (keep, ranks, share, _), times in zip(compressed, after, strict=True):
                        faster = before.median / times.median
                        most = f"{share / (share * layers + 1 - layers):.2f}" if layers else ""
                        verdict = "ok" if faster * share >= BUDGETS[keep] else "MISSED"
                        table.add_row(
                            name, runtime, str(batch), ranks, f"{share:.3f}", str(before), str(times),
                            f"{faster:.2f}x", f"{faster * share:.2f}", most, str(BUDGETS[keep]), verdict,
                        )  # fmt: skip
    return table


def build(plan: batude_fx.Plan, model: nn.Module) -> tuple[float, nn.Module]:
    """Return the fraction of flops that remains, and the compressed network with batch-norms folded."""
    return plan.flops / plan.dense_flops, batude_fx.fold(plan.apply(model))


def image(batch: int) -> Tensor:
    """Return random images (batch, 3, 224, 224), channels-last."""
    return torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)


def keep_freed_memory() -> None:
    """Keep freed memory, as MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=... do; see `man mallopt`."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def share_of_layers(call: Call) -> float:
    """Return the share of convolutions and linear layers in the time of a network in eager torch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            call()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    layers = [time for name, time in times.items() if "conv" in name or "addmm" in name]
    return float(sum(layers) / sum(times.values()))


def eager(networks: list[nn.Module], _: Path) -> Mapping[int, list[Call]]:
    """Return, for each batch size, the calls of the networks in eager torch."""
    ready = [network.to(memory_format=torch.channels_last) for network in networks]
    return {batch: [runs(network, x) for network in ready] for batch, x in ((1, image(1)), (8, image(8)))}


def onnx_runtime(networks: list[nn.Module], folder: Path) -> Mapping[int, list[Call]]:
    """Return, for each batch size, the calls of the exported networks in ONNX Runtime on one thread."""
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
    """Measure part 2, the latency budgets."""
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
    """Measure part 3, a latency limit against a flop limit of equal time."""
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
        agreements = [float((predicted(network, others) == classes).float().mean()) for network in networks]
        cells = [
            [f"{plan.flops / plan.dense_flops:.3f}", f"{wall.median / dense.median:.3f}", f"{agreement:.4f}"]
            for plan, wall, agreement in zip(plans, times, agreements, strict=True)
        ]
        table.add_row(str(threads), *cells[0], *cells[1], "ok" if agreements[1] >= agreements[0] else "MISSED")
    return table


@torch.inference_mode()
def predicted(network: nn.Module, images: Tensor) -> Tensor:
    """Return the predicted classes, (N,)."""
    return torch.cat([network(batch).argmax(1) for batch in torch.split(images, 16)])


def runs(network: nn.Module, x: Tensor) -> Call:
    """Return a call of the network in eager torch."""
    return torch.inference_mode()(lambda: network(x))


def in_turns(calls: list[Call], description: str) -> list[Times]:
    """Return the seconds of every call; the calls run alternately."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in track(range(TURNS + 2), description, console=CONSOLE, transient=True):
        for call, times in zip(calls, seconds, strict=True):
            start = now()
            call()
            if turn > 1:
                times.append(now() - start)
    return [Times(sorted(times)) for times in seconds]


if __name__ == "__main__":
    sys.exit(main())
