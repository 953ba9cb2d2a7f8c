"""A compressed network as a folder: `model.safetensors` and `config.json`, in the layout of timm's model folders.

Beside them lies its report (`page`), where the network knows how it was made.

`save` proves that the folder gives the network back, to the bit, before it says so. Nothing in a folder is executed.
"""

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx import record
from batude_fx.borrowing import borrowed
from batude_fx.errors import SavedModelError, last_line
from batude_fx.files import held, replacing
from batude_fx.modules import CHANNELS_LAST, TuckerModule, is_channels_last
from batude_fx.origin import ENTRYPOINT, Origin, origins
from batude_fx.saved_config import CONFIG, METADATA, WEIGHTS, SavedArchitecture, SavedConfig, read_config
from batude_fx.surgery import refuse_wrappers
from batude_fx.zoo import example_inputs

_TOGETHER = "Give a folder and a model that belong together, or save the model again."
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a compressed network to a folder: `model.safetensors` and `config.json`, and its report for the browser.

    The report tells of the network as it was compressed: where it has more or fewer parameters by now, such as those of
    another head, there is none.

    Args:
        model: What `compress` returned, trained further or not.
        folder: Made where it does not exist. Files of the same names are replaced, each in one step, and only when
            everything is known to be well.

    Raises:
        SavedModelError: When the model has no Tucker module, or the folder cannot be written.
        UnsupportedError: When it is a wrapper, such as `DistributedDataParallel`, with what to save instead.

    Warns:
        UserWarning: When neither timm nor torchvision can rebuild the model by name (layers were changed by hand, say).
            The folder is complete, and `load(folder, model=fresh)` reads it.

    Source: timm's `save_for_hf`, for the layout; the safetensors library.
    """
    from batude_fx import page

    check_folder(folder)
    _check_savable(model)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The weights are moved first: a config without its weights is never left behind.
        with replacing(folder / CONFIG) as text, replacing(folder / WEIGHTS) as weights:
            save_model(model, str(weights), {"format": "pt"})
            config = _config(model, weights)
            text.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        known = record.attached(model)
        if known and known.params != config.params:  # layers were changed since, a head perhaps
            known = None
        page.renew(known, folder)  # when the weights that it tells of are there
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SavedModelError(f"{type(model).__name__} cannot be saved to {folder}: {last_line(error)}") from error
    if config.model_args.library is None:
        warnings.warn(
            f"{type(model).__name__} cannot be rebuilt by name: no timm or torchvision architecture gives the same "
            f"outputs with these weights. Read it with batude_fx.load({str(folder)!r}, model=fresh_dense_model); "
            "save a network before it is folded.",
            stacklevel=2,
        )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse to write into a folder of other things.

    Raises:
        SavedModelError: When it is a file, or holds files and no saved model.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SavedModelError(f"{folder} is a file; give a folder to write.")
    if held(folder) and not _is_saved(folder / CONFIG):
        raise SavedModelError(f"{folder} holds other files and no saved model; give a new folder, or empty this one.")


def _is_saved(config: Path) -> bool:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("architecture") == ENTRYPOINT


def load(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Read a network that `save` wrote; its outputs are those of the saved one, to the bit.

    Args:
        folder: The folder.
        model: A fresh dense model of the class that was compressed, for networks that no library can rebuild by name.
            Left as it is.

    Returns:
        The compressed network in eval mode, in the dtypes it was saved in; on the CPU, or where `model` is.

    Raises:
        SavedModelError: When the folder is missing, broken, of another format or model, or unsafe.

    Source: as `save`.
    """
    folder = Path(folder)
    config = read_config(folder)
    saved = config.model_args
    shapes = read_shapes(folder / WEIGHTS)
    if model is None:
        check_fits(saved.build(weightless=True), shapes)  # before anything is allocated for what a config claims
    network = saved.build() if model is None else saved.skeleton(model)
    load_weights_(network, read_weights(folder / WEIGHTS))
    if config.channels_last:
        to_channels_last_(network)
    if config.metadata and model is None:
        known: dict[str, Any] = getattr(network, "pretrained_cfg", {})
        vars(network)["pretrained_cfg"] = vars(network)["default_cfg"] = {**known, **config.metadata}
    record.attach_(network, record.read(folder))
    network.eval()
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        SavedModelError: When it is missing, truncated, or no safetensors file.
    """
    with _reading(path):
        return load_file(path)


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: their shapes and dtypes, at no cost.

    Raises:
        SavedModelError: As `read_weights`.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        odd = {name: one.get_dtype() for name, one in slices.items() if one.get_dtype() not in _DTYPES}
        if odd:
            raise SavedModelError(f"{path} holds {next(iter(odd.items()))}, no dtype that networks run in.")
        return {
            name: torch.empty(one.get_shape(), dtype=_DTYPES[one.get_dtype()], device="meta")
            for name, one in slices.items()
        }


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise SavedModelError(f"{path} is missing; the folder is incomplete. Save or copy it again.")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise SavedModelError(f"{path} is broken: {last_line(error)}. Save or copy it again.") from error


def load_weights_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors into a model that must have all of them and no others, in their dtypes.

    Raises:
        SavedModelError: When names or shapes differ, with the first that does.
    """
    check_fits(model, state)
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # with the buffers that no state holds
    own = model.state_dict(keep_vars=True)
    for name, value in state.items():
        own[name].data = own[name].data.to(value.dtype)
    versioned = OrderedDict(state)
    vars(versioned)["_metadata"] = vars(own)["_metadata"]  # some modules refuse a state without their version
    model.load_state_dict(versioned, strict=False)


