"""Tables: every site and number is there, nothing is cut at 80 columns."""

import re
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from rich.table import Table

import batude_fx
from batude_fx.compression.plan import plan_table
from batude_fx.graph.flops import dense_cost, tucker_cost
from batude_fx.graph.site_table import sites_table
from batude_fx.support import numbers, progress
from batude_fx_cli.tables import saved_table


def _text(table: Table, width: int = 80) -> str:
    file = StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


def _rows(table: Table) -> list[dict[str, Any]]:
    """Every row, by the names of the columns; the last column has none."""
    cells = zip(*(column.cells for column in table.columns), strict=True)
    return [dict(zip([str(column.header) for column in table.columns], row, strict=True)) for row in cells]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 "), (999, "999 "), (1000, "1 k"), (1234, "1.23 k"), (25557032, "25.6 M"), (4089184256, "4.09 G"),
        (3e13, "30 T"), (5.5, "5.5 "), (999_499, "999 k"), (999_999, "1 M"), (123_400_000, "123 M"),
    ],
)  # fmt: skip
def test_counts_have_three_digits_and_a_prefix(count: float, text: str) -> None:
    assert numbers.human(count) == text


@pytest.mark.parametrize(("part", "whole", "text"), [(1, 3, "33.3 %"), (1, 1, "100.0 %"), (0, 7, "0.0 %"), (1, 0, "-")])
def test_shares_are_percentages(part: float, whole: float, text: str) -> None:
    assert numbers.percent(part, whole) == text


IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def plan() -> batude_fx.Plan:
    return batude_fx.plan(timm.create_model("efficientnet_b0"), 0.85, calibration=None, example_inputs=IMAGE)


def test_a_row_per_site_with_the_costs_of_the_closed_formulas(plan: batude_fx.Plan) -> None:
    rows = _rows(plan_table(plan))
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


def test_brackets_in_names_are_shown() -> None:
    sites = batude_fx.discover(timm.create_model("resnet18"), (IMAGE,), exclude="[a-c]onv1")
    assert "excluded by '[a-c]onv1'" in _text(sites_table(sites, "net[bold]"))
    assert "net[bold]" in _text(sites_table(sites, "net[bold]"))


def test_the_totals_are_fvcores(plan: batude_fx.Plan) -> None:
    model = timm.create_model("efficientnet_b0").eval()
    counts = FlopCountAnalysis(model, IMAGE).unsupported_ops_warnings(enabled=False)
    total = counts.uncalled_modules_warnings(enabled=False).total()
    caption = str(plan_table(plan).caption)
    assert caption.startswith(f"{numbers.human(total)}FLOPs to {numbers.human(plan.flops)}FLOPs (")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M to " in caption
    assert f"{len(plan.ranks)} of {len(plan.sites)} sites replaced" in caption


def test_every_reason_is_a_note_with_its_sites(plan: batude_fx.Plan) -> None:
    reasons = ("odd kernel", "weight is shared", "odd kernel", "odd kernel", "odd kernel")
    sites = [replace(site, skip_reason=reason) for site, reason in zip(plan.sites, reasons, strict=False)]
    names = [site.name for site in sites]
    caption = str(sites_table([*sites, *plan.sites[5:7]], "net").caption)
    assert f"\n* odd kernel: {names[0]}, {names[2]}, {names[3]} and 1 more" in caption
    assert f"\n* weight is shared: {names[1]}" in caption
    assert caption.count("\n* ") == len({*reasons} | {site.skip_reason for site in plan.sites[5:7]} - {None})


def test_the_sites_of_a_network_with_their_sizes(plan: batude_fx.Plan) -> None:
    table = sites_table(plan.sites, "efficientnet_b0")
    rows = _rows(table)
    assert rows[0] == {
        "site": "conv_stem", "convolution": "3 > 32 3x3", "flops": "885 k", "params": "864 ", "calls": "1",
        "found": "fx", "": "",
    }  # fmt: skip
    assert rows[1]["convolution"] == "32 > 32 3x3 dw"
    assert "65 of 81 can be replaced" in str(table.caption)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"groups": 4}, "32 > 64 3x3 /4"),
        ({"groups": 32}, "32 > 64 3x3 dw"),
        ({"kind": "Conv1d", "kernel_size": (5,)}, "Conv1d 32 > 64 5"),
        ({"kind": "Linear", "kernel_size": ()}, "Linear 32 > 64"),
    ],
)
def test_a_convolution_in_few_letters(change: dict[str, Any], text: str) -> None:
    site = batude_fx.ConvSite("a", "Conv2d", 32, 64, (3, 3), 1, False, 4, 4, 1, "fx")
    assert _rows(sites_table([replace(site, **change)], "net"))[0]["convolution"] == text


def test_tables_fit_80_columns_uncut(plan: batude_fx.Plan) -> None:
    for table in (plan_table(plan), sites_table(plan.sites, "efficientnet_b0")):
        text = _text(table)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        found = re.sub(r"\s", "", text)
        for row in _rows(table):
            # A long name may go on in the next line; what stands right of it may not be broken.
            assert row["site"][:22] in text
            cells = [cell for name, cell in row.items() if name != "site" and cell]
            pattern = r"\s+".join(re.escape(cell.strip()) for cell in cells)
            assert re.search(rf"{re.escape(row['site'][:22])}\S*\s+{pattern}\s", text), row
        assert re.sub(r"\s", "", str(table.caption)) in found


def test_a_saved_folder_with_its_ranks() -> None:
    facts = {
        "model_args": {"library": "timm", "base": "resnet18", "ranks": {"conv1": (8, 3), "fc": (16, 16)}},
        "params": 11_000_000, "bytes": 44_100_000, "flops": 900_000_000,
    }  # fmt: skip
    table = saved_table("small", facts)
    assert str(table.title) == "small: timm resnet18"
    assert _rows(table) == [{"site": "conv1", "ranks": "8 / 3"}, {"site": "fc", "ranks": "16 / 16"}]
    assert str(table.caption).startswith("900 MFLOPs, 11 M parameters, 44.1 MB on disk; 2 sites in Tucker form.")


def test_a_printed_plan_is_plain_text(plan: batude_fx.Plan) -> None:
    text = str(plan)
    assert "\x1b" not in text
    assert all(site.name in text for site in plan.sites)


def test_progress_is_silent_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_on_its_error_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = StringIO()
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True, write=terminal.write, flush=lambda: None))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress.track(iter(range(3)), "counting", 3)) == [0, 1, 2]
    assert "counting" in terminal.getvalue()
    assert capsys.readouterr().out == ""
