"""The catalog's page is made from its record, the record says what is measured, and the command prints it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fqt.cli import cli
from fqt.quant import METHODS
from fqt.quant.examples import FAMILIES, gradients
from fqt.quant.names import method_of
from fqt.records import read_json
from fqt.report import catalog_figure, catalog_markdown, catalog_table, save_figure
from fqt.stats.catalog import mean_ratio

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record() -> dict:
    return read_json(ROOT / "results" / "catalog.json")


def test_the_page_is_the_records(record: dict) -> None:
    assert (ROOT / "docs" / "catalog.md").read_text(encoding="utf-8") == catalog_markdown(record)
    for cited in ("2004.04729", "2510.25602", "2606.20381", "Schuchman", "Stockham", "Lipshitz"):
        assert cited in catalog_markdown(record)


def _words(picture: Path) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", picture.read_text(encoding="utf-8"))


def test_the_picture_is_small_and_made_of_the_record(record: dict, tmp_path: Path) -> None:
    save_figure(catalog_figure(record), tmp_path / "catalog.svg")
    assert 0 < (ROOT / "docs" / "catalog.svg").stat().st_size < 200_000
    assert _words(tmp_path / "catalog.svg") == _words(ROOT / "docs" / "catalog.svg")


def test_certificates_say_what_is_declared(record: dict) -> None:
    for row in record["rows"]:
        assert row["certified"]["verdict"] == row["bias"].partition(":")[0], row["name"]


def test_what_was_asked_of_the_two_sided_quantizer(record: dict) -> None:
    for family in FAMILIES:
        for other, ratio in record["ratios"][family].items():
            assert mean_ratio("thq4d", other, gradients(family).values()) == pytest.approx(ratio, rel=1e-3)
    for ratios in record["ratios"].values():
        assert ratios["psq4"] <= 0.27
        assert ratios["shq4d"] <= 0.75
        assert ratios["nvfp4"] <= 0.5


def test_the_command_measures_what_the_record_says(
    record: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all methods; variances to the last bits of another machine's sums."""
    file = tmp_path / "catalog.json"
    monkeypatch.setattr("sys.argv", ["…/fqt/__main__.py", "catalog"])
    result = CliRunner().invoke(cli, ["catalog", "--json", str(file)])
    assert result.exit_code == 0
    found = json.loads(file.read_text())
    assert found["environment"]["command"] == ["fqt", "catalog"]
    assert [row["name"] for row in found["rows"]] == [row["name"] for row in record["rows"]]
    for mine, theirs in zip(found["rows"], record["rows"], strict=True):
        assert mine["name"] in result.output
        assert mine["variance"] == pytest.approx(theirs["variance"], rel=1e-3)
        assert {**mine, "variance": None} == {k: v for k, v in {**theirs, "variance": None}.items() if k in mine}
    assert {method_of(row["name"]).stem for row in found["rows"]} == set(METHODS)


def test_the_shipped_matrices_are_real_and_small() -> None:
    for family in FAMILIES:
        found = gradients(family)
        assert len(found) == 4
        for x in found.values():
            assert x.dtype == torch.float32
            assert bool(torch.isfinite(x).all())
            assert x.shape[0] >= 128
        sizes = [x.double().square().mean(1).sqrt() for x in found.values()]
        assert max(float(rows.max() / rows.median()) for rows in sizes) > 3  # few rows carry one of them at least
        path = Path(__file__).parents[2] / "src" / "fqt" / "quant" / "data" / f"{family}.npz"
        assert path.stat().st_size < 400_000


def test_a_record_without_certificates_has_a_table(record: dict) -> None:
    bare = {**record, "rows": [{k: v for k, v in row.items() if k != "certified"} for row in record["rows"]]}
    assert "certified" in catalog_table(record).header
    assert "certified" not in catalog_table(bare).header
    assert all(len(row) == len(catalog_table(bare).header) for row in catalog_table(bare).rows)
