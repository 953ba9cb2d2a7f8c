"""The rounds of BC-ADL: each chooses ranks under the budget of the round, then trains with the rho of the round.

The z- and u-step stand at the start of a round; the training steps that follow are the W-step.
"""

from collections.abc import Iterator

import torch
from torch import nn

from batude_fx.budget.rank_options import FLOPS
from batude_fx.calibration.statistics import statistics
from batude_fx.errors import CalibrationError, TrainingError
from batude_fx.support.inputs import Inputs
from batude_fx.training.data import first_images
from batude_fx.training.lagrangian import Lagrangian, Residuals
from batude_fx.training.problem import Problem
from batude_fx.training.recipe import OneShot
from batude_fx.training.session import Session
from batude_fx.tucker.metric import Metric

_BATCH = 32  # images per forward and backward pass, which bounds the memory


class Rounds:
    """The rounds of one run.

    Args:
        session: The run.
        settings: The recipe's `one_shot` section.
        problem: The sites and the budget.
        model: The dense network.

    Attributes:
        lagrangian: The low-rank copies of the weights, and the dual variables.
        schedule: All rounds, in order.
        metrics: The metric of each site, as last measured; empty before, and where ranks depend on the weights alone.
    """

    def __init__(self, session: Session, settings: OneShot, problem: Problem, model: nn.Module) -> None:
        self.session, self.settings, self.problem, self.model = session, settings, problem, model
        self.schedule = settings.rounds(session.steps_per_epoch)
        self.lagrangian = Lagrangian(problem.constraints(model), rho=settings.rho[0])
        self.metrics: dict[str, Metric] = {}

    def begin_if_due(self, step: int) -> bool:
        """Choose ranks, update z and u and set rho if a round begins at this step; return whether one does."""
        index = next((index for index, entry in enumerate(self.schedule) if entry.first_step == step), None)
        if index is None:
            return False
        self._project(self.schedule[index].reduction)
        # Before the first round there was no W-step whose distance from z the duals could accumulate.
        residuals = self.lagrangian.update_duals_() if index else self.lagrangian.residuals()
        self.lagrangian.rescale_(self.schedule[index].rho)
        self._log(step, index, residuals)
        return True

    @torch.no_grad()
    def end(self, step: int) -> None:
        """Choose the final ranks after the last step, and truncate trained weights to exactly these ranks."""
        self.lagrangian.reset_duals_()
        self._project(1.0)
        self._log(step, len(self.schedule), self.lagrangian.residuals())
        if not step:  # the weights are the original's, which `factorize` approximates in the metrics
            return
        for name, constraint in self.lagrangian.constraints.items():
            constraint.weight.copy_(self.lagrangian.z[name])

    def _project(self, reduction: float) -> None:
        try:
            self.metrics = self._metrics()
            self.lagrangian.project_(self.problem.capacity_at(reduction), self.metrics)
        except (torch.linalg.LinAlgError, CalibrationError) as error:  # type: ignore[attr-defined]
            raise TrainingError(
                "the weights cannot be decomposed, most likely as they are no longer finite. "
                f"{self.session.way_to_converge('one_shot', self.settings.lr)}."
            ) from error

    def _metrics(self) -> dict[str, Metric]:
        """Return the metric of each site, measured on training images; none where the recipe has no such images."""
        if not self.settings.calibration_images:
            return {}
        return statistics(self.model, list(self.problem.sites.values()), self.calibration_batches())

    def calibration_batches(self) -> Iterator[Inputs]:
        """Yield the training images on which the recipe measures metrics, as arguments of the network."""
        images = first_images(self.session.data, self.settings.calibration_images, self.session.accelerator)
        return (Inputs((self.session.to_device(batch),)) for batch in torch.split(images, _BATCH))

    def _log(self, step: int, index: int, residuals: Residuals) -> None:
        flops = self.problem.total_flops(self.lagrangian.flops)
        record = {
            "phase": "one_shot", "step": step, "round": index, "primal": residuals.primal, "dual": residuals.dual,
            "rho": self.lagrangian.rho, "flops": flops, "keep": flops / self.problem.dense_costs[FLOPS],
        }  # fmt: skip
        self.session.add_to_log(record)
        self.session.rounds.append({**record, "ranks": self.lagrangian.state_dict()["ranks"]})
