"""How long the sites of a model take on this machine, dense and at every rank: measured, kept, interpolated.

A dense layer and its Tucker forms are timed with the inputs that they get in the model. Time at ranks is nearly
`a r_in + b r_in r_out + c r_out`, so a few points per mode and bilinear interpolation between them stand for all
ranks. What is measured is kept by layer, input, dtype, device, threads and versions under
`${BATUDE_FX_CACHE:-~/.cache/batude_fx}/latency`, so that a second call on the same machine takes seconds.

Of a layer the shortest of several runs counts: other work on the machine only adds to it.

What the sites take one by one is not quite what they take in the network, and not everything is a site. So the whole
network is timed as well, dense and compressed in turns (`Stopwatch.compare`), and `capacity.Account` draws a line from
what its sites foresee to what it takes.
"""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.budget.rank_options import RankOptions
from batude_fx.graph.sites import ConvSite
from batude_fx.graph.surgery import build_skeleton
from batude_fx.support.arrays import Floats, Integers
from batude_fx.support.atomic_files import atomic_file
from batude_fx.support.hooks import observe_calls
from batude_fx.support.model_state import eval_and_restore
from batude_fx.support.progress import track
from batude_fx.support.timing import time_calls, time_networks
from batude_fx.tucker.modules import CHANNELS_LAST, build, is_channels_last
from batude_fx.tucker.ranks import Ranks

_POINTS = 6  # per mode
_LAYER_SECONDS, _LEAST_RUNS = 0.03, 7  # per measured layer
_MODEL_SECONDS, _LEAST_TURNS = 3.0, 15  # per comparison of two networks
_MULTIPLES = (4, 8, 16, 32)
_WORTH = 0.95  # of the speed of multiples of 32, from which on a finer multiple is as good
_PROBED = 6  # kinds of layers that the multiple is chosen on, those that take the longest


@dataclass(frozen=True)
class _Input:
    """What a site gets in one call.

    Attributes:
        shape: Of the tensor.
        last: Whether it is channels-last in memory.
    """

    shape: tuple[int, ...]
    last: bool

    @classmethod
    def of(cls, x: Tensor) -> Self:
        return cls(tuple(x.shape), is_channels_last(x))

    def tensor(self, like: Tensor) -> Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
        return x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if self.last else x


