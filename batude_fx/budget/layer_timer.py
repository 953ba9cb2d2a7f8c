"""How long the sites of a model take on this machine, dense and at every rank, and how long whole networks take.

A dense layer and its Tucker forms are timed with the inputs that they get in the model: at a few ranks per mode
(`time_table`), with interpolation between them (`interpolation`).

What the sites take one by one is not quite what they take in the network, and not everything is a site. So whole
networks are timed as well, the dense and the compressed one in turns (`LayerTimer.compare`), and
`cost_limits.LatencyModel` draws a line from the one time to the other.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.budget.interpolation import interpolate, measured_ranks
from batude_fx.budget.rank_options import RankOptions
from batude_fx.budget.time_table import LayerInput, TimeTable, fill_
from batude_fx.graph.sites import ConvSite
from batude_fx.graph.surgery import build_skeleton
from batude_fx.support.arrays import Booleans, Floats, Integers
from batude_fx.support.hooks import observe_calls
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import private_copy
from batude_fx.support.progress import track
from batude_fx.support.timing import time_networks
from batude_fx.tucker.ranks import Ranks

_MODEL_SECONDS, _LEAST_TURNS = 3.0, 15  # two networks are compared at least so long and so often


@dataclass
class LayerTimer:
    """Times the sites of one model.

    Args:
        model: Its layers are timed, with the inputs that they get in it; it is bit-identical afterwards.
        sites: Name to site, all of them replaceable.
        inputs: Arguments of one run: the batch that is timed.
        adds_bias: Whether Tucker forms have a bias even where the dense layer has none.

    Attributes:
        calls: Site name to the inputs that the site gets in one run, and how often it gets each.
    """

    model: nn.Module
    sites: Mapping[str, ConvSite]
    inputs: Inputs
    adds_bias: bool
    calls: dict[str, Counter[LayerInput]] = field(init=False, repr=False)
    _table: TimeTable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.calls = _inputs_of_sites(self.model, self.sites, self.inputs)
        self._table = TimeTable.of_device(next(self.model.parameters()).device)

    @cached_property
    def dense_nanoseconds(self) -> int:
        """The time of one run of the dense model."""
        return round(1e9 * self._seconds(self.model)[0])

    def with_times(self, options: Mapping[str, RankOptions], *, only_faster: bool) -> dict[str, RankOptions]:
        """Return the options with nanoseconds as their third cost.

        Args:
            options: Site name to what the site can be.
            only_faster: Whether to leave out what is no faster than the dense layer.
        """
        timed = {}
        for name in track(list(options), "timing layers"):
            timed[name] = self._with_times(name, options[name], only_faster=only_faster)
            self.keep_times()
        return timed

    def compare(self, ranks: Mapping[str, Ranks]) -> int:
        """Return the nanoseconds of the network with some ranks.

        It and the dense one take turns; the ratio of their times is applied to `dense_nanoseconds`, so that all
        networks of one search are measured by the same clock, however busy the machine is at the moment.
        """
        small = build_skeleton(self.model, ranks, ranks if self.adds_bias else ())
        for name in ranks:
            fill_(small.get_submodule(name))
        dense, compressed = self._seconds(self.model, small)
        return round(compressed / dense * self.dense_nanoseconds)

    def keep_times(self) -> None:
        """Write the times that were measured to the file that they are kept in."""
        self._table.write()

    def nanoseconds(self, name: str, ranks: tuple[int, int] | None) -> int:
        """Return the time of all calls of a site in one run, dense or at some ranks."""
        layer = self.model.get_submodule(name)
        calls = self.calls[name].items()
        return sum(count * self._table.look_up(layer, ranks, x, adds_bias=self.adds_bias) for x, count in calls)

    def _seconds(self, *networks: nn.Module) -> list[float]:
        return time_networks(networks, self.inputs, turns=_LEAST_TURNS, seconds=_MODEL_SECONDS)

    def _with_times(self, name: str, options: RankOptions, *, only_faster: bool) -> RankOptions:
        site, is_dense = self.sites[name], options.is_dense
        full = (site.group_out_channels, site.group_in_channels)
        dense = self.nanoseconds(name, None)
        times = np.full(len(options.ranks), dense, np.float64)
        if site.is_pointwise and not is_dense.all():
            ranks = options.ranks[~is_dense, 0]
            grid = measured_ranks(ranks)
            times[~is_dense] = np.interp(ranks, grid, [self.nanoseconds(name, (rank, rank)) for rank in grid])
        elif not site.is_pointwise:
            for rows, cuts in _rows_by_cut_modes(options.ranks, full, ~is_dense):
                times[rows] = self._interpolated(name, options.ranks[rows], cuts, full)
        fixed = len(options.ranks) == 1
        pays = is_dense | (times < dense) | (fixed or not only_faster)
        costs = np.column_stack([options.costs, times.round().astype(np.int64)])
        return replace(
            options, ranks=options.ranks[pays], costs=costs[pays], losses=options.losses[pays],
            dense=np.append(options.dense, dense),
        )  # fmt: skip

    def _interpolated(self, name: str, ranks: Integers, cuts: tuple[bool, bool], full: tuple[int, int]) -> Floats:
        """Return the nanoseconds at ranks (n, 2), of which only the modes that are cut vary."""
        rows, columns = (measured_ranks(ranks[:, mode]) if cut else [full[mode]] for mode, cut in enumerate(cuts))
        times = np.array([[self.nanoseconds(name, (out, in_)) for in_ in columns] for out in rows])
        return interpolate(ranks, rows, columns, times)


def _rows_by_cut_modes(
    ranks: Integers, full: tuple[int, int], among: Booleans
) -> Iterator[tuple[Booleans, tuple[bool, bool]]]:
    """Yield the rows of the options that cut the same modes, and which modes: their modules have the same parts."""
    cut = ranks < full
    for cuts in ((True, True), (True, False), (False, True)):
        rows = (cut == cuts).all(axis=1) & among
        if rows.any():
            yield rows, cuts


def _inputs_of_sites(model: nn.Module, sites: Mapping[str, ConvSite], inputs: Inputs) -> dict[str, Counter[LayerInput]]:
    """Return site name to the inputs that the site gets in one run, and how often."""
    calls: dict[str, Counter[LayerInput]] = {name: Counter() for name in sites}

    def count_input(name: str, args: object, kwargs: object) -> None:
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        calls[name][LayerInput.like(first)] += 1

    with private_copy(model) as copied:
        layers = {name: copied.get_submodule(name) for name in sites}
        with torch.no_grad(), observe_calls(layers, before=count_input):
            inputs.run(copied)
    return calls
