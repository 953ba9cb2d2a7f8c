"""A detector of torchvision at 0.8 of its flops: its backbone is compressed, its heads are not changed.

python -m examples.detector
"""

import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

import batude_fx


def main() -> None:
    """Compress the layers that `backbone.*` matches, and run both networks on a picture."""
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()  # use weights="DEFAULT"
    picture = torch.rand(3, 320, 320)

    # Detectors take a list of pictures: the example input is the tuple of arguments of one call.
    plan = batude_fx.plan(model, 0.8, example_inputs=([picture],), include="backbone.*", calibration=None)
    small = plan.apply(model)

    print(f"{plan.dense_flops:,} flops before, {plan.flops:,} after; {len(plan.ranks)} convolutions replaced")
    with torch.no_grad():
        for network in (model, small):
            (detections,) = network([picture])
            print({name: tuple(tensor.shape) for name, tensor in detections.items()})


if __name__ == "__main__":
    main()
