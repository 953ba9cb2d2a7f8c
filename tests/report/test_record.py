"""The record of a plan is the same every time, and its spectra fall from one to nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import batude_fx
from batude_fx import SavedModelError
from batude_fx.report import html_page, record


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


def test_limits_hold_for_what_is_read_not_for_what_is_made(plan: batude_fx.Plan, tmp_path: Path) -> None:
    (site, *_) = plan.sites
    many = tuple(replace(site, name=f"conv{index}") for index in range(5001))
    made = plan.record().model_copy(update={"sites": record.site_records(many, {}, {})})
    assert len(record.Record(**dict(made)).sites) == 5001
    record.write(made, tmp_path)
    with pytest.raises(SavedModelError, match="it has 5,001 sites, and a report shows at most 5,000"):
        record.read(tmp_path)


@pytest.mark.parametrize(("change", "place"), [({"round_to": 0}, "round_to"), ({"ranks": [0, 0]}, r"sites\.0\.ranks")])
def test_a_report_of_ranks_that_no_network_has_is_refused(
    change: dict[str, object], place: str, plan: batude_fx.Plan, tmp_path: Path
) -> None:
    content = json.loads(plan.record().model_dump_json())
    (content if "round_to" in change else content["sites"][0]).update(change)
    (tmp_path / record.FILE).write_text(json.dumps(content))
    with pytest.raises(SavedModelError, match=f"is broken: {place}"):
        record.read(tmp_path)
