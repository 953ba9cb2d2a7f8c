"""Run the copy of a model once, and refuse it where it still computes with parts of the original.

`surgery.copy_model` refuses what can be seen in a copy. A model can lead back to its original in ways that cannot be
seen, through a list that a function closes over, say. One run shows which modules and tensors are used.
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batude_fx.errors import UnsupportedError
from batude_fx.graph.call_recorder import TorchCallHook
from batude_fx.support.hooks import observe_calls
from batude_fx.support.model_state import eval_and_restore, run_on_copies


def refuse_shared_parts(copied: nn.Module, original: nn.Module, inputs: tuple[object, ...]) -> None:
    """Run a copy on the example input in eval mode, and refuse it where it uses the original.

    Args:
        copied: A copy of the original, with other modules in some places; it is the same afterwards.
        original: The model that was copied.
        inputs: Arguments of one run.

    Raises:
        UnsupportedError: When the run calls a module, or computes with a parameter or buffer, that is the original's
            and not the copy's; with its name.
    """
    own = {id(part) for part in (*copied.modules(), *copied.parameters(), *copied.buffers())}
    modules = {name: module for name, module in original.named_modules() if id(module) not in own}
    tensors = {id(t): n for n, t in (*original.named_parameters(), *original.named_buffers()) if id(t) not in own}
    used: set[str] = set()

    def note_tensors(_function: object, args: object, kwargs: object, _result: object) -> None:
        leaves = tree_leaves((args, kwargs))
        used.update(tensors[id(leaf)] for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in tensors)

    with (
        eval_and_restore(copied), eval_and_restore(original), torch.no_grad(), TorchCallHook(note_tensors),
        observe_calls(modules, before=lambda name, _args, _kwargs: used.add(name)),
    ):  # fmt: skip
        run_on_copies(copied, inputs)
    if used:
        raise UnsupportedError(
            f"a copy of {type(original).__name__} goes on to use {min(used)!r} of the original, through a function, a "
            "closure or a global variable that names it. Let the model reach its parts through self alone."
        )
