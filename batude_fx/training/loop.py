"""One training run, in time order: the dense network, ranks learned under the budget, Tucker modules trained on.

The method is behind four calls to `adl.Lagrangian`: `penalty_` in every step (`phase`), and `project_`, `update_duals_`
and `rescale_` between rounds (`rounds`).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from batude_fx.calibration.batch_norm import renormalize
from batude_fx.deploy.fold import fold
from batude_fx.graph.flops import count_flops, count_params
from batude_fx.graph.provenance import attach_
from batude_fx.graph.surgery import build_skeleton
from batude_fx.report.record import Record, TrainingRecord, site_records
from batude_fx.support.versions import library_versions
from batude_fx.training.data import Data, check_first, first_images, image_data, seed_all
from batude_fx.training.factorize import factorize
from batude_fx.training.phase import accuracy, run_phase
from batude_fx.training.problem import Problem, dense_network
from batude_fx.training.recipe import Recipe
from batude_fx.training.rounds import Rounds
from batude_fx.training.session import Session
from batude_fx.tucker.ranks import Ranks


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        model: The compressed network, in eval mode.
        accuracy: Its share of the evaluation images.
        original_accuracy: That of the dense network before one-shot training.
        flops: Multiply-adds of one image, by fvcore.
        dense_flops: Those of the dense network.
        params: Parameters.
        dense_params: Those of the dense network.
        ranks: Site name to ranks, for the sites in Tucker form.
        rounds: One record per round of BC-ADL: residuals, rho, flops and ranks as they stood.
    """

    model: nn.Module = field(repr=False)
    accuracy: float
    original_accuracy: float
    flops: int
    dense_flops: int
    params: int
    dense_params: int
    ranks: Mapping[str, Ranks]
    rounds: list[dict[str, Any]] = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """All but the network, for JSON."""
        plain = {name: one for name, one in vars(self).items() if name != "model"}
        return plain | {"ranks": {name: asdict(ranks) for name, ranks in self.ranks.items()}}


def train(recipe: Recipe, folder: str | os.PathLike[str] | None, *, resume: bool, data: Data | None) -> Result:
    """See `batude_fx.run`."""
    session = Session(recipe, None if folder is None else Path(folder), resume=resume)
    seed_all(recipe.seed)  # for weights that start at random
    with session.accelerator.main_process_first():  # one process fetches what the others find in the cache
        model = dense_network(recipe)
    problem = Problem.of(model, recipe)  # a budget out of reach is said before anything is trained
    session.classes = problem.classes
    model.to(session.accelerator.device)
    size = problem.inputs[0].shape[1:]
    with session.accelerator.main_process_first():
        data = data or image_data(recipe, model, size, problem.classes, session.accelerator)
    check_first(data, size, problem.classes, recipe.data.accumulate)
    session.start(data)

    if recipe.pretrain and session.begins("pretrain"):
        run_phase(session, "pretrain", recipe.pretrain, model)
        model.load_state_dict(_normalized(session, model).state_dict())
    session.keep_original(model)
    original_accuracy = session.once("original_accuracy", lambda: accuracy(session, model))
    teacher = None
    if recipe.one_shot.distillation or recipe.finalize.distillation:
        teacher = fold(model, session.placed(*problem.inputs)).requires_grad_(requires_grad=False)

    if session.begins("one_shot"):
        rounds = Rounds(session, recipe.one_shot, problem, model)
        run_phase(session, "one_shot", recipe.one_shot, model, teacher, rounds)
        session.kept["ranks"] = rounds.split.state_dict()["ranks"]
    ranks = {name: Ranks(*pair) for name, pair in session.kept["ranks"].items() if pair}

    if session.is_inside("finalize"):
        small = build_skeleton(model, ranks)
    else:
        small = factorize(model, ranks, hooi_sweeps=recipe.finalize.hooi_sweeps)
    run_phase(session, "finalize", recipe.finalize, small, teacher)
    small = _normalized(session, small)

    small.eval()
    result = Result(
        model=small, accuracy=accuracy(session, small), original_accuracy=original_accuracy,
        flops=count_flops(small.cpu(), problem.inputs), dense_flops=problem.dense[0],
        params=count_params(small), dense_params=problem.dense[1],
        ranks=ranks, rounds=session.rounds,
    )  # fmt: skip
    attach_(small, _record(recipe, problem, result))
    session.finish(small, result.facts())
    return result


def _normalized(session: Session, model: nn.Module) -> nn.Module:
    """The network with batch-norm statistics of as many training images as the recipe asks for."""
    count, size = session.recipe.finalize.batch_norm_images, session.recipe.data.batch_size
    if not count:
        return model
    images = first_images(session.data, count, session.accelerator)
    return renormalize(model, [(batch,) for batch in images.tensor_split(math.ceil(len(images) / size))])


def _record(recipe: Recipe, problem: Problem, result: Result) -> Record:
    """What is saved with the network, and shown in its report."""
    return Record(
        model=type(result.model).__name__, budget=str(recipe.budget), calibration="one-shot training",
        round_to=recipe.one_shot.round_to, seed=recipe.seed, dense_flops=result.dense_flops, flops=result.flops,
        dense_params=result.dense_params, params=result.params, versions=library_versions("fvcore", "safetensors"),
        sites=site_records(problem.found, problem.options, result.ranks),
        training=TrainingRecord.model_validate({
            "recipe": recipe.to_yaml(), "original_accuracy": result.original_accuracy, "accuracy": result.accuracy,
            "rounds": result.rounds,
        }),
    )  # fmt: skip
