"""The page of a report: it says what the plan says, needs nothing from elsewhere, and names files that are broken."""

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import batude_fx
from batude_fx.errors import SavedModelError
from batude_fx.graph import provenance
from batude_fx.report import html_page, sweep_points
from tests.report.html_tables import Tables
from tests.toy_networks import small_net


def test_the_page_shows_the_numbers_of_the_plan(plan: batude_fx.Plan, folder: Path) -> None:
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


def test_html_and_control_characters_in_the_name_of_a_model_are_escaped(plan: batude_fx.Plan) -> None:
    text = html_page.render(plan.record().model_copy(update={"model": "<script>alert(1)</script>\x1b[2J"}))
    assert "<script" not in text
    assert "\x1b" not in text
    assert r"\x1b[2J" in text


def test_dollars_in_names_are_not_read_as_formulas(tmp_path: Path) -> None:
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
def test_saving_another_network_removes_the_old_report(
    plan: batude_fx.Plan, folder: Path, points: list[sweep_points.Point]
) -> None:
    sweep_points.write(points, folder)
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


def test_one_of_two_times_is_refused(plan: batude_fx.Plan, folder: Path) -> None:
    """The page shows both, and their ratio."""
    times = plan.record().model_dump() | {"seconds": 0.5}
    (folder / "report.json").write_text(json.dumps(times))
    with pytest.raises(SavedModelError, match=r"is broken: dense_seconds and seconds are given together"):
        html_page.write_pages(folder)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match=r"holds no report\.json and no sweep\.json"):
        html_page.write_pages(tmp_path)


def test_a_sweep_is_shown_and_drawn(folder: Path, points: list[sweep_points.Point]) -> None:
    sweep_points.write(points, folder)
    assert sweep_points.read(folder) == points
    names = ["report.html", "flops.png", "spectra.png", "sweep.png"]
    assert html_page.write_pages(folder) == [folder / name for name in names]
    rows = Tables((folder / "report.html").read_text(encoding="utf-8")).cells["sweep"]
    assert rows[1:] == [
        ["0.5", "50", "5", "1.50", "0.7500", "0.5000", "1.0000"],
        ["1.0", "100", "10", "2.50", "1.0000", "0.7500", "1.0000"],
    ]
    for name in names[1:]:
        assert min(Image.open(folder / name).size) > 100


def test_a_sweep_without_a_network_is_a_picture(tmp_path: Path, points: list[sweep_points.Point]) -> None:
    sweep_points.write([replace(point, top1=None, top5=None) for point in points], tmp_path)
    assert html_page.write_pages(tmp_path) == [tmp_path / "sweep.png"]
