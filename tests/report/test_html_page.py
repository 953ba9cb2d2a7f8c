"""Reports: their numbers are the plan's, they hold all they show, and what is read back is checked."""

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import batude_fx
from batude_fx.errors import BudgetError, SavedModelError
from batude_fx.evaluation import scores, sweep
from batude_fx.graph import provenance
from batude_fx.report import figures, html_page, record, sweep_points
from tests.toy_networks import small_net

IMAGE = torch.zeros(1, 3, 16, 16)


class Tables(HTMLParser):
    """The cells of every table, by the table's id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self._rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.sources += [one for name, one in attrs if name in {"src", "href"} and one]
        if tag == "table":
            self._rows = self.cells[known.get("id") or ""] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"td", "th"}:
            self._inside = True
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._rows[-1][-1] += data


@pytest.fixture(scope="module")
def plan() -> batude_fx.Plan:
    return batude_fx.plan(small_net(), 0.7, example_inputs=IMAGE, calibration=torch.rand(8, 3, 16, 16), round_to=2)


@pytest.fixture
def folder(plan: batude_fx.Plan, tmp_path: Path) -> Path:
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(plan.apply(small_net()), tmp_path / "out")
    return tmp_path / "out"


def test_the_page_tells_what_the_plan_says(plan: batude_fx.Plan, folder: Path) -> None:
    tables = Tables((folder / "report.html").read_text(encoding="utf-8")).cells
    totals = {row[0]: row[1:3] for row in tables["totals"]}
    assert totals["flops"] == [f"{plan.dense_flops:,}", f"{plan.flops:,}"]
    assert totals["parameters"] == [f"{plan.dense_params:,}", f"{plan.params:,}"]
    rows = {row[0]: row for row in tables["sites"][1:]}
    assert list(rows) == [site.name for site in plan.sites]
    assert plan.ranks
    for name, ranks in plan.ranks.items():
        assert rows[name][6] == f"{ranks.rank_out} / {ranks.rank_in}"
        assert float(rows[name][7]) == pytest.approx(plan.losses[name], rel=0.06)
    numbers = np.array([[int(cell.replace(",", "")) for cell in row[2:6]] for row in rows.values()])
    saved = numbers.sum(0)
    assert saved[0] - saved[1] == plan.dense_flops - plan.flops
    assert saved[2] - saved[3] == plan.dense_params - plan.params


def test_the_page_needs_nothing_from_elsewhere(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    sources = Tables(text).sources
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in text
    assert "url(" not in text


def test_the_record_is_the_same_every_time(plan: batude_fx.Plan, folder: Path) -> None:
    known = plan.record()
    assert html_page.render(known) == html_page.render(known) == (folder / "report.html").read_text(encoding="utf-8")
    assert record.read(folder) == known


def test_spectra_fall_from_one_to_nothing(plan: batude_fx.Plan) -> None:
    for site in plan.record().sites:
        for curve in (site.spectrum_out, site.spectrum_in):
            assert curve is not None
            assert curve[0] == 1
            assert curve[-1] == 0
            assert list(curve) == sorted(curve, reverse=True)


def test_names_of_strangers_are_text(plan: batude_fx.Plan) -> None:
    text = html_page.render(plan.record().model_copy(update={"model": "<script>alert(1)</script>"}))
    assert "<script" not in text


def test_dollars_in_names_are_no_formulas(tmp_path: Path) -> None:
    odd = nn.Sequential(OrderedDict({"a$b": nn.Conv2d(3, 32, 3), "c$": nn.Conv2d(32, 32, 3)}))
    small = batude_fx.compress(odd, 0.6, example_inputs=torch.zeros(1, 3, 8, 8), calibration=None)
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path / "out")
    assert "a$b" in (tmp_path / "out" / "report.html").read_text()


def test_a_loaded_network_keeps_its_report(plan: batude_fx.Plan, folder: Path, tmp_path: Path) -> None:
    again = batude_fx.load(folder, model=small_net())
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(again, tmp_path / "again")
    for name in ("report.html", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt by name")
def test_another_network_takes_the_old_report_away(plan: batude_fx.Plan, folder: Path) -> None:
    sweep_points.write(POINTS, folder)
    html_page.write_pages(folder)
    other = plan.apply(small_net())
    provenance.attach_(other, None)
    batude_fx.save(other, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", "{", "report.json is broken"),
        ("report.json", '{"format": 2}', "report.json is broken: format"),
        ("sweep.json", '[{"budget": "x"}]', "sweep.json is broken"),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(SavedModelError, match=message):
        html_page.write_pages(folder)


def test_a_folder_without_a_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=r"holds no report\.json and no sweep\.json"):
        html_page.write_pages(tmp_path)


POINTS = [
    sweep_points.Point(0.5, 50, 5, 1.5, 0.75, 0.5, 1.0),
    sweep_points.Point(1.0, 100, 10, 2.5, 1.0, 0.75, 1.0),
]


def test_a_sweep_is_shown_and_drawn(folder: Path) -> None:
    sweep_points.write(POINTS, folder)
    assert sweep_points.read(folder) == POINTS
    names = ["report.html", "flops.png", "spectra.png", "sweep.png"]
    assert html_page.write_pages(folder) == [folder / name for name in names]
    rows = Tables((folder / "report.html").read_text(encoding="utf-8")).cells["sweep"]
    assert rows[1:] == [
        ["0.5", "50", "5", "1.50", "0.7500", "0.5000", "1.0000"],
        ["1.0", "100", "10", "2.50", "1.0000", "0.7500", "1.0000"],
    ]
    for name in names[1:]:
        assert min(Image.open(folder / name).size) > 100


def test_a_sweep_without_a_network_is_a_picture(tmp_path: Path) -> None:
    sweep_points.write([replace(point, top1=None, top5=None) for point in POINTS], tmp_path)
    assert html_page.write_pages(tmp_path) == [tmp_path / "sweep.png"]


def test_pictures_show_the_numbers(plan: batude_fx.Plan) -> None:
    known = plan.record()
    drawn = figures.pictures(known, POINTS)
    widths = [patch.get_width() for patch in drawn["flops"].axes[0].patches]
    assert widths == [site.dense_flops for site in known.sites] + [site.flops for site in known.sites]
    line = drawn["sweep"].axes[1].lines[0]
    assert line.get_xydata().tolist() == [[point.milliseconds, point.agreement] for point in POINTS]


ROUND: dict[str, Any] = {
    "phase": "one_shot", "step": 0, "round": 0, "primal": 0.3, "dual": 0.2, "rho": 0.1, "flops": 9, "keep": 0.9,
}  # fmt: skip


def test_training_has_its_pictures(plan: batude_fx.Plan) -> None:
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


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.3:0.9:0.1", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0.5:0.5:1", [0.5]),
        ("0.75,0.5,0.75", [0.5, 0.75]),
        ("0.4", [0.4]),
        ("0.1:0.35:0.1", [0.1, 0.2, 0.3]),
    ],
)
def test_budgets_are_read(text: str, numbers: list[float]) -> None:
    assert sweep.parse_budgets(text) == numbers


NONSENSE = ["", "a", "nan", "0,0.5", "0.3:0.9", "0.9:0.3:0.1", "0.3:0.9:0", "0.3:0.9:-1", "0.3:1.2:0.1"]
NONSENSE += ["0.1,0.2:0.3:1", "0.1:0.9:0.0001", "0.1:nan:0.1", "0.1:inf:0.1"]


@pytest.mark.parametrize("text", NONSENSE)
def test_budgets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(repr(text))):
        sweep.parse_budgets(text)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[[int], Path]:
    def make(classes: int) -> Path:
        values = np.random.default_rng(0)
        for label in range(classes):
            (tmp_path / "photos" / f"{label}").mkdir(parents=True)
            pixels = values.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{label}" / "0.png")
        return tmp_path / "photos"

    return make


def _network() -> nn.Module:
    model = small_net()
    vars(model)["pretrained_cfg"] = {"input_size": (3, 16, 16)}  # what images are resized to
    return model


def test_a_sweep_is_the_plans_own_networks(plan: batude_fx.Plan, photos: Callable[[int], Path]) -> None:
    model = _network()
    points = sweep.sweep(model, plan, [0.6, 0.8], scores.find_photos(photos(5)))
    assert [point.budget for point in points] == [0.6, 0.8, 1.0]
    assert [point.flops for point in points] == [plan.at(0.6).flops, plan.at(0.8).flops, plan.dense_flops]
    assert points[-1].params == sum(parameter.numel() for parameter in model.parameters())
    assert points[-1].agreement == 1
    assert all(point.milliseconds > 0 and point.top5 == 1 for point in points)


def test_folders_that_are_no_classes_give_agreement_alone(plan: batude_fx.Plan, photos: Callable[[int], Path]) -> None:
    with pytest.warns(UserWarning, match="has 2 class folders, the network has 5"):
        points = sweep.sweep(_network(), plan, [0.6], scores.find_photos(photos(2)))
    assert [point.top1 for point in points] == [None, None]


def test_a_budget_out_of_reach_stops_a_sweep_before_it_begins(plan: batude_fx.Plan) -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        sweep.sweep(_network(), plan, [0.01, 0.02], scores.Photos(Path("/nowhere"), []))


def test_budgets_out_of_reach_are_left_out(plan: batude_fx.Plan, photos: Callable[[int], Path]) -> None:
    with pytest.warns(UserWarning, match=r"left out: 0\.01, 0\.02, as the budget of 0\.0200 of the flops is out of"):
        points = sweep.sweep(_network(), plan, [0.01, 0.02, 0.6], scores.find_photos(photos(5)))
    assert [point.budget for point in points] == [0.6, 1.0]
