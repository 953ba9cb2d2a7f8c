"""From a saved folder to a program that runs without batude_fx: torch.export, checked against the network.

python -m examples.deploying [FOLDER]
"""

import argparse
from pathlib import Path

import timm
import torch

import batude_fx


def main(folder: Path) -> None:
    """Compress, save, load back, export with a dynamic batch, compare."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()  # yours: pretrained=True
    batude_fx.save(batude_fx.compress(model, 0.5, calibration=None), folder)
    small = batude_fx.load(folder).eval()

    images = torch.randn(4, 3, 224, 224)
    batch = torch.export.Dim("batch", max=256)
    program = torch.export.export(small, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "small.pt2")
    again = torch.export.load(folder / "small.pt2").module()  # needs torch alone

    three = images[:3]
    with torch.no_grad():
        difference = (again(three) - small(three)).abs().max().item()
    written = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {written / 1e6:.1f} MB; largest difference of the exported outputs {difference:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compress, save, export.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/deploying"), help="where all goes")
    main(parser.parse_args().folder)
