"""The quality that `plan` reports beside that on 400 other photos, for three real networks at every level.

Run `make bench-quality`; about an hour on two cores. Calibration sees 256 photos of a shop, of the train split; the 400
photos are of the test split. Writes `docs/data/bench/quality.json`.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batude_fx
from batude_fx.compression.calibrate import Calibration
from batude_fx.quality.comparison import QualityMeter
from batude_fx.quality.quality import Quality
from batude_fx.support.inputs import Inputs
from benchmarks.published import environment, publish
from tests.real import inputs

IMAGENET = inputs.IMAGENET_MEAN, inputs.IMAGENET_STD
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, Any], tuple[float, ...]]] = {
    "ResNet-50": (inputs.resnet50_torchvision, IMAGENET, (0.75, 0.6, 0.5, 0.4, 0.3)),
    "MobileNetV2": (inputs.mobilenet_v2, IMAGENET, (0.9, 0.8)),
    "EfficientNet-Lite0": (inputs.efficientnet_lite0, (inputs.HALF, inputs.HALF), (0.9, 0.8)),
}


@dataclass(frozen=True)
class Row:
    """One compressed network.

    Attributes:
        network: Its name.
        level: What it was compressed by.
        keep: Share of the flops that it may need.
        reported: Quality on the images held back; None for weights only.
        tested: Quality on the 400 photos.
        labelled: Number of 20 labelled photos that are classified correctly.
        seconds: Time of building it, and of calibration for the first budget.
    """

    network: str
    level: str
    keep: float
    reported: Quality | None
    tested: Quality
    labelled: int
    seconds: float

    @property
    def contains(self) -> bool | None:
        """Whether the interval of the reported agreement holds that on the 400 photos; None without one."""
        if not (self.reported and self.reported.agreement and self.tested.agreement):
            return None
        low, high = self.reported.agreement.interval
        return low <= self.tested.agreement.value <= high


def main() -> None:
    """Compress every network at every level and budget, and print how good it is."""
    where = environment()
    print(where)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name, (build, normalization, keeps) in NETWORKS.items():
        for row in _rows(name, build().eval(), normalization, keeps):
            rows.append(row)
            Console(width=150).print(_table([row]))
    table = _table(rows)
    Console(width=150).print(table)
    by_photos = [row.contains for row in rows if row.level == "256 photos"]
    print(f"the reported interval holds the agreement on 400 photos in {sum(map(bool, by_photos))} of {len(by_photos)}")
    publish("quality", table, where)


def _rows(name: str, model: nn.Module, normalization: tuple[Any, Any], keeps: tuple[float, ...]) -> Iterator[Row]:
    photos = inputs.shop_photos("test", 400, *normalization)
    labelled, labels = inputs.labelled_photos(*normalization)
    meter = QualityMeter(model, [Inputs((batch,)) for batch in torch.split(photos, 16)], synthetic=False)
    levels: dict[str, Calibration] = {
        "weights only": None, "data-free": "synthetic", "256 photos": inputs.shop_photos("train", 256, *normalization),
    }  # fmt: skip
    for level, calibration in levels.items():
        start = time.perf_counter()
        first = batude_fx.plan(model, keeps[0], calibration=calibration, example_inputs=photos[:1])
        for keep in keeps:
            small, plan = first.at(keep).build(model)
            seconds = time.perf_counter() - start
            tested = cast("Quality", meter.measure(small))
            yield Row(name, level, keep, plan.quality, tested, _right(small, labelled, labels), seconds)
            start = time.perf_counter()


@torch.no_grad()
def _right(network: nn.Module, labelled: Tensor, labels: Tensor) -> int:
    return int((network.eval()(labelled).argmax(1) == labels).sum())


def _table(rows: list[Row]) -> Table:
    table = Table(
        "network", "level", "kept", "KL on 400 photos", "agreement", "where sure", "labelled", "reported KL",
        "reported agreement", "holds", "s",
    )  # fmt: skip
    for row in rows:
        reported = row.reported
        table.add_row(
            row.network, row.level, f"{row.keep:g}", str(row.tested.divergence), str(row.tested.agreement),
            str(row.tested.sure_agreement), f"{row.labelled} of 20", str(reported.divergence) if reported else "",
            str(reported.agreement) if reported else "", {True: "yes", False: "NO", None: ""}[row.contains],
            f"{row.seconds:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
