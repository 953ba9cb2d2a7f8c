"""The report of a real ResNet-50 at half of its flops: it opens from disk, and says what the plan says."""

import json
from pathlib import Path

import pytest

import batude_fx
from tests.browser.chromium import complaints_of, requests_of, started
from tests.real import inputs

pytestmark = pytest.mark.real


def test_report_of_a_real_network(tmp_path: Path) -> None:
    model = inputs.resnet50_timm()
    plan = batude_fx.plan(model, 0.5, calibration=inputs.shop_photos("train", 64))
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):  # Keras' variant of the network
        batude_fx.save(plan.apply(model), tmp_path)

    page = tmp_path / "report.html"
    assert page.stat().st_size < 2_000_000
    with started() as browser:
        browser.get(page.as_uri())
        assert not complaints_of(browser)
        assert {url for url in requests_of(browser) if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
        text = browser.find_element("tag name", "body").text
        print(f"{page.stat().st_size:,} bytes")
    assert f"{plan.dense_flops:,}" in text
    assert f"{plan.flops:,}" in text
    assert f"{plan.dense_params:,}" in text
    assert f"{plan.params:,}" in text

    sites = {site["name"]: site for site in json.loads((tmp_path / "report.json").read_text())["sites"]}
    assert set(plan.ranks) == {name for name, site in sites.items() if site["ranks"]}
    for name, ranks in plan.ranks.items():
        assert sites[name]["ranks"] == [ranks.rank_out, ranks.rank_in]
        assert name in text
