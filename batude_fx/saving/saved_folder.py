"""Save a compressed network as a folder and load it: `model.safetensors` and `config.json`, as timm lays them out.

The report (`report.json`, `report.html`) is saved along with them if the network has one. Nothing in a folder is
executed. `save` verifies that the folder gives the network's outputs to the bit, or warns that only the caller can
rebuild it.
"""

import json
import os
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn

from batude_fx.errors import SavedModelError, last_line
from batude_fx.graph import provenance
from batude_fx.graph.example_inputs import image_of_size, remember_input_size_, timm_config
from batude_fx.graph.flops import count_params
from batude_fx.graph.surgery import refuse_wrappers
from batude_fx.report import record
from batude_fx.saving.architecture import ENTRYPOINT
from batude_fx.saving.config import CONFIG, METADATA_KEYS, WEIGHTS, ImageConfig, SavedConfig, read_config
from batude_fx.saving.find_architecture import ExampleRun, find_architecture
from batude_fx.saving.weights import (
    check_fits,
    has_channels_last,
    load_weights_,
    read_shapes,
    read_weights,
    to_channels_last_,
)
from batude_fx.support.atomic_files import (
    atomic_file,
    atomic_files,
    check_writable,
    newest,
    read_newest,
    visible_entries,
    write_text,
)
from batude_fx.support.user_warning import warn_user
from batude_fx.support.validation import first_mistake
from batude_fx.support.versions import library_versions
from batude_fx.tucker.modules import TuckerModule


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a compressed network to a folder: `model.safetensors`, `config.json`, and its report for the browser.

    The report describes the network as it was compressed. It is left out if the number of parameters has changed since,
    as with another classifier.

    Args:
        model: What `compress` returned, trained further or not.
        folder: Created if it does not exist. The files of a network that it holds already are replaced after all
            checks, all of them at once.

    Raises:
        SavedModelError: When the model has no Tucker module, or the folder cannot be written.
        UnsupportedError: When it is a wrapper, such as `DistributedDataParallel`, with what to save instead.

    Warns:
        UserWarning: When neither timm nor torchvision can rebuild the model by name, because its layers were changed by
            hand, for example. The folder is complete, and `load(folder, model=fresh)` reads it.

    Source: timm's `save_for_hf`, for the layout; the safetensors library.
    """
    from batude_fx.report import html_page  # imported here, so that `import batude_fx` needs no jinja2

    check_folder(folder)
    _check_savable(model)
    folder = Path(folder)
    try:
        with atomic_files(folder, (CONFIG, WEIGHTS, *html_page.FILES)) as new:
            with atomic_file(new / WEIGHTS) as weights_file:
                save_model(model, str(weights_file), {"format": "pt"})
            config = _make_config(model, new / WEIGHTS)
            write_text(new / CONFIG, config.model_dump_json(indent=2) + "\n")
            report = cast("record.Record | None", provenance.attached_record(model))
            if report and report.quality and report.weights_measured != provenance.checksum(model):
                report = report.model_copy(update={"quality": None, "weights_measured": None})  # it was trained since
            if report and report.params == config.params:  # else the network was changed since it was compressed
                html_page.write_successor(report, new, folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SavedModelError(f"{type(model).__name__} cannot be saved to {folder}: {last_line(error)}") from error
    if config.model_args.library is None:
        normalizes = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())  # noqa: SLF001
        warn_user(
            f"{type(model).__name__} cannot be rebuilt by name: no timm or torchvision architecture gives the same "
            f"outputs with these weights. Read it with batude_fx.load({str(folder)!r}, model=fresh_dense_model)"
            + ("." if normalizes else ". If it was folded, save it before that.")
        )


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds files of something else, before they are mixed with those of a saved network.

    Raises:
        SavedModelError: When it is a file, holds files and no saved model, or cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SavedModelError(f"{folder} is a file; give a folder to write.")
    try:
        check_writable(folder)
    except OSError as error:
        raise SavedModelError(f"{folder} cannot be written: {error.strerror}. Choose another place.") from error
    if visible_entries(folder) and not _is_config(newest(folder) / CONFIG):
        raise SavedModelError(f"{folder} holds other files and no saved model; give a new folder, or empty this one.")


def _is_config(path: Path) -> bool:
    """Return whether `save` wrote a file, in any format; `read_config` demands more."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("architecture") == ENTRYPOINT