def check_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Hold tensors, or their shapes on the meta device, against a model that must have all of them and no others.

    Raises:
        SavedModelError: When names, shapes or kinds of dtypes differ, with the first that does.
    """
    own = model.state_dict(keep_vars=True)
    # A tensor with several names is stored under one of them.
    stored = {id(own[name]) for name in own.keys() & state.keys()}
    missing = [name for name, value in own.items() if name not in state and id(value) not in stored]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        raise SavedModelError(
            f"the weights are not those of this {type(model).__name__}: {len(missing)} tensors are missing and "
            f"{len(unknown)} are unknown, {[*missing, *unknown][0]!r} first. {_TOGETHER}"
        )
    for name, value in state.items():
        if value.shape != own[name].shape or _kind(value) != _kind(own[name]):
            raise SavedModelError(
                f"the weights are not those of this {type(model).__name__}: {name!r} is {_described(value)} "
                f"where the model has {_described(own[name])}. {_TOGETHER}"
            )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def _check_savable(model: nn.Module) -> None:
    refuse_wrappers(model, "save")
    if not any(isinstance(module, TuckerModule) for module in model.modules()):
        raise SavedModelError(
            f"{type(model).__name__} holds no Tucker module: it was not compressed, or its budget was none. A dense "
            "network is saved by timm.models.save_for_hf or torch.save."
        )
    for name, module in model.named_modules():
        if isinstance(module, TuckerModule) and (
            odd := [key for key in module.state_dict() if key.rpartition(".")[2] not in {"weight", "bias"}]
        ):
            raise SavedModelError(
                f"{name}.{odd[0]} is no weight that load knows; make the layer plain first, such as by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
    if odd := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise SavedModelError(
            f"{odd[0]!r} is no tensor and cannot be saved; a network is saved before it is quantized."
        )
    if meta := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise SavedModelError(f"{meta[0]!r} is on the meta device and has no values; load the weights first.")


def _config(model: nn.Module, weights: Path) -> SavedConfig:
    example, outputs = _example_run(model)
    classes = _classes(outputs)
    found = _rebuilding(model, weights, outputs, origins(model, _channels(example), classes))
    metadata = _torchvision_metadata(model, example, classes) | (getattr(model, "pretrained_cfg", None) or {})
    return SavedConfig(
        architecture="batude_fx",
        model_args=found,
        num_classes=getattr(model, "num_classes", classes),
        pretrained_cfg={key: metadata[key] for key in METADATA if key in metadata},
        channels_last=_is_channels_last(model),
        params=sum(parameter.numel() for parameter in model.parameters()),
        format=1,
        versions={name: version(name) for name in ("torch", "timm", "torchvision", "safetensors")} | _own_version(),
    )


def _own_version() -> dict[str, str]:
    from batude_fx import __version__

    return {"batude_fx": __version__}


def _rebuilding(
    model: nn.Module, weights: Path, outputs: list[object], candidates: Iterable[Origin]
) -> SavedArchitecture:
    """The first architecture that gives the model back, or one without a name."""
    sites = {name: module for name, module in model.named_modules() if isinstance(module, TuckerModule)}
    ranks = {name: (module.ranks.rank_out, module.ranks.rank_in) for name, module in sites.items()}
    foreign = SavedArchitecture(
        library=None, base=None, ranks=ranks, biased=tuple(n for n, module in sites.items() if module.bias is not None)
    )
    for origin in candidates:
        try:
            saved = SavedArchitecture.model_validate({**foreign.model_dump(), **asdict(origin)})
        except ValidationError:  # an argument that is an object
            continue
        if outputs and _gives_back(saved, model, weights, outputs):
            return saved
    return foreign


def _gives_back(saved: SavedArchitecture, model: nn.Module, weights: Path, outputs: list[object]) -> bool:
    """Whether the folder rebuilds the model: the same class, the same tensors, the same outputs."""
    try:
        sketch = saved.build(weightless=True)  # costs no memory, so that many can be tried
        if type(sketch) is not type(model) or _layout(sketch) != _layout(model):
            return False
        rebuilt = saved.build()
        load_weights_(rebuilt, read_weights(weights))
    except SavedModelError:
        return False
    if _is_channels_last(model):
        to_channels_last_(rebuilt)
    rebuilt.to(next(model.parameters()).device)
    try:
        again = _outputs(rebuilt, example_inputs(model))
    except Exception:  # noqa: BLE001 - it was built in another way, and fails in a way of its own
        return False
    return len(again) == len(outputs) and all(map(_equal, again, outputs))


def _layout(model: nn.Module) -> tuple[dict[str, torch.Size], dict[str, type[nn.Module]]]:
    # Types too: in an untrained branch that ends in a zero, another activation leaves the outputs as they are.
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return shapes, {name: _kind_of(module) for name, module in model.named_modules()}


def _kind_of(module: nn.Module) -> type[nn.Module]:
    """Its class; several processes share a batch-norm's statistics in training alone."""
    return nn.BatchNorm2d if isinstance(module, nn.SyncBatchNorm) else type(module)


