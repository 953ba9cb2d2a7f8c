"""The zoo page's data, `docs/data/zoo.json`: every model that the libraries list, every convolution accounted for.

`make zoo` writes it. The list of models is compared where the installed libraries list the same ones: timm adds models
in any release, torchvision in none that only differs in its last number.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo_checks import all_models, family

DATA: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "data" / "zoo.json").read_text())
MODELS, FAMILIES = DATA["models"], DATA["families"]
SWEPT = {name: record for record in MODELS for name in [record["name"]]}
same_libraries = pytest.mark.skipif(
    version("timm") != DATA["versions"]["timm"]
    or version("torchvision").split(".")[:2] != DATA["versions"]["torchvision"].split(".")[:2],
    reason=f"made with timm {DATA['versions']['timm']} and torchvision {DATA['versions']['torchvision']}",
)


@same_libraries
def test_every_listed_model_was_swept_once() -> None:
    assert len(SWEPT) == len(MODELS)
    assert SWEPT.keys() == set(all_models())


@same_libraries
def test_every_family_was_compressed() -> None:
    assert [record["family"] for record in FAMILIES] == sorted({family(name) for name in all_models()})


def test_every_convolution_that_ran_is_a_site() -> None:
    wrong = [name for name, record in SWEPT.items() if record["calls"] != record["counted"] or record["missing"]]
    assert not wrong


def test_every_site_is_eligible_or_has_its_reason() -> None:
    for record in MODELS:
        assert record["eligible"] + sum(record["skipped"].values()) == record["convolutions"]
        assert sum(record["found_by"].values()) == sum(record["kinds"].values()) == record["convolutions"]


def test_no_model_failed() -> None:
    assert not [(record["name"], record["error"]) for record in (*MODELS, *FAMILIES) if "error" in record]


def test_every_family_meets_its_budget_or_says_why_not() -> None:
    for record in FAMILIES:
        assert "note" in record or record["compressed"] <= record["keep"] * record["flops"]


def test_what_tucker_can_reach_is_a_share() -> None:
    for record in MODELS:
        for layers in ("conv", "conv+linear"):
            if layers in record:
                assert 0 <= record[layers]["share"] <= 1
                assert 0 < record[layers]["smallest"] <= 1
                assert record[layers]["smallest"] >= 1 - record[layers]["share"] - 1e-4
