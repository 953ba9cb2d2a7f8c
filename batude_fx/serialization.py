"""A compressed network as a folder: `model.safetensors` and `config.json`, in the layout of timm's model folders.

The config names an architecture of timm or torchvision and the ranks of the replaced sites, and nothing that could be
executed or that leads out of the folder: names are looked up in the registries, arguments come from a short list, and
the weights always lie in `model.safetensors`. `save` proves that the folder gives the network back before it says so.
"""

import json
import os
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.borrowing import borrowed
from batude_fx.errors import BatudeError, SavedModelError
from batude_fx.modules import TuckerModule
from batude_fx.sites import Ranks
from batude_fx.surgery import build_skeleton
from batude_fx.zoo import example_inputs

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_LARGEST_CONFIG = 2**24  # bytes
_Argument = Literal[
    "num_classes", "in_chans", "global_pool", "img_size", "output_stride", "drop_rate", "drop_path_rate"
]


class SavedArchitecture(BaseModel):
    """What rebuilds the network: a registered architecture, and its sites in Tucker form.

    Attributes:
        library: Where the dense architecture is registered; None where only the caller can build it.
        base: Its name there.
        args: Its arguments.
        ranks: Site name to rank_out and rank_in, per group.
        biased: Sites with a bias that the dense layer lacks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    library: Literal["timm", "torchvision"] | None
    base: str | None = Field(pattern=r"^[A-Za-z0-9_]+$")
    args: dict[_Argument, int | float | str | None] = {}
    ranks: dict[str, tuple[int, int]]
    biased: tuple[str, ...] = ()

    def build(self, **overrides: Any) -> nn.Module:  # noqa: ANN401 - timm passes what its caller wrote
        """The network with uninitialised Tucker modules and fresh weights elsewhere.

        Raises:
            SavedModelError: When the architecture is not registered here, or does not have these sites.
        """
        args: dict[str, Any] = {**{str(key): value for key, value in self.args.items()}, **overrides}
        return self.skeleton(_build_base(self.library, self.base, args))

    def skeleton(self, model: nn.Module) -> nn.Module:
        """A dense model with the sites in Tucker form.

        Raises:
            SavedModelError: When the model does not have these sites.
        """
        try:
            return build_skeleton(model, {name: Ranks(*pair) for name, pair in self.ranks.items()}, self.biased)
        except BatudeError as error:
            raise SavedModelError(f"{type(model).__name__} is not the model that was saved: {error}") from error


class SavedConfig(BaseModel):
    """The content of `config.json`; the first four fields are the ones that timm reads.

    Attributes:
        architecture: The entrypoint that this package registers with timm.
        model_args: Its arguments.
        num_classes: Of the classifier, where there is one.
        pretrained_cfg: timm's: input size, mean, standard deviation, class names.
        format: Version of this layout.
        versions: Of the libraries that wrote the folder; for information.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["batude_fx"]
    model_args: SavedArchitecture
    num_classes: int | None = None
    pretrained_cfg: dict[str, Any] = {}
    format: Literal[1]
    versions: dict[str, str]


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a compressed network to a folder: `model.safetensors` and `config.json`.

    Args:
        model: What `compress` returned, trained further or not.
        folder: Made where it does not exist; files of the same names are replaced, each in one step.

    Raises:
        SavedModelError: When the model has no Tucker module.

    Warns:
        UserWarning: When neither timm nor torchvision can rebuild the model by name (layers were changed by hand, say).
            The folder is complete, and `load(folder, model=fresh)` reads it.
    """
    if not any(isinstance(module, TuckerModule) for module in model.modules()):
        raise SavedModelError(f"{type(model).__name__} holds no Tucker module; save what compress returned.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace_file(folder / WEIGHTS, lambda path: save_model(model, str(path), {"format": "pt"}))
    # Written only now: a config without its weights is never left behind.
    config = _config(model, folder / WEIGHTS)
    _replace_file(folder / CONFIG, lambda path: path.write_text(config.model_dump_json(indent=2) + "\n"))
    if config.model_args.library is None:
        warnings.warn(
            f"{type(model).__name__} cannot be rebuilt by name: no timm or torchvision architecture gives the same "
            f"outputs with these weights. Read it with batude_fx.load({str(folder)!r}, model=fresh_dense_model).",
            stacklevel=2,
        )


def load(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """Read a network that `save` wrote; its outputs are those of the saved one, to the bit.

    Args:
        folder: The folder.
        model: A fresh dense model of the class that was compressed, for networks that no library can rebuild by name.
            Left as it is.

    Returns:
        The compressed network in eval mode, on the CPU.

    Raises:
        SavedModelError: When the folder is missing, broken, of another format or model, or unsafe.
    """
    folder = Path(folder)
    config = read_config(folder)
    if model is None and config.model_args.library is None:
        raise SavedModelError(
            f"{folder} holds a model that no library rebuilds by name; use load(folder, model=fresh)."
        )
    skeleton = config.model_args.build() if model is None else config.model_args.skeleton(model)
    _load_weights_(skeleton, folder / WEIGHTS)
    if config.model_args.library == "timm" and model is None:
        cast("Any", skeleton).pretrained_cfg = {**cast("Any", skeleton).pretrained_cfg, **config.pretrained_cfg}
    return skeleton.eval()


def read_config(folder: Path) -> SavedConfig:
    """Read and check `config.json`.

    Raises:
        SavedModelError: When it is missing, no JSON, or not of this format.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise SavedModelError(f"{folder} is no saved model: it has no {CONFIG}. Give the folder that save wrote.")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise SavedModelError(f"{path} has {path.stat().st_size} bytes, more than {_LARGEST_CONFIG}; it is no config.")
    try:
        return SavedConfig.model_validate(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:
        raise SavedModelError(f"{path} is not a config of batude_fx: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}."
    return f"{error}."


def _build_base(library: str | None, base: str | None, args: dict[str, Any]) -> nn.Module:
    """A fresh model of a registered architecture; only registered names are ever built."""
    from torchvision import models

    try:
        if library == "timm" and base and timm.is_model(base) and base != "batude_fx":
            return timm.create_model(base, pretrained=False, **args)
        if library == "torchvision" and base in models.list_models() and base != "batude_fx":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet and Inception announce their next default
                return cast("nn.Module", models.get_model(base, weights=None, **args))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise SavedModelError(f"{library} cannot build {base!r} with {args}: {error}") from error
    raise SavedModelError(f"{base!r} is no architecture that {library} registers; use load(folder, model=fresh).")


def _load_weights_(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise SavedModelError(f"{path} is missing; the folder is incomplete.")
    try:
        state = load_file(path)
        _match_dtypes_(model, state)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise SavedModelError(f"{path} does not fit {type(model).__name__}: {str(error).splitlines()[-1]}") from error
    tied = _names_of_tied(model)
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        wrong = missing[0] if missing else unexpected[0]
        raise SavedModelError(
            f"{path} does not fit {type(model).__name__}: {len(missing)} tensors are missing and {len(unexpected)} "
            f"are unknown, {wrong!r} first."
        )


def _match_dtypes_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give every tensor of the model the dtype it was saved in."""
    for name, value in model.state_dict(keep_vars=True).items():
        if name in state and value.dtype != state[name].dtype:
            value.data = value.data.to(state[name].dtype)


def _names_of_tied(model: nn.Module) -> set[str]:
    """Further names of tensors that a model holds more than once; safetensors keeps one of them."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _config(model: nn.Module, weights: Path) -> SavedConfig:
    sites = {name: module for name, module in model.named_modules() if isinstance(module, TuckerModule)}
    ranks = {name: (module.ranks.rank_out, module.ranks.rank_in) for name, module in sites.items()}
    every_bias = tuple(name for name, module in sites.items() if module.bias is not None)
    foreign = SavedArchitecture(library=None, base=None, ranks=ranks, biased=every_bias)
    candidates = (foreign.model_copy(update=update) for update in _candidates(model))
    pretrained = getattr(model, "pretrained_cfg", None) or {}
    return SavedConfig(
        architecture="batude_fx",
        model_args=next((found for found in candidates if _gives_back(found, model, weights)), foreign),
        num_classes=getattr(model, "num_classes", None),
        pretrained_cfg={key: value for key, value in pretrained.items() if key not in {"file", "source", "url"}},
        format=1,
        versions={name: version(name) for name in ("torch", "timm", "torchvision", "safetensors")},
    )


def _candidates(model: nn.Module) -> Iterator[dict[str, object]]:
    """Architectures that may be the model's, the likeliest first."""
    known = getattr(model, "pretrained_cfg", None) or {}
    if architecture := known.get("architecture"):
        channels = {"in_chans": c} if (c := getattr(model, "in_chans", None)) not in {None, 3} else {}
        for args in ({}, {"num_classes": getattr(model, "num_classes", None), **channels}):
            yield {"library": "timm", "base": architecture, "args": args}
    if type(model).__module__.startswith("torchvision."):
        from torchvision import models

        classes = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        for name in models.list_models():
            if models.get_model_builder(name).__module__ == type(model).__module__:
                for args in ({}, *({"num_classes": count} for count in classes)):
                    yield {"library": "torchvision", "base": name, "args": args}


def _gives_back(saved: SavedArchitecture, model: nn.Module, weights: Path) -> bool:
    """Whether the folder rebuilds the model: the same class, the same tensors, the same outputs."""
    try:
        rebuilt = saved.build()
        _load_weights_(rebuilt, weights)
    except SavedModelError:
        return False
    reference = next(model.parameters())
    rebuilt = rebuilt.to(reference.device).eval()
    if type(rebuilt) is not type(model):
        return False
    inputs = example_inputs(model)
    with borrowed(model), torch.no_grad():
        pairs = zip(tree_leaves(model(*inputs)), tree_leaves(rebuilt(*inputs)), strict=True)
        return all(_same(a, b) for a, b in pairs)


def _same(a: object, b: object) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a == b
    # Another memory format adds up in another order.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()) if a.numel() else 0)


def _replace_file(path: Path, write: Any) -> None:  # noqa: ANN401 - a function of the path
    """Write to a temporary name beside the path, then move: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
