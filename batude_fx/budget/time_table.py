"""How long one layer takes on this machine, dense or in Tucker form: measured once, then read from a file.

What is measured is kept by layer, ranks, input, dtype, device, threads and versions under
`${BATUDE_FX_CACHE:-~/.cache/batude_fx}/latency`, so that a second call on the same machine takes no time. The shortest
of several runs counts, as other work on the machine can only add to the time of a layer.
"""

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from batude_fx.support.atomic_files import write_text
from batude_fx.support.timing import time_calls
from batude_fx.tucker.modules import CHANNELS_LAST, build, is_channels_last
from batude_fx.tucker.ranks import Ranks

_SECONDS, _LEAST_RUNS = 0.03, 7  # a layer is timed at least so long and so often


@dataclass(frozen=True)
class LayerInput:
    """The tensor that a layer gets in one call.

    Attributes:
        shape: Its shape.
        channels_last: Whether it is channels-last in memory.
    """

    shape: tuple[int, ...]
    channels_last: bool

    @classmethod
    def like(cls, x: Tensor) -> Self:
        """Describe a tensor."""
        return cls(tuple(x.shape), is_channels_last(x))

    def tensor(self, like: Tensor) -> Tensor:
        """Return noise of this shape, in the dtype and on the device of another tensor."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
        return x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if self.channels_last else x


@dataclass
class TimeTable:
    """Times of layers on one device of this machine.

    Attributes:
        path: The file that they are kept in.
        nanoseconds: A layer with its ranks and its input, in words, to the time of one call.
    """

    path: Path
    nanoseconds: dict[str, int]
    _changed: bool = False

    @classmethod
    def of_device(cls, device: torch.device) -> Self:
        """Return the table of a device, with what earlier calls measured."""
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        machine = f"{device.type} {processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            machine += f", {torch.get_float32_matmul_precision()}, tf32 {cudnn.allow_tf32}, benchmark {cudnn.benchmark}"
        folder = Path(os.environ.get("BATUDE_FX_CACHE") or "~/.cache/batude_fx").expanduser() / "latency"
        path = folder / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
        return cls(path, _read(path))

    def look_up(self, layer: nn.Module, ranks: tuple[int, int] | None, x: LayerInput, *, adds_bias: bool) -> int:
        """Return the nanoseconds of one call, and measure them where the table does not have them.

        Args:
            layer: The dense layer.
            ranks: rank_out and rank_in of its Tucker form; None for the dense layer itself.
            x: What it is called with.
            adds_bias: Whether the Tucker form has a bias even where the dense layer has none.
        """
        weight = cast("Tensor", layer.weight)
        form = "dense" if ranks is None else f"ranks {ranks[0]}, {ranks[1]}" + ", bias" * adds_bias
        layout = "channels last" if x.channels_last else "contiguous"
        key = f"{layer!r}, {form}, {x.shape} {layout}, {weight.dtype}, weight {weight.stride()}"
        if key not in self.nanoseconds:
            form_to_time = layer if ranks is None else fill_(build(layer, Ranks(*ranks), add_bias=adds_bias))
            self.nanoseconds[key] = round(1e9 * _seconds(form_to_time, x.tensor(weight)))
            self._changed = True
        return self.nanoseconds[key]

    def write(self) -> None:
        """Add what was measured to the file. Where nothing can be written, the next call measures again."""
        if self._changed:
            self.nanoseconds = _read(self.path) | self.nanoseconds  # another process may have measured, too
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps(self.nanoseconds, indent=0) + "\n")
            self._changed = False


@torch.no_grad()
def fill_(form: nn.Module) -> nn.Module:
    """Give a layer weights that keep the size of what passes: numbers close to zero slow processors down."""
    for parameter in form.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.normal_(std=(2 / fan_in) ** 0.5, generator=torch.Generator(parameter.device).manual_seed(0))
    return form


def _seconds(layer: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return time_calls([lambda: layer(x)], _LEAST_RUNS, _SECONDS, x.device, min)[0]


def _read(path: Path) -> dict[str, int]:
    """Read the times in a file; none where it is missing or broken, so that all is measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(content, dict) and all(isinstance(time, int) and time > 0 for time in content.values())
    return content if sound else {}


def _processor() -> str:
    """Return the name of the processor, and which of its instructions torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())} {torch.backends.cpu.get_cpu_capability()}"
