"""How a network was compressed: what its report shows. It travels with the network and is saved as `report.json`.

Read back from folders of strangers, hence checked like their config; numbers and names only.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from batude_fx.budget.rank_options import RankOptions
from batude_fx.errors import SavedModelError
from batude_fx.graph.flops import dense_cost
from batude_fx.graph.sites import ConvSite, FoundBy
from batude_fx.support.arrays import Floats
from batude_fx.support.atomic_files import atomic_file
from batude_fx.tucker.ranks import Ranks, SiteLoss

FILE = "report.json"
_POINTS = 64  # of a spectrum
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = tuple[Count, Count]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SiteRecord(_Frozen):
    """One convolution before and after.

    Attributes:
        name: Qualified name.
        kind: Class of the dense layer.
        in_channels: All groups together.
        out_channels: All groups together.
        kernel_size: Extents.
        groups: Number of groups.
        found_by: How discovery came by it.
        skip_reason: Why it could not be replaced, or None.
        dense_flops: Multiply-adds before.
        flops: Multiply-adds after.
        dense_params: Parameters before.
        params: Parameters after.
        ranks: rank_out and rank_in per group, or None where it stays dense.
        loss: Predicted loss of its ranks; None where it was not predicted.
        spectrum_out: At evenly spaced ranks from 0 to the full one, the share of mode 0's loss that they leave.
        spectrum_in: Likewise of mode 1; None at a pointwise site, which has one rank.
    """

    name: str
    kind: str
    in_channels: Count
    out_channels: Count
    kernel_size: tuple[Count, ...]
    groups: Count
    found_by: FoundBy
    skip_reason: str | None
    dense_flops: Count
    flops: Count
    dense_params: Count
    params: Count
    ranks: Pair | None
    loss: float | None
    spectrum_out: tuple[float, ...] | None
    spectrum_in: tuple[float, ...] | None


class RoundRecord(_Frozen):
    """One round of BC-ADL: see `training.rounds`.

    Attributes:
        phase: Of the training.
        step: Training steps before it.
        round: Its number.
        primal: Relative primal residual.
        dual: Relative dual residual.
        rho: Weight of the penalty from then on.
        flops: Multiply-adds of the network with the ranks as they stood.
        keep: Their share of the dense network's.
        ranks: Site name to rank_out and rank_in per group; None where dense.
    """

    phase: str
    step: Count
    round: Count
    primal: float
    dual: float
    rho: float
    flops: Count
    keep: float
    ranks: dict[str, Pair | None]


class TrainingRecord(_Frozen):
    """What training did.

    Attributes:
        recipe: The resolved recipe, as YAML.
        original_accuracy: Of the network that one-shot training started from.
        accuracy: Of the compressed network.
        rounds: Every round of BC-ADL.
    """

    recipe: str
    original_accuracy: Share
    accuracy: Share
    rounds: tuple[RoundRecord, ...]


class Record(_Frozen):
    """How a network was compressed.

    Attributes:
        format: Of this record.
        model: Class of the network.
        budget: In the user's words.
        calibration: What the ranks were judged by.
        round_to: Multiple of the ranks.
        seed: Of everything random.
        dense_flops: Multiply-adds of the original, by fvcore.
        flops: Multiply-adds of the compressed network.
        dense_params: Parameters of the original.
        params: Parameters of the compressed network.
        dense_seconds: Wall time of one run of the original, where it was measured.
        seconds: That of the compressed network.
        weights: Checksum of the original's parameters, where it was not trained here.
        sites: Every convolution, in the order of its first call.
        training: Where the network was trained by a recipe.
        versions: Of the libraries.
    """

    format: Literal[1] = 1
    model: str
    budget: str
    calibration: str
    round_to: Count
    seed: int
    dense_flops: Count
    flops: Count
    dense_params: Count
    params: Count
    dense_seconds: Seconds | None = None
    seconds: Seconds | None = None
    weights: Count | None = None
    sites: tuple[SiteRecord, ...]
    training: TrainingRecord | None = None
    versions: dict[str, str]


def site_records(
    sites: Iterable[ConvSite],
    options: Mapping[str, RankOptions],
    ranks: Mapping[str, Ranks],
    judged: Mapping[str, SiteLoss] | None = None,
) -> tuple[SiteRecord, ...]:
    """Every site before and after.

    Args:
        sites: All convolutions.
        options: Site name to what it could be, for those that can be replaced.
        ranks: Site name to its ranks, for those that are replaced.
        judged: Site name to the losses of its ranks, where they were predicted.
    """
    records = []
    for site in sites:
        taken, loss = ranks.get(site.name), (judged or {}).get(site.name)
        dense = dense_cost(site)
        after = _cost(options[site.name], taken) if taken else dense
        records.append(
            SiteRecord(
                **{name: getattr(site, name) for name in SiteRecord.model_fields if hasattr(site, name)},
                dense_flops=dense[0],
                flops=after[0],
                dense_params=dense[1],
                params=after[1],
                ranks=(taken.rank_out, taken.rank_in) if taken else None,
                loss=_rounded(loss.out[taken.rank_out] + loss.in_[taken.rank_in]) if taken and loss else None,
                spectrum_out=_sampled(loss.out) if loss else None,
                spectrum_in=_sampled(loss.in_) if loss and loss.in_.any() else None,
            )
        )
    return tuple(records)


def write(record: Record, folder: Path) -> None:
    """Write `report.json`."""
    with atomic_file(folder / FILE) as text:
        text.write_text(record.model_dump_json() + "\n", encoding="utf-8")


def read(folder: Path) -> Record | None:
    """Read `report.json`; None where there is none.

    Raises:
        SavedModelError: When it is broken.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SavedModelError(
            f"{path} is broken: {where}: {first['msg']}. Remove it; the network does without."
        ) from None


def _cost(options: RankOptions, ranks: Ranks) -> tuple[int, int]:
    row = np.flatnonzero((options.ranks == (ranks.rank_out, ranks.rank_in)).all(axis=1))[-1]
    flops, params, *_ = options.costs[row].tolist()
    return flops, params


def _sampled(tail: Floats) -> tuple[float, ...]:
    """At evenly spaced ranks from 0 to the full one; the first is 1."""
    last = len(tail) - 1
    rows = np.unique(np.linspace(0, last, min(_POINTS, last) + 1).round().astype(int))
    return tuple(_rounded(one / max(tail[0], sys.float_info.min)) for one in tail[rows])


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