def load(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Load a network that `save` wrote; its outputs are those of the saved network, to the bit.

    Another process or thread may save to the folder meanwhile: what is loaded is one network or the other.

    Args:
        folder: The folder.
        model: A fresh dense model of the class that was compressed, for networks that no library can rebuild by name.
            It is not changed.

    Returns:
        The compressed network in eval mode, in the dtypes it was saved in; on the CPU, or where `model` is.

    Raises:
        SavedModelError: When the folder is missing, broken, of another format or model, or unsafe.

    Warns:
        UserWarning: When `report.json` is broken; the network is loaded without its report.

    Source: timm's model folders, for the layout; the safetensors library.
    """
    return read_newest(Path(folder), lambda newest_folder: _load(newest_folder, model))


def _load(folder: Path, model: nn.Module | None) -> nn.Module:
    config = read_config(folder)
    architecture = config.model_args
    shapes = read_shapes(folder / WEIGHTS)
    if model is None:
        check_fits(architecture.build(weightless=True), shapes)  # so that a false config cannot use up the memory
    network = architecture.build() if model is None else architecture.replace_sites(model)
    load_weights_(network, read_weights(folder / WEIGHTS))
    if (count := count_params(network)) != config.params:
        raise SavedModelError(
            f"{folder / CONFIG} says {config.params:,} parameters, the network has {count:,}; save the model again."
        )
    if config.channels_last:
        to_channels_last_(network)
    if config.pretrained_cfg and model is None:
        default: dict[str, Any] = getattr(network, "pretrained_cfg", {})
        vars(network)["pretrained_cfg"] = vars(network)["default_cfg"] = {**default, **config.pretrained_cfg}
    elif size := config.pretrained_cfg.get("input_size"):
        remember_input_size_(network, image_of_size(network, size))
    provenance.attach_(network, record.read_or_warn(folder))
    network.eval()
    return network


def _check_savable(model: nn.Module) -> None:
    refuse_wrappers(model, "save")
    if not any(isinstance(module, TuckerModule) for module in model.modules()):
        raise SavedModelError(
            f"{type(model).__name__} holds no Tucker module: it was not compressed, or all of its layers stayed "
            "dense. Save a dense network with timm.models.save_for_hf or torch.save."
        )
    for name, module in model.named_modules():
        if isinstance(module, TuckerModule) and (
            foreign := [key for key in module.state_dict() if key.rpartition(".")[2] not in {"weight", "bias"}]
        ):
            raise SavedModelError(
                f"{name}.{foreign[0]} is no weight that load knows; make the layer plain first, such as by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations."
            )
    if no_tensors := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise SavedModelError(
            f"{no_tensors[0]!r} is no tensor and cannot be saved; a network is saved before it is quantized."
        )
    if on_meta := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise SavedModelError(f"{on_meta[0]!r} is on the meta device and has no values; load the weights first.")


def _make_config(model: nn.Module, weights: Path) -> SavedConfig:
    """Return the config of a model whose weights were saved."""
    run = ExampleRun.of(model)
    metadata = {**_torchvision_metadata(model, run), **timm_config(model)}
    try:
        return SavedConfig(
            architecture="batude_fx",
            model_args=find_architecture(model, weights, run),
            num_classes=getattr(model, "num_classes", run.classes),
            pretrained_cfg=cast("ImageConfig", {key: metadata[key] for key in METADATA_KEYS if key in metadata}),
            channels_last=has_channels_last(model),
            params=count_params(model),
            format=1,
            versions=library_versions("torch", "timm", "torchvision", "safetensors", "batude_fx"),
        )
    except ValidationError as error:
        raise SavedModelError(
            f"{type(model).__name__} cannot be saved, as load would refuse it: {first_mistake(error)}"
        ) from error


def _torchvision_metadata(model: nn.Module, run: ExampleRun) -> dict[str, Any]:
    """Return what timm needs in order to load a classifier of torchvision: its input size and its last layer."""
    is_torchvision = type(model).__module__.startswith("torchvision.")
    image = run.inputs.only_tensor if run.inputs else None
    if not is_torchvision or image is None or run.classes is None:
        return {}
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == run.classes
    ]
    return {"input_size": tuple(image.shape[1:]), "classifier": heads[-1] if heads else None}
