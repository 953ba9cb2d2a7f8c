"""A compressed network as a folder: `model.safetensors` and `config.json`, in the layout of timm's model folders.

Beside them lies its report (`page`), where the network knows how it was made.

`save` proves that the folder gives the network back, to the bit, before it says so. Nothing in a folder is executed.
"""

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import SavedModelError, last_line
from batude_fx.graph import provenance
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.graph.flops import count_params
from batude_fx.graph.surgery import refuse_wrappers
from batude_fx.report import record
from batude_fx.saving.architecture import ENTRYPOINT, Architecture, candidate_architectures
from batude_fx.saving.config import CONFIG, METADATA, WEIGHTS, SavedArchitecture, SavedConfig, read_config
from batude_fx.saving.weights import (
    check_fits,
    has_channels_last,
    load_weights_,
    read_shapes,
    read_weights,
    to_channels_last_,
)
from batude_fx.support.atomic_files import atomic_file, visible_entries
from batude_fx.support.model_state import eval_and_restore
from batude_fx.support.versions import library_versions
from batude_fx.tucker.modules import TuckerModule


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
    from batude_fx.report import html_page  # imported here, so that `import batude_fx` needs no jinja2

    check_folder(folder)
    _check_savable(model)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The weights are moved first: a config without its weights is never left behind.
        with atomic_file(folder / CONFIG) as text, atomic_file(folder / WEIGHTS) as weights:
            save_model(model, str(weights), {"format": "pt"})
            config = _config(model, weights)
            text.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        known = provenance.attached(model)
        if known and known.params != config.params:  # layers were changed since, a head perhaps
            known = None
        html_page.replace_report(known, folder)  # when the weights that it tells of are there
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
    if visible_entries(folder) and not _is_saved(folder / CONFIG):
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
    provenance.attach_(network, record.read(folder))
    network.eval()
    return network


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
    found = _rebuilding(model, weights, outputs, candidate_architectures(model, _channels(example), classes))
    metadata = _torchvision_metadata(model, example, classes) | (getattr(model, "pretrained_cfg", None) or {})
    return SavedConfig(
        architecture="batude_fx",
        model_args=found,
        num_classes=getattr(model, "num_classes", classes),
        pretrained_cfg={key: metadata[key] for key in METADATA if key in metadata},
        channels_last=has_channels_last(model),
        params=count_params(model),
        format=1,
        versions=library_versions("safetensors"),
    )


def _rebuilding(
    model: nn.Module, weights: Path, outputs: list[object], candidates: Iterable[Architecture]
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
    if has_channels_last(model):
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
    with eval_and_restore(model), torch.no_grad(), torch.backends.cudnn.flags(benchmark=False, deterministic=True):
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
