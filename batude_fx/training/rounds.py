"""The outer iteration of BC-ADL: when to project, under which budget, in which metric, with which rho."""

import torch
from torch import nn

from batude_fx.calibration.statistics import statistics
from batude_fx.errors import CalibrationError, TrainingError
from batude_fx.training.data import first_images
from batude_fx.training.lagrangian import Lagrangian, Residuals
from batude_fx.training.problem import Problem
from batude_fx.training.recipe import OneShot
from batude_fx.training.session import Session
from batude_fx.tucker.spectra import Metric

_BATCH = 32  # images that are measured together; bounds the memory


class Rounds:
    """The rounds of one run.

    Args:
        session: The run.
        settings: The recipe's `one_shot`.
        problem: The sites, and the budget.
        model: Whose weights are split.

    Attributes:
        split: The weights' twins and duals.
        schedule: First step, share of the way to the budget, and rho, of every round.
    """

    def __init__(self, session: Session, settings: OneShot, problem: Problem, model: nn.Module) -> None:
        self.session, self.settings, self.problem, self.model = session, settings, problem, model
        self.schedule = settings.rounds(session.per_epoch)
        self.split = Lagrangian(problem.constraints(model), rho=settings.rho[0])

    def begin_if_due(self, step: int) -> bool:
        """At the first step of a round: find its ranks, move z and u, set rho. Whether it was one."""
        index = next((index for index, (first, _, _) in enumerate(self.schedule) if first == step), None)
        if index is None:
            return False
        _, share, rho = self.schedule[index]
        self._project(share)
        residuals = self.split.update_duals_() if index else self.split.residuals()
        self.split.rescale_(rho)
        self._note(step, index, residuals)
        return True

    @torch.no_grad()
    def end(self, step: int) -> None:
        """After the last step: decide the ranks for good, and give the weights exactly these ranks."""
        self.split.forget_duals_()
        self._project(1.0)
        self._note(step, len(self.schedule), self.split.residuals())
        for name, one in self.split.constraints.items():
            one.weight.copy_(self.split.z[name])

    def _project(self, share: float) -> None:
        try:
            self.split.project_(self.problem.limit(share), self._metrics())
        except (torch.linalg.LinAlgError, CalibrationError) as error:  # type: ignore[attr-defined]
            raise TrainingError(
                "the weights have no spectra, most likely as they are no longer finite. Lower one_shot.lr, now "
                f"{self.settings.lr:g}."
            ) from error

    def _metrics(self) -> dict[str, Metric]:
        """Which errors matter now, on training images; empty where the weights alone are judged."""
        count = self.settings.calibration_images
        if not count:
            return {}
        images = first_images(self.session.data, count, self.session.accelerator)
        batches = ((self.session.placed(batch),) for batch in torch.split(images, _BATCH))
        return statistics(self.model, list(self.problem.sites.values()), batches)

    def _note(self, step: int, index: int, residuals: Residuals) -> None:
        flops = self.problem.total_flops(self.split.flops)
        record = {
            "phase": "one_shot", "step": step, "round": index, "primal": residuals.primal, "dual": residuals.dual,
            "rho": self.split.rho, "flops": flops, "keep": flops / self.problem.dense[0],
        }  # fmt: skip
        self.session.note(record)
        self.session.rounds.append({**record, "ranks": self.split.state_dict()["ranks"]})
