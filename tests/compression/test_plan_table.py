"""The table of a plan: its costs are those of the closed formulas and of fvcore, and 80 columns hold it."""

import html
import re

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis

import batude_fx
from batude_fx.compression.plan import plan_table
from batude_fx.graph.flops import dense_cost, tucker_cost
from batude_fx.graph.site_table import sites_table
from batude_fx.support import numbers
from tests.printed_tables import rows_of, text_of

IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def plan() -> batude_fx.Plan:
    return batude_fx.plan(timm.create_model("efficientnet_b0"), 0.85, calibration=None, example_inputs=IMAGE)


def test_every_site_has_a_row_with_the_costs_of_the_closed_formulas(plan: batude_fx.Plan) -> None:
    rows = rows_of(plan_table(plan))
    assert [row["site"] for row in rows] == [site.name for site in plan.sites]
    for row, site in zip(rows, plan.sites, strict=True):
        assert row["flops"] == numbers.human(dense_cost(site)[0])
        if site.name in plan.ranks:
            ranks = plan.ranks[site.name]
            after, _ = tucker_cost(site, ranks.rank_out, ranks.rank_in)
            assert (row["after"], row["ranks"]) == (numbers.human(after), f"{ranks.rank_out} / {ranks.rank_in}")
            assert float(row["loss"]) == pytest.approx(plan.losses[site.name], rel=0.06)
        else:
            assert (row["after"], row["ranks"], row["loss"]) == ("", "dense", "")
        assert row[""] == ("*" if site.skip_reason else "")


def test_the_totals_are_those_of_fvcore(plan: batude_fx.Plan) -> None:
    model = timm.create_model("efficientnet_b0").eval()
    counts = FlopCountAnalysis(model, IMAGE).unsupported_ops_warnings(enabled=False)
    total = counts.uncalled_modules_warnings(enabled=False).total()
    caption = str(plan_table(plan).caption)
    assert caption.startswith(f"{numbers.human(total)}FLOPs to {numbers.human(plan.flops)}FLOPs (")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M to " in caption
    assert f"{len(plan.ranks)} of {len(plan.sites)} sites replaced" in caption


def test_tables_fit_80_columns_uncut(plan: batude_fx.Plan) -> None:
    for table in (plan_table(plan), sites_table(plan.sites, "efficientnet_b0")):
        text = text_of(table)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        found = re.sub(r"\s", "", text)
        for row in rows_of(table):
            # A long name may go on in the next line; what stands right of it may not be broken.
            assert row["site"][:22] in text
            cells = [cell for name, cell in row.items() if name != "site" and cell]
            pattern = r"\s+".join(re.escape(cell.strip()) for cell in cells)
            assert re.search(rf"{re.escape(row['site'][:22])}\S*\s+{pattern}\s", text), row
        assert re.sub(r"\s", "", str(table.caption)) in found


def test_a_printed_plan_is_plain_text(plan: batude_fx.Plan) -> None:
    text = str(plan)
    assert "\x1b" not in text
    assert all(site.name in text for site in plan.sites)


def test_no_column_is_lost_at_80_columns() -> None:
    model = timm.create_model("tf_efficientnet_b0")
    plan = batude_fx.plan(model, 0.9, calibration=None)
    shown = text_of(plan_table(plan), width=80)
    assert " loss" in shown
    assert all(f"{loss:.2g}" in shown for loss in plan.losses.values())


def test_notebooks_show_the_table(plan: batude_fx.Plan) -> None:
    for shown in (plan, plan.sites):
        page = shown._repr_html_()
        text = html.unescape(re.sub("<[^>]*>", "", page))
        assert text.strip().split() == str(shown).split()


def test_completion_shows_the_public_names() -> None:
    assert sorted(dir(batude_fx)) == sorted([*batude_fx.__all__, "__version__"])
