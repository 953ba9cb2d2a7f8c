"""What the tests of `plan` and `compress` have in common: an input, images, and ways to count and to compare."""

import copy
import random
import re

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from batude_fx.errors import BudgetError
from tests.toy_networks import VariedNet, varied_net

EXAMPLE = torch.zeros(1, 3, 12, 12)


def photos(count: int = 12) -> Tensor:
    """Return seeded noise in the shape of `EXAMPLE`."""
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def fvcore_flops(model: nn.Module, example: Tensor = EXAMPLE) -> int:
    """Return fvcore's count of a copy in eval mode."""
    analysis = FlopCountAnalysis(copy.deepcopy(model).eval(), example)
    return int(analysis.unsupported_ops_warnings(enabled=False).uncalled_modules_warnings(enabled=False).total())


def parameter_count(model: nn.Module) -> int:
    """Return the number of entries of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def smallest_reachable(error: BudgetError) -> float:
    """Return the budget that the refusal of a smaller one advises."""
    return float(re.findall(r"Use at least ([0-9.]+)\.(?:$| With linear layers)", str(error))[0])


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two networks have equal state dicts."""
    bits_a, bits_b = a.state_dict(), b.state_dict()
    return bits_a.keys() == bits_b.keys() and all(torch.equal(value, bits_b[name]) for name, value in bits_a.items())


def hooked_net() -> VariedNet:
    """Return a network in train mode but for its norm, with a frozen weight, a hook and a gradient."""
    model = varied_net().train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    model.depthwise.register_forward_hook(lambda *_: None)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def _bytes(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().numpy().tobytes()


def fingerprint(model: nn.Module) -> list[object]:
    """Return everything of a model that must not change, and the states of the random generators."""
    modules = list(model.named_modules(remove_duplicate=False))
    return [
        [(name, id(module), module.training) for name, module in modules],
        [(list(module._forward_hooks.values()), list(module._backward_hooks.values())) for _, module in modules],
        [(name, id(tensor), _bytes(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()],
        [(name, p.requires_grad, _bytes(p.grad)) for name, p in model.named_parameters()],
        [_bytes(torch.get_rng_state()), random.getstate()],
    ]
