"""One training run in time order: the dense network, training that learns ranks, decomposition, further training.

The method consists of four calls to `lagrangian.Lagrangian`: `penalty_` in every step (`phase`), and `project_`,
`update_duals_` and `rescale_` at the start of every round (`rounds`).
"""

import copy
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from batude_fx.budget.rank_options import FLOPS, PARAMS
from batude_fx.calibration.batch_norm import renormalize
from batude_fx.graph.flops import count_flops, count_params
from batude_fx.graph.provenance import attach_, checksum
from batude_fx.graph.surgery import build_skeleton
from batude_fx.quality.comparison import QualityMeter
from batude_fx.quality.quality import Quality
from batude_fx.report.record import LIBRARIES, Record, TrainingRecord, site_records
from batude_fx.support.inputs import Inputs
from batude_fx.support.versions import library_versions
from batude_fx.training.data import Data, check_first, first_images, image_data, seed_all
from batude_fx.training.factorize import factorize, factorize_calibrated
from batude_fx.training.phase import accuracy, measure_quality, run_phase
from batude_fx.training.problem import Problem, dense_network
from batude_fx.training.recipe import Recipe
from batude_fx.training.rounds import Rounds
from batude_fx.training.session import Session
from batude_fx.training.teacher import Teacher
from batude_fx.tucker.ranks import Ranks


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        model: The compressed network, in eval mode.
        accuracy: Share of the evaluation images that it classifies correctly; None without labels.
        original_accuracy: The same share for the dense network before one-shot training.
        quality: How close it is to the dense network on the evaluation images; None with labels.
        flops: Multiply-adds per image, as fvcore counts them.
        dense_flops: Multiply-adds per image of the dense network.
        params: Number of parameters.
        dense_params: Number of parameters of the dense network.
        ranks: Site name to ranks, of the sites in Tucker form.
        rounds: One record per round of BC-ADL: its residuals, rho, flops and ranks.
    """

    model: nn.Module = field(repr=False)
    accuracy: float | None
    original_accuracy: float | None
    quality: Quality | None
    flops: int
    dense_flops: int
    params: int
    dense_params: int
    ranks: Mapping[str, Ranks]
    rounds: list[dict[str, Any]] = field(repr=False)

    def facts(self) -> dict[str, Any]:
        """Return everything but the network, as values for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "model"}
        quality = self.quality and self.quality.model_dump()
        return values | {"quality": quality, "ranks": {name: asdict(ranks) for name, ranks in self.ranks.items()}}


def train(recipe: Recipe, folder: str | os.PathLike[str] | None, *, resume: bool, data: Data | None) -> Result:
    """Train a network as a recipe says; see `batude_fx.run`."""
    with Session(recipe, None if folder is None else Path(folder), resume=resume) as session:
        return _train(session, data)


def _train(session: Session, data: Data | None) -> Result:
    recipe = session.recipe
    seed_all(recipe.seed)  # for randomly initialized weights
    with session.accelerator.main_process_first():  # downloads once; the other processes use the cache
        model = dense_network(recipe)
    problem = Problem.of(model, recipe)  # raises before any training if the budget is out of reach
    session.classes = problem.classes
    model.to(session.accelerator.device)
    (example,) = problem.inputs.tensors()
    size = example.shape[1:]
    with session.accelerator.main_process_first():
        data = data or image_data(recipe, model, size, problem.classes, session.accelerator)
    check_first(data, size, problem.classes if recipe.data.labels else None, recipe.data.accumulate)
    session.check_sites(problem.sites.keys())
    session.start(data)

    if recipe.pretrain and session.is_pending("pretrain"):
        run_phase(session, "pretrain", recipe.pretrain, model)
        model.load_state_dict(_with_fresh_statistics(session, model).state_dict())
    session.save_or_restore_original_(model)
    original_accuracy = None
    if recipe.data.labels:
        original_accuracy = session.compute_once("original_accuracy", lambda: accuracy(session, model))
    inputs = Inputs((session.to_device(example),))
    teachers = [
        Teacher(model, inputs, section.distillation)
        if section.distillation and section.epochs.amount and is_pending
        else None
        for section, is_pending in ((recipe.one_shot, session.is_pending("one_shot")), (recipe.finalize, True))
    ]
    if not recipe.data.labels:
        session.meter = QualityMeter(copy.deepcopy(model), _EvaluationBatches(session), synthetic=False)

    if session.is_pending("one_shot"):
        rounds = Rounds(session, recipe.one_shot, problem, model)
        run_phase(session, "one_shot", recipe.one_shot, model, teachers[0], rounds)
        session.results["ranks"] = rounds.lagrangian.state_dict()["ranks"]
        ranks = _ranks(session)
        if problem.adds_bias:
            small = factorize_calibrated(model, ranks, rounds.metrics, rounds.calibration_batches())
        else:
            small = factorize(model, ranks, hooi_sweeps=recipe.finalize.hooi_sweeps)
    else:
        ranks = _ranks(session)
        small = build_skeleton(model, ranks, biased=ranks if problem.adds_bias else ())
    run_phase(session, "finalize", recipe.finalize, small, teachers[1])
    small = _with_fresh_statistics(session, small)

    small.eval()
    result = Result(
        model=small, accuracy=accuracy(session, small) if recipe.data.labels else None,
        original_accuracy=original_accuracy,
        quality=None if recipe.data.labels else measure_quality(session, small),
        flops=count_flops(small.cpu(), problem.inputs), dense_flops=problem.dense_costs[FLOPS],
        params=count_params(small), dense_params=problem.dense_costs[PARAMS],
        ranks=ranks, rounds=session.rounds,
    )  # fmt: skip
    attach_(small, _record(recipe, problem, result))
    session.finish(small, result.facts())
    return result


@dataclass(frozen=True)
class _EvaluationBatches:
    """The evaluation images of a run, as arguments of the network."""

    session: Session

    def __iter__(self) -> Iterator[Inputs]:
        return (Inputs((self.session.to_device(images),)) for images, _ in self.session.data.evaluation())


def _ranks(session: Session) -> dict[str, Ranks]:
    return {name: Ranks(*pair) for name, pair in session.results["ranks"].items() if pair}


def _with_fresh_statistics(session: Session, model: nn.Module) -> nn.Module:
    """Return the network with batch-norm statistics of training images, if the recipe asks for that."""
    count, size = session.recipe.finalize.batch_norm_images, session.recipe.data.batch_size
    if not count:
        return model
    with session.explaining(lambda: "reading images for batch-norm statistics"):
        images = first_images(session.data, count, session.accelerator)
    return renormalize(model, [Inputs((batch,)) for batch in images.tensor_split(math.ceil(len(images) / size))])


def _record(recipe: Recipe, problem: Problem, result: Result) -> Record:
    """Return the record that is saved with the network and shown in its report."""
    return Record(
        model=type(result.model).__name__, budget=str(recipe.budget), calibration="one-shot training",
        round_to=recipe.one_shot.round_to, seed=recipe.seed, dense_flops=result.dense_flops, flops=result.flops,
        dense_params=result.dense_params, params=result.params, versions=library_versions(*LIBRARIES),
        quality=result.quality, weights_measured=checksum(result.model) if result.quality else None,
        sites=site_records(problem.all_sites, problem.options, result.ranks),
        training=TrainingRecord.model_validate({
            "recipe": recipe.to_yaml(), "original_accuracy": result.original_accuracy, "accuracy": result.accuracy,
            "rounds": result.rounds,
        }),
    )  # fmt: skip