@dataclass
class LayerTimer:
    """Times the sites of one model.

    Args:
        model: In whose layers and inputs the times are taken; it is bit-identical afterwards.
        sites: Name to site, all of them replaceable.
        inputs: Arguments of one run: the batch that is timed.
        adds_bias: Whether Tucker forms have a bias even where the dense layer has none.
    """

    model: nn.Module
    sites: Mapping[str, ConvSite]
    inputs: tuple[object, ...]
    adds_bias: bool
    _calls: dict[str, Counter[_Input]] = field(init=False, repr=False)
    _table: "_Table" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._calls = _observed(self.model, self.sites, self.inputs)
        self._table = _Table.of(next(self.model.parameters()).device)

    @cached_property
    def dense_nanoseconds(self) -> int:
        """Of one run of the model."""
        return round(1e9 * self._seconds(self.model)[0])

    def multiples(self) -> Sequence[int]:
        """The smallest rank multiple that is nearly as fast, flop by flop, as multiples of 32; then the finer ones."""
        taken: Counter[Hashable] = Counter()
        examples: dict[Hashable, str] = {}
        for name, calls in self._calls.items():
            if self._widest(name) >= 3 * _MULTIPLES[-1]:
                kind = repr(self.model.get_submodule(name)), frozenset(calls.items())
                taken[kind] += self._nanoseconds(name, None)
                examples[kind] = name
        probed = [examples[kind] for kind, _ in taken.most_common(_PROBED)]
        if not probed:
            return _MULTIPLES[1::-1]  # 8, as by default, and finer
        speeds = [[self._speed(name, multiple) for multiple in _MULTIPLES] for name in probed]
        self._table.write()
        best = next(index for index, speed in enumerate(np.mean(speeds, axis=0)) if speed >= _WORTH)
        return _MULTIPLES[best::-1]

    def priced(self, options: Mapping[str, RankOptions], *, only_faster: bool) -> dict[str, RankOptions]:
        """The options with nanoseconds as their third cost.

        Args:
            options: What each site can be.
            only_faster: Whether to leave out what is no faster than the dense layer.
        """
        priced = {}
        for name in track(list(options), "timing layers"):
            priced[name] = self._priced(name, options[name], only_faster=only_faster)
            self._table.write()
        return priced

    def compare(self, ranks: Mapping[str, Ranks]) -> int:
        """Nanoseconds of the model with some ranks, it and the dense one taking turns, as if that took what it did."""
        small = build_skeleton(self.model, ranks, ranks if self.adds_bias else ())
        for name in ranks:
            _fill_(small.get_submodule(name))
        before, after = self._seconds(self.model, small)
        return round(after / before * self.dense_nanoseconds)

    def _seconds(self, *networks: nn.Module) -> list[float]:
        return time_networks(networks, self.inputs, turns=_LEAST_TURNS, seconds=_MODEL_SECONDS)

    def _priced(self, name: str, options: RankOptions, *, only_faster: bool) -> RankOptions:
        site = self.sites[name]
        full = (site.group_out_channels, site.group_in_channels)
        dense = self._nanoseconds(name, None)
        is_dense = options.is_dense
        times = np.full(len(options.ranks), dense, np.float64)
        rest = ~is_dense
        if site.is_pointwise and rest.any():
            grid = _grid(options.ranks[rest, 0])
            times[rest] = np.interp(options.ranks[rest, 0], grid, [self._nanoseconds(name, (r, r)) for r in grid])
        elif not site.is_pointwise:
            for rows, modes in _forms(options.ranks, full, rest):
                times[rows] = self._interpolated(name, options.ranks[rows], modes, full)
        costs = np.column_stack([options.costs, times.round().astype(np.int64)])
        fixed = len(options.ranks) == 1
        pays = is_dense | (times < dense) | (fixed or not only_faster)
        return replace(
            options, ranks=options.ranks[pays], costs=costs[pays], losses=options.losses[pays],
            dense=np.append(options.dense, dense),
        )  # fmt: skip

    def _interpolated(self, name: str, ranks: Integers, modes: tuple[bool, bool], full: tuple[int, int]) -> Floats:
        """Nanoseconds at ranks (n, 2), of which only the modes that are cut vary."""
        rows, columns = (_grid(ranks[:, mode]) if cut else [full[mode]] for mode, cut in enumerate(modes))
        times = np.array([[self._nanoseconds(name, (out, in_)) for in_ in columns] for out in rows])
        across = np.stack([np.interp(ranks[:, 1], columns, line) for line in times])  # (rows, n)
        if len(rows) == 1:
            return cast("Floats", across[0])
        upper = np.clip(np.searchsorted(rows, ranks[:, 0]), 1, len(rows) - 1)
        low, high = np.array(rows)[upper - 1], np.array(rows)[upper]
        share = (ranks[:, 0] - low) / (high - low)
        each = np.arange(len(ranks))
        return cast("Floats", (1 - share) * across[upper - 1, each] + share * across[upper, each])

    def _speed(self, name: str, multiple: int) -> float:
        """Of ranks that are multiples of this and of nothing larger, relative to multiples of 32 around them."""
        step = _MULTIPLES[-1]
        low = max(step, self._widest(name) // 3 // step * step)
        ranks = [low + odd * multiple for odd in range(1, step // multiple, 2)] or [low]
        ends = [self._nanoseconds(name, (rank, rank)) for rank in (low, low + step)]
        between = np.interp(ranks, (low, low + step), ends)
        return float(np.mean(between / [self._nanoseconds(name, (rank, rank)) for rank in ranks]))

    def _widest(self, name: str) -> int:
        site = self.sites[name]
        return min(site.group_in_channels, site.group_out_channels) if site.groups == 1 else 0

    def _nanoseconds(self, name: str, ranks: tuple[int, int] | None) -> int:
        """Of all calls of a site in one run, dense or at some ranks."""
        layer = self.model.get_submodule(name)
        calls = self._calls[name].items()
        return sum(count * self._table.look_up(layer, ranks, x, adds_bias=self.adds_bias) for x, count in calls)


def _forms(
    ranks: Integers, full: tuple[int, int], among: np.ndarray[Any, Any]
) -> Iterator[tuple[np.ndarray[Any, Any], tuple[bool, bool]]]:
    """Rows of the options that cut the same modes, and which modes these are."""
    cut = ranks < full
    for modes in ((True, True), (True, False), (False, True)):
        rows = (cut == modes).all(axis=1) & among
        if rows.any():
            yield rows, modes


def _grid(ranks: Integers) -> list[int]:
    """A few of the ranks, the first and the last among them, more of the small ones."""
    known = np.unique(ranks)
    rows = np.unique(np.geomspace(1, len(known), min(_POINTS, len(known))).round().astype(int)) - 1
    return cast("list[int]", known[rows].tolist())


@dataclass
class _Table:
    """What was measured on this machine.

    Attributes:
        path: Where it is kept.
        known: A layer with its ranks and input, in words, to nanoseconds.
    """

    path: Path
    known: dict[str, int]
    _changed: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Self:
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        where = f"{device.type} {processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            where += f", {torch.get_float32_matmul_precision()}, tf32 {cudnn.allow_tf32}, benchmark {cudnn.benchmark}"
        folder = Path(os.environ.get("BATUDE_FX_CACHE") or "~/.cache/batude_fx").expanduser() / "latency"
        path = folder / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.json"
        return cls(path, _read(path))

    def look_up(self, layer: nn.Module, ranks: tuple[int, int] | None, x: _Input, *, adds_bias: bool) -> int:
        weight = cast("Tensor", layer.weight)
        form = "dense" if ranks is None else f"ranks {ranks[0]}, {ranks[1]}" + ", bias" * adds_bias
        layout = "channels last" if x.last else "contiguous"
        key = f"{layer!r}, {form}, {x.shape} {layout}, {weight.dtype}, weight {weight.stride()}"
        if key not in self.known:
            timed = layer if ranks is None else _fill_(build(layer, Ranks(*ranks), add_bias=adds_bias))
            self.known[key] = round(1e9 * _seconds(timed, x.tensor(weight)))
            self._changed = True
        return self.known[key]

    def write(self) -> None:
        """Add to what is kept; where nothing can be written, all is measured again the next time."""
        if self._changed:
            self.known = _read(self.path) | self.known  # another process may have measured, too
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(self.path) as text:
                    text.write_text(json.dumps(self.known, indent=0) + "\n", encoding="utf-8")
            self._changed = False


def _read(path: Path) -> dict[str, int]:
    """A broken table is measured anew."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    sound = isinstance(known, dict) and all(isinstance(one, int) and one > 0 for one in known.values())
    return known if sound else {}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())} {torch.backends.cpu.get_cpu_capability()}"


@torch.no_grad()
def _fill_(form: nn.Module) -> nn.Module:
    """Some weights that keep the size of what passes: numbers close to zero slow processors down."""
    for parameter in form.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.normal_(std=(2 / fan_in) ** 0.5, generator=torch.Generator(parameter.device).manual_seed(0))
    return form


def _seconds(layer: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return time_calls([lambda: layer(x)], _LEAST_RUNS, _LAYER_SECONDS, x.device, min)[0]


def _observed(
    model: nn.Module, sites: Mapping[str, ConvSite], inputs: tuple[object, ...]
) -> dict[str, Counter[_Input]]:
    """What every site gets in one run."""
    calls: dict[str, Counter[_Input]] = {name: Counter() for name in sites}

    def count_input(name: str, args: object, kwargs: object) -> None:
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        calls[name][_Input.of(first)] += 1

    layers = {name: model.get_submodule(name) for name in sites}
    with eval_and_restore(model), torch.no_grad(), observe_calls(layers, before=count_input):
        model(*inputs)
    return calls
