"""The record of a plan is the same every time, and its spectra fall from one to nothing."""

from pathlib import Path

import batude_fx
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