def _example_run(model: nn.Module) -> tuple[tuple[object, ...], list[object]]:
    """The example input of a model of timm or torchvision and its outputs; nothing where it does not run on that."""
    try:
        inputs = example_inputs(model)
        return inputs, _outputs(model, inputs)
    except Exception:  # noqa: BLE001 - models fail in many ways on what they do not take
        return (), []


def _outputs(model: nn.Module, inputs: tuple[object, ...]) -> list[object]:
    # Without benchmarking, cuDNN takes the same algorithm twice.
    with borrowed(model), torch.no_grad(), torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return list(tree_leaves(model(*inputs)))


def _equal(a: object, b: object) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124


def _channels(example: tuple[object, ...]) -> int | None:
    first = example[0] if example else None
    return first.shape[1] if isinstance(first, Tensor) else None


def _classes(outputs: list[object]) -> int | None:
    first = outputs[0] if outputs else None
    return first.shape[1] if isinstance(first, Tensor) and first.ndim > 1 else None


def _torchvision_metadata(model: nn.Module, example: tuple[object, ...], classes: int | None) -> dict[str, Any]:
    """What timm asks of a checkpoint, for a classifier of torchvision."""
    of_torchvision = type(model).__module__.startswith("torchvision.")
    if not of_torchvision or not example or not isinstance(example[0], Tensor) or classes is None:
        return {}
    last = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes][-1:]
    return {"input_size": tuple(example[0].shape[1:]), "classifier": last[0] if last else None}


def _is_channels_last(model: nn.Module) -> bool:
    return any(map(is_channels_last, model.parameters()))


def to_channels_last_(model: nn.Module) -> None:
    """Put the weights into the memory format of images with their channels last."""
    for weight in model.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])
