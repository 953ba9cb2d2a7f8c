"""Export a compressed network to files that run without batude_fx: ONNX, OpenVINO and torch.export.

python -m examples.deploying [FOLDER]
"""

import argparse
from pathlib import Path

import timm
import torch

import batude_fx


def main(folder: Path) -> None:
    """Compress, save, load, and export to four files."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()  # use pretrained=True
    batude_fx.save(batude_fx.compress(model, 0.5, calibration=None), folder / "small")
    small = batude_fx.load(folder / "small")

    photos = torch.randn(32, 3, 224, 224)  # use your own, normalized as for evaluation
    for name, images in (
        ("small.onnx", None),
        ("small.xml", None),  # OpenVINO; the weights are in small.bin
        ("small.pt2", None),  # torch.export
        ("small-int8.onnx", photos),
    ):
        comparison = batude_fx.export(small, folder / name, int8=images)
        weights = (folder / name).with_suffix(".bin") if name.endswith(".xml") else folder / name
        size = weights.stat().st_size / 1e6
        print(f"{name}: {size:.1f} MB; squared error of the outputs {comparison.relative_error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compress, save, export.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/deploying"), help="output folder")
    main(parser.parse_args().folder)
