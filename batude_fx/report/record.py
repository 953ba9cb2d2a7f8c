"""The record of how a network was compressed, which is attached to the network and saved as `report.json`.

It holds numbers and names only, and is validated when it is read, since a folder may come from an unknown source.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batude_fx.budget.rank_options import RankOptions
from batude_fx.errors import SavedModelError, first_line
from batude_fx.graph.flops import dense_cost
from batude_fx.graph.sites import ConvSite, FoundBy
from batude_fx.quality.quality import Quality, Restoration, Search
from batude_fx.support.arrays import Floats
from batude_fx.support.atomic_files import newest, write_text
from batude_fx.support.user_warning import warn_user
from batude_fx.support.validation import first_mistake, read_limited
from batude_fx.tucker.ranks import Ranks, SiteLoss

FILE = "report.json"
LIBRARIES = ("python", "batude_fx", "torch", "timm", "torchvision", "fvcore", "safetensors")
"""Whose versions a record names."""
_SPECTRUM_POINTS = 64  # intervals between the ranks at which a spectrum is recorded
_MOST_SITES, _MOST_ROUNDS = 5000, 20_000  # in a file from an unknown source, as a report shows all of them
SHARES = 0.75, 0.5, 0.25
"""Shares of the flops of a site at which its loss is predicted; it is measured at the second one."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
AboveZero = Annotated[int, Field(ge=1, lt=2**63)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
RankPair = tuple[AboveZero, AboveZero]
Spectrum = Annotated[tuple[Share, ...], Field(min_length=1, max_length=_SPECTRUM_POINTS + 1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SiteRecord(_Frozen):
    """One convolution before and after compression.

    Attributes:
        name: Qualified name.
        kind: Class of the dense layer.
        in_channels: Input channels, all groups together.
        out_channels: Output channels, all groups together.
        kernel_size: Spatial kernel extents.
        groups: Number of groups.
        found_by: How it was found; see `ConvSite`.
        skip_reason: Why it could not be replaced, or None.
        dense_flops: Multiply-adds before compression.
        flops: Multiply-adds after compression.
        dense_params: Parameters before compression.
        params: Parameters after compression.
        ranks: rank_out and rank_in per group, or None where it stays dense.
        loss: Predicted loss of its ranks; None where it was not predicted.
        spectrum_out: Predicted loss of keeping r directions of mode 0, as a share of that of keeping none, at evenly
            spaced r from 0 to the full rank.
        spectrum_in: The same of mode 1; None at a pointwise site, whose only rank is in `spectrum_out`.
    """

    name: str
    kind: str
    in_channels: AboveZero
    out_channels: AboveZero
    kernel_size: Annotated[tuple[Count, ...], Field(max_length=3)]
    groups: AboveZero
    found_by: FoundBy
    skip_reason: str | None
    dense_flops: Count
    flops: Count
    dense_params: Count
    params: Count
    ranks: RankPair | None
    loss: float | None
    spectrum_out: Spectrum | None
    spectrum_in: Spectrum | None

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"{self.in_channels} > {self.out_channels} channels are no {self.groups} groups")
        return self


class RoundRecord(_Frozen):
    """One round of BC-ADL, in which ranks are chosen anew and the dual variables updated; see `training.rounds`.

    Attributes:
        phase: Phase of the training.
        step: Number of training steps before the round.
        round: Number of the round.
        primal: Relative primal residual.
        dual: Relative dual residual.
        rho: Weight of the penalty after the round.
        flops: Multiply-adds of the network with the ranks of this round.
        keep: Share of the dense network's multiply-adds that these are.
        ranks: Site name to rank_out and rank_in per group; None where the site is dense.
    """

    phase: str
    step: Count
    round: Count
    primal: float
    dual: float
    rho: float
    flops: Count
    keep: float
    ranks: dict[str, RankPair | None]


class TrainingRecord(_Frozen):
    """The training of a network by a recipe.

    Attributes:
        recipe: The resolved recipe, as YAML.
        original_accuracy: Accuracy of the network that one-shot training started from; None without labels.
        accuracy: Accuracy of the compressed network; None without labels.
        rounds: All rounds of BC-ADL.
    """

    recipe: str
    original_accuracy: Share | None
    accuracy: Share | None
    rounds: tuple[RoundRecord, ...]

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        if any(entry.ranks.keys() != self.rounds[0].ranks.keys() for entry in self.rounds):
            raise ValueError("rounds have ranks of different sites")
        return self


class SiteSensitivity(_Frozen):
    """One site, cut while all others stay dense.

    Attributes:
        name: Qualified name.
        flops: Multiply-adds of the dense site.
        predicted: Predicted loss at each of `SHARES`; None where no ranks are so small.
        ranks: rank_out and rank_in at half of the site's flops; None where no ranks are so small.
        measured: Mean KL divergence in nats of the network whose only cut site this is, or the mean relative error of
            its outputs if it is no classifier; None where that was not measured.
    """

    name: str
    flops: Count
    predicted: Annotated[tuple[float | None, ...], Field(min_length=len(SHARES), max_length=len(SHARES))]
    ranks: RankPair | None
    measured: float | None


class Record(_Frozen):
    """How a network was compressed.

    Attributes:
        format: Version of this record's layout.
        model: Class of the network.
        budget: The budget as the user wrote it.
        calibration: By what ranks were chosen: "images", "synthetic", "synthetic noise", "weights only" or "one-shot
            training".
        round_to: Number that the ranks are multiples of.
        seed: Seed of all random numbers.
        dense_flops: Multiply-adds of the original, by fvcore.
        flops: Multiply-adds of the compressed network.
        dense_params: Parameters of the original.
        params: Parameters of the compressed network.
        dense_seconds: Wall time of one forward pass of the original; None if not measured.
        seconds: Wall time of one forward pass of the compressed network; None if not measured.
        quality: How close its outputs are to the original's, on images held back; None if that was not measured.
        weights_measured: Checksum of the compressed network's parameters when its quality was measured.
        search: How the smallest network of a quality was found; None if none was asked for.
        sensitivity: What each site alone costs when it is cut, the most expensive first; empty if not measured.
        restoration: How it was taught by its original; None if it was not.
        weights: Checksum of the original's parameters; None if the network was trained by a recipe.
        sites: All convolutions, in the order of their first call.
        training: The training by a recipe; None if there was none.
        versions: Library to version.
    """

    format: Literal[1] = 1
    model: str
    budget: str
    calibration: str
    round_to: AboveZero
    seed: int
    dense_flops: Count
    flops: Count
    dense_params: Count
    params: Count
    dense_seconds: Seconds | None = None
    seconds: Seconds | None = None
    quality: Quality | None = None
    weights_measured: Count | None = None
    search: Search | None = None
    sensitivity: Annotated[tuple[SiteSensitivity, ...], Field(max_length=_MOST_SITES)] = ()
    restoration: Restoration | None = None
    weights: Count | None = None
    sites: tuple[SiteRecord, ...]
    training: TrainingRecord | None = None
    versions: dict[str, str]

    @model_validator(mode="after")
    def _check_seconds(self) -> Self:
        if (self.dense_seconds is None) != (self.seconds is None):
            raise ValueError("dense_seconds and seconds are given together, or not at all")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = {site.name for site in self.sites}
        if len(names) < len(self.sites):
            raise ValueError("sites have the same name")
        rounds = self.training.rounds if self.training else ()
        if rounds and (unknown := rounds[0].ranks.keys() - names):
            raise ValueError(f"rounds have ranks of {min(unknown)!r}, which is no site")
        return self


def site_records(
    sites: Iterable[ConvSite],
    options: Mapping[str, RankOptions],
    ranks: Mapping[str, Ranks],
    losses: Mapping[str, SiteLoss] | None = None,
) -> tuple[SiteRecord, ...]:
    """Return the record of every site.

    Args:
        sites: All convolutions.
        options: Site name to its rank options, for the sites that can be replaced.
        ranks: Site name to the chosen ranks, for the sites that are replaced.
        losses: Site name to the predicted loss at each rank, where it was predicted.
    """
    losses = losses or {}
    return tuple(_site_record(site, options, ranks.get(site.name), losses.get(site.name)) for site in sites)


def _site_record(
    site: ConvSite, options: Mapping[str, RankOptions], ranks: Ranks | None, loss: SiteLoss | None
) -> SiteRecord:
    dense_flops, dense_params = dense_cost(site)
    flops, params = _cost(options[site.name], ranks) if ranks else (dense_flops, dense_params)
    return SiteRecord(
        **{name: getattr(site, name) for name in SiteRecord.model_fields if hasattr(site, name)},
        dense_flops=dense_flops,
        flops=flops,
        dense_params=dense_params,
        params=params,
        ranks=(ranks.rank_out, ranks.rank_in) if ranks else None,
        loss=_round(loss.out[ranks.rank_out] + loss.in_[ranks.rank_in]) if ranks and loss else None,
        spectrum_out=_sample(loss.out) if loss else None,
        spectrum_in=_sample(loss.in_) if loss and loss.in_.any() else None,
    )


def write(record: Record, folder: Path) -> None:
    """Write `report.json`."""
    write_text(folder / FILE, record.model_dump_json() + "\n")


def read(folder: Path) -> Record | None:
    """Read `report.json`; return None if the folder has none.

    Raises:
        SavedModelError: When the file is broken.
    """
    path = newest(folder) / FILE
    if not path.is_file():
        return None
    try:
        return _checked_counts(Record.model_validate_json(read_limited(path)))
    except ValidationError as error:
        reason = str(first_mistake(error))
    except (OSError, ValueError) as error:
        reason = f"{first_line(error)}."
    raise SavedModelError(f"{path} is broken: {reason} The network is loaded without it; remove it.")


def read_or_warn(folder: Path) -> Record | None:
    """Read `report.json`; return None if the folder has none, or a broken one, as the network does not depend on it.

    Warns:
        UserWarning: When the file is broken.
    """
    try:
        return read(folder)
    except SavedModelError as error:
        warn_user(str(error))
        return None


def _checked_counts(record: Record) -> Record:
    """Return a record that was read; refuse one that no report could show.

    Raises:
        ValueError: When it has too many sites or rounds.
    """
    rounds = len(record.training.rounds) if record.training else 0
    for count, most, kind in ((len(record.sites), _MOST_SITES, "sites"), (rounds, _MOST_ROUNDS, "rounds")):
        if count > most:
            raise ValueError(f"it has {count:,} {kind}, and a report shows at most {most:,}")
    return record


def _cost(options: RankOptions, ranks: Ranks) -> tuple[int, int]:
    row = np.flatnonzero((options.ranks == (ranks.rank_out, ranks.rank_in)).all(axis=1))[-1]
    flops, params, *_ = options.costs[row].tolist()
    return flops, params


def _sample(loss: Floats) -> tuple[float, ...]:
    """Return the loss at evenly spaced ranks from 0 to the full rank, as shares of the loss at rank 0."""
    full_rank = len(loss) - 1
    ranks = np.unique(np.linspace(0, full_rank, min(_SPECTRUM_POINTS, full_rank) + 1).round().astype(int))
    return tuple(_round(value / max(loss[0], sys.float_info.min)) for value in loss[ranks])


def _round(number: float) -> float:
    """Round to four significant digits, to keep `report.json` short."""
    return float(f"{number:.4g}")
