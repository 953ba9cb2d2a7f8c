"""Run the copy of a model once, and refuse it where it still computes with parts of the original.

`surgery.copy_model` refuses what can be seen in a copy. A model can lead back to its original in ways that cannot be
seen, through a list that a function closes over, say. One run shows which tensors are used, and what is kept where.
"""

from collections.abc import Iterable, Iterator
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import UnsupportedError, first_line
from batude_fx.graph.call_recorder import TorchCallHook
from batude_fx.graph.surgery import storage_of
from batude_fx.support.inputs import Inputs
from batude_fx.support.model_state import deep_copy, private_copy

_WAY_OUT = "through a function, a closure or a global variable that names it. Let the model reach its parts by self."


def refuse_shared_parts(copied: nn.Module, original: nn.Module, inputs: Inputs) -> None:
    """Run a copy on the example input in eval mode, and refuse it where it uses the original.

    Args:
        copied: A copy of the original, with other modules in some places; it is the same afterwards.
        original: The model that was copied.
        inputs: Arguments of one run.

    Raises:
        UnsupportedError: When the run computes with a parameter or buffer that is the original's and not the copy's,
            leaves one of its results in the original, or fails for another reason than a lack of memory.
    """
    own = {storage_of(tensor) for tensor in (*copied.parameters(), *copied.buffers())}
    named = (*original.named_parameters(), *original.named_buffers())
    theirs = {storage: name for name, tensor in named if (storage := storage_of(tensor)) not in own}
    used: set[str] = set()
    results: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # only those that the model keeps stay

    def note(_function: object, args: object, kwargs: object, result: object) -> None:
        used.update(theirs[storage] for leaf in _tensors((args, kwargs)) if (storage := storage_of(leaf)) in theirs)
        results.update((id(leaf), leaf) for leaf in _tensors(result))

    with private_copy(copied) as running, torch.no_grad(), TorchCallHook(note):
        try:
            inputs.copies().run(running)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UnsupportedError(
                f"a copy of {type(original).__name__} does not run: {reason}. It may go on to use parts of the "
                f"original, {_WAY_OUT}"
            ) from error
    if used:
        raise UnsupportedError(
            f"a copy of {type(original).__name__} goes on to use {min(used)!r} of the original, {_WAY_OUT}"
        )
    if any(results.get(id(value), ...) is value for value in _kept(original)):
        raise UnsupportedError(f"a copy of {type(original).__name__} keeps its activations in the original, {_WAY_OUT}")


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _kept(model: nn.Module) -> Iterator[object]:
    """Yield what a model keeps in attributes, lists and dicts, at any depth."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    deep_copy(model, memo)
    visited: object = memo.get(id(memo), ())  # where `copy.deepcopy` keeps all that it has copied
    for container in visited if isinstance(visited, Iterable) else ():
        if isinstance(container, dict):
            yield from container.values()
        elif isinstance(container, list | tuple | set):
            yield from container
