"""A YOLO of ultralytics at 0.6 of its flops: compressed, fine-tuned, used by `predict`, saved, loaded and exported.

pip install ultralytics
python -m examples.yolo FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

import batude_fx


def main(folder: Path) -> None:
    """Compress a YOLO and do with it what its users do."""
    torch.manual_seed(0)
    yolo = YOLO("yolo11n.yaml")  # use yolo11n.pt, or a checkpoint of your own
    picture = torch.rand(1, 3, 320, 320)  # use photos, as (N, 3, H, W) from 0 to 1, and pass calibration=photos

    dense = yolo.model
    yolo.model = batude_fx.compress(dense, 0.6, example_inputs=picture)

    # Fine-tuning in a loop of your own; its trainer takes the network from `Trainer.get_model`.
    yolo.model.train().args = get_cfg()
    optimizer = torch.optim.SGD(yolo.model.parameters(), 1e-3)
    batch = {"img": picture, "cls": torch.zeros(1, 1), "batch_idx": torch.zeros(1), "bboxes": torch.full((1, 4), 0.5)}
    yolo.model(batch)[0].sum().backward()
    optimizer.step()
    yolo.model.eval()

    # `predict` fuses batch-norms in ordinary networks; a compressed one is left as it is.
    (result,) = yolo.predict(np.zeros((320, 320, 3), np.uint8), imgsz=320, conf=1e-9, verbose=False)
    print(f"{len(result.boxes)} boxes")

    batude_fx.save(yolo.model, folder / "small")
    yolo.model = batude_fx.load(folder / "small", model=dense)  # `model`: a dense network of the same architecture
    batude_fx.export(yolo.model, folder / "small.onnx", example_inputs=picture)
    print(f"exported: {(folder / 'small.onnx').stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compress a YOLO of ultralytics.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/yolo"), metavar="FOLDER")
    main(parser.parse_args().folder)
