"""What the tests of all packages have in common: what must not change, counting, saving, and running ONNX files."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import batude_fx
from batude_fx.tucker.modules import TuckerModule
from tests.compression.common import fingerprint, same_bits

Call = Callable[[nn.Module], object]
ModelT = TypeVar("ModelT", bound=nn.Module)


def noise(*shape: int) -> Tensor:
    """Return seeded noise between 0 and 1, the same at each call."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def with_trained_norms(model: ModelT) -> ModelT:
    """Give the batch-norms of a fresh model values that training could have given them, in place; return the model.

    A fresh one does nothing, or is zero at the end of a residual branch, through which no gradient passes then.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def tensors(output: object) -> list[Tensor]:
    """Return the tensors of an output in their order, whatever structure they are in."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def flops(model: nn.Module, *inputs: object) -> int:
    """Return fvcore's count of a copy in eval mode."""
    analysis = FlopCountAnalysis(copy.deepcopy(model).eval(), inputs)
    return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


def tucker_modules(model: nn.Module) -> dict[str, TuckerModule]:
    """Return the Tucker modules of a network by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TuckerModule)}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves a model as it was: bits, hooks, flags and attributes, and that it can be copied."""
    before, attributes = fingerprint(model), _attributes(model)
    yield
    assert fingerprint(model) == before
    assert _attributes(model) == attributes
    assert same_bits(copy.deepcopy(model), model)


def _attributes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the identities of all attributes of all modules."""
    return {
        name: {attribute: id(value) for attribute, value in vars(module).items()}
        for name, module in model.named_modules()
    }


@torch.no_grad()
def assert_same_outputs(
    network: nn.Module, other: nn.Module, call: Call, *, bits: bool = False, tolerance: float = 1e-4
) -> None:
    """Assert that copies of two networks give the same tensors in eval mode.

    Args:
        network: Any network.
        other: One that should compute the same.
        call: Runs a network on an example.
        bits: Whether the tensors must be equal to the bit.
        tolerance: Largest difference otherwise, relative to the largest element of a tensor.
    """
    ours, theirs = (tensors(call(copy.deepcopy(one).eval())) for one in (network, other))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        if bits:
            assert torch.equal(a, b)
        else:
            assert_close(a, b, tolerance)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Assert that two tensors have the same shape and differ little, relative to the largest element."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(ours.abs().max())


def assert_step_changes_factors(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """Assert that one step of training on a loss changes every weight of every Tucker module."""
    network = copy.deepcopy(network).train()
    before = {name: tensor.detach().clone() for name, tensor in _factors(network).items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss(network).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert [name for name, tensor in _factors(network).items() if torch.equal(tensor, before[name])] == []


def _factors(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, module in tucker_modules(network).items()
        for part, tensor in module.named_parameters()
        if part.endswith("weight")
    }


def assert_saved_and_loaded(network: nn.Module, fresh: nn.Module, call: Call, folder: Path) -> None:
    """Assert that a network read from its folder into a fresh dense model gives the same outputs to the bit."""
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(network, folder)
    assert_same_outputs(network, batude_fx.load(folder, model=fresh), call, bits=True)


def run_onnx(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of an ONNX file for its inputs in their order."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    arrays = [tensor.numpy() for tensor in inputs]
    return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]


@torch.no_grad()
def assert_exported(network: nn.Module, example: Any, call: Call, inputs: Sequence[Tensor], path: Path) -> None:
    """Assert that an exported ONNX file computes what the network does.

    Args:
        network: The network.
        example: What `export` gets as its example inputs.
        call: Runs the network on `inputs`.
        inputs: What the file gets, in the order of its inputs.
        path: The file to write.
    """
    batude_fx.export(network, path, example_inputs=example)
    expected = tensors(call(copy.deepcopy(network).eval()))
    outputs = run_onnx(path, inputs)
    assert len(outputs) == len(expected) > 0
    for ours, theirs in zip(expected, outputs, strict=True):
        assert_close(ours, theirs)


def same_values(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    """Return whether two configurations are of the same class and hold the same values."""
    return type(first) is type(second) and dict(first) == dict(second)
