"""Pictures show the numbers that they are drawn from."""

import json
from typing import Any

import numpy as np

import batude_fx
from batude_fx.quality.quality import Search, Trial
from batude_fx.report import figures, html_page, record, sweep_points
from tests.report.html_tables import Tables


def test_pictures_show_the_numbers(plan: batude_fx.Plan, points: list[sweep_points.Point]) -> None:
    known = plan.record()
    drawn = figures.pictures(known, points)
    widths = [patch.get_width() for patch in drawn["flops"].axes[0].patches]
    assert widths == [site.dense_flops for site in known.sites] + [site.flops for site in known.sites]
    line = drawn["sweep"].axes[1].lines[0]
    assert line.get_xydata().tolist() == [[point.milliseconds, point.agreement] for point in points]


def test_a_search_shows_what_was_tried_and_asked_for(plan: batude_fx.Plan) -> None:
    trials = tuple(Trial(flops=flops, value=value, bound=value - 0.1) for flops, value in ((80, 0.9), (40, 0.7)))
    known = plan.record().model_copy(
        update={"search": Search(target="agreement", least=0.75, trials=trials), "dense_flops": 100}
    )
    counts, measured, asked = figures.pictures(known)["search"].axes[0].lines
    assert np.allclose(counts.get_xydata(), [[0.4, 0.6], [0.8, 0.8]])
    assert np.allclose(measured.get_xydata(), [[0.4, 0.7], [0.8, 0.9]])
    assert asked.get_ydata() == [0.75, 0.75]


ROUND: dict[str, Any] = {
    "phase": "one_shot", "step": 0, "round": 0, "primal": 0.3, "dual": 0.2, "rho": 0.1, "flops": 9, "keep": 0.9,
}  # fmt: skip


def test_a_trained_network_has_pictures_of_its_rounds(plan: batude_fx.Plan) -> None:
    rounds = [{**ROUND, "ranks": {"0": None, "3": [2, 1]}}, {**ROUND, "round": 1, "ranks": {"0": [2, 2], "3": [1, 1]}}]
    trained = {"recipe": "seed: 3\n", "original_accuracy": 0.9, "accuracy": 0.85, "rounds": rounds}
    data = {**plan.record().model_dump(mode="json"), "training": trained}
    known = record.Record.model_validate_json(json.dumps(data))
    drawn = figures.pictures(known)
    assert set(drawn) == {"flops", "spectra", "ranks", "residuals"}
    shown = drawn["ranks"].axes[0].images[0].get_array()
    assert np.allclose(shown, [[1, 2 / 6], [2 / 4, 1 / 4]])  # of 6 and of 4 output channels of a group
    text = html_page.render(known)
    assert "seed: 3" in text
    assert Tables(text).cells["totals"][3][:3] == ["accuracy", "90.0 %", "85.0 %"]
