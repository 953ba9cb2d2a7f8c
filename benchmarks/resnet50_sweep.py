"""Agreement and time of a ResNet-50 with ImageNet weights at seven budgets: table and plot of the home page.

Run `make bench-resnet50`; about ten minutes on two cores. The network is calibrated once with 256 photos of a shop.
Agreement with the original is measured on 400 other photos of that shop, time on one image, all networks alternating.
Writes `docs/data/resnet50.json` and `docs/images/resnet50.png`.
"""

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from rich.console import Console
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

import batude_fx
from batude_fx.compression import sweep
from batude_fx.evaluation import scores
from batude_fx.report import figures
from batude_fx_cli.tables import sweep_table
from tests.real import inputs

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Calibrate, measure every budget, write the results."""
    model = inputs.resnet50_timm()
    cast("dict[str, object]", model.pretrained_cfg)["crop_pct"] = 1.0  # the photos are cropped already
    plan = batude_fx.plan(model, BUDGETS[-1], calibration=inputs.shop_photos("train", 256))
    with TemporaryDirectory() as folder:
        write_photos(inputs.shop_photos("test", 400, (0, 0, 0), (1, 1, 1)), Path(folder))
        points = sweep.sweep(model, plan, BUDGETS, scores.find_photos(Path(folder)))
    about = {
        "command": "make bench-resnet50", "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("batude-fx", "torch", "timm")},
    }  # fmt: skip
    data = {"about": about, "points": [asdict(point) for point in points]}
    (DOCS / "data" / "resnet50.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    figures.write_png(figures.sweep_picture(points), DOCS / "images" / "resnet50.png")
    Console().print(sweep_table("ResNet-50", points))


def write_photos(photos: Tensor, folder: Path) -> None:
    """Write photos (N, 3, 224, 224) in [0, 1] as PNG files."""
    for index, photo in enumerate(photos):
        to_pil_image(photo).save(folder / f"{index:03}.png")


if __name__ == "__main__":
    main()
