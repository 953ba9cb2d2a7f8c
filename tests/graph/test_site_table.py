"""The table of the sites of a network: sizes, reasons and names."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

import batude_fx
from batude_fx.graph.site_table import Sites, sites_table
from tests.printed_tables import rows_of, text_of

IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def found_sites() -> Sites:
    return batude_fx.discover(timm.create_model("efficientnet_b0"), IMAGE)


def test_brackets_in_names_are_shown() -> None:
    sites = batude_fx.discover(timm.create_model("resnet18"), (IMAGE,), exclude="[a-c]onv1")
    assert "excluded by '[a-c]onv1'" in text_of(sites_table(sites, "net[bold]"))
    assert "net[bold]" in text_of(sites_table(sites, "net[bold]"))


def test_every_reason_is_a_note_with_its_sites(found_sites: Sites) -> None:
    reasons = ("odd kernel", "weight is shared", "odd kernel", "odd kernel", "odd kernel")
    sites = [replace(site, skip_reason=reason) for site, reason in zip(found_sites, reasons, strict=False)]
    names = [site.name for site in sites]
    caption = str(sites_table([*sites, *found_sites[5:7]], "net").caption)
    assert f"\n* odd kernel: {names[0]}, {names[2]}, {names[3]} and 1 more" in caption
    assert f"\n* weight is shared: {names[1]}" in caption
    assert caption.count("\n* ") == len({*reasons} | {site.skip_reason for site in found_sites[5:7]} - {None})


def test_the_table_of_sites_shows_their_sizes(found_sites: Sites) -> None:
    table = sites_table(found_sites, "efficientnet_b0")
    rows = rows_of(table)
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
def test_a_convolution_is_described_in_few_letters(change: dict[str, Any], text: str) -> None:
    site = batude_fx.ConvSite("a", "Conv2d", 32, 64, (3, 3), 1, False, 4, 4, 1, "fx")
    assert rows_of(sites_table([replace(site, **change)], "net"))[0]["convolution"] == text
