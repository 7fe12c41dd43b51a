import copy
import math
import statistics

import pytest
from rich.console import Console

from fqt.errors import FqtError
from fqt.records import write_json
from fqt.report import (
    MeanStd,
    comparison_figure,
    has_costs,
    markdown,
    noise_figure,
    read_comparison,
    save_figure,
    summarize,
    terminal_table,
)
from fqt.report.figures import comparison_charts
from fqt.report.tables import caption

from .conftest import ACCURACY


def test_rows(record):
    rows = {row.recipe: row for row in summarize(record)}
    assert list(rows) == ["qat", "ptq4", "bhq4"]
    ptq = rows["ptq4"]
    assert ptq.metrics["accuracy"].mean == pytest.approx(sum(ACCURACY["ptq4"]) / 3)
    assert ptq.metrics["accuracy"].std == pytest.approx(statistics.stdev(ACCURACY["ptq4"]))
    pairs = [a - b for a, b in zip(ACCURACY["ptq4"], ACCURACY["qat"], strict=True)]
    assert ptq.difference.mean == pytest.approx(statistics.mean(pairs))
    assert ptq.difference.error == pytest.approx(statistics.stdev(pairs) / math.sqrt(3))
    assert ptq.ratio.mean == pytest.approx(0.31)
    assert rows["qat"].difference is None


def test_pairs_are_matched_by_seed_and_not_by_order(record):
    shuffled = copy.deepcopy(record)
    shuffled["runs"].reverse()
    assert [row.difference for row in summarize(shuffled)] == [row.difference for row in summarize(record)]
    shuffled["runs"] = [r for r in shuffled["runs"] if (r["recipe"], r["seed"]) != ("qat", 1)]
    difference = summarize(shuffled)[1].difference
    assert difference.count == 2
    assert difference.mean == pytest.approx((0.85 - 0.90 + 0.81 - 0.85) / 2)


def test_without_the_baseline_there_is_no_difference(record):
    record["recipes"] = ["ptq4", "bhq4"]
    record["runs"] = [run for run in record["runs"] if run["recipe"] != "qat"]
    assert all(row.difference is None for row in summarize(record))


def test_seeds_that_were_not_asked_for_do_not_count(record):
    record["seeds"] = [0]
    assert summarize(record)[1].ratio == MeanStd.of([0.31])


def test_markdown(record):
    text = markdown(record, summarize(record))
    assert "| recipe | accuracy % | against qat | final loss | noise ρ |" in text
    assert "| ptq4 | 81.67 ± 3.06 | -3.33 ± 1.20 | 0.2100 ± 0.0100 | 0.31 ± 0.02 |" in text
    assert "| qat | 85.00 ± 5.00 | – | 0.2100 ± 0.0100 | 0 |" in text
    assert "0.021 ± 0.003" in text
    assert "0123456789ab" in text
    assert "4 batches × 8 draws" in text


def test_terminal_table(record):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(record, summarize(record)))
    text = console.export_text()
    assert "ptq4" in text
    assert "-3.33 ± 1.20" in text
    console.file.close()


def _one_seed(record):
    record["seeds"] = [0]
    record["runs"] = [run for run in record["runs"] if run["seed"] == 0]


def _diverged(record):
    record["runs"][1].update(diverged=True, train_loss=None, eval_loss=None, loss_curve=[[10, None]])


def _nothing_measured(record):
    record["gradient"] = []


def _unfinished(record):
    record["runs"] = record["runs"][:1]


@pytest.mark.parametrize("change", [lambda r: None, _one_seed, _diverged, _nothing_measured, _unfinished])
def test_any_record_gives_a_table_and_a_plot(record, change, tmp_path):
    change(record)
    rows = summarize(record)
    assert "recipe" in markdown(record, rows)
    assert "nan" not in markdown(record, rows)
    figure = comparison_figure(record, rows)
    assert len(figure.axes) == (2 if change in (_nothing_measured, _unfinished) else 3)
    for ending, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        save_figure(figure, tmp_path / f"f.{ending}")
        assert (tmp_path / f"f.{ending}").read_bytes().startswith(magic)


def _more_recipes(record):
    """Three more recipes, each noisier and worse than the one before: five that have noise."""
    run, entry = record["runs"][1], next(e for e in record["gradient"] if e["recipe"] == "ptq4")
    for k in range(1, 4):
        name = f"ptq4@{k}"
        record["recipes"].append(name)
        more = copy.deepcopy(run)
        more["recipe"] = name
        for metric in more["metrics"]:
            more["metrics"][metric] -= 0.01 * k
        record["runs"].append(more)
        record["gradient"].append({**copy.deepcopy(entry), "recipe": name})
        record["gradient"][-1]["ratio"]["value"] *= 10**k


def test_the_cost_of_noise_is_drawn_where_recipes_are_enough(record, tmp_path):
    assert not has_costs(summarize(record))
    with pytest.raises(FqtError, match="compare more of them"):
        noise_figure(record, summarize(record))
    before = len(comparison_charts(record, summarize(record)))
    _more_recipes(record)
    rows = summarize(record)
    assert has_costs(rows)
    save_figure(noise_figure(record, rows), tmp_path / "noise.svg")
    axes = noise_figure(record, rows).axes[0]
    assert axes.get_xscale() == "log"
    heights = {text.get_text(): text.xy for text in axes.texts}
    ordered = sorted(heights.values())
    assert len(ordered) == 5
    # An accuracy that falls is a cost that grows.
    assert [y for _, y in ordered] == sorted(y for _, y in ordered)
    assert len(comparison_charts(record, rows)) == before + 1


def test_the_caption_counts_the_seeds_that_there_are(record):
    assert "over 3 seeds." in caption(record)
    record["runs"].pop()
    assert "over 2 to 3 seeds: the comparison is not whole." in caption(record)
    _one_seed(record)
    assert "one, no spread" in caption(record)


def test_how_a_metric_is_computed_is_said(record):
    record["metrics"][0]["note"] = "of 360 images"
    assert "accuracy: of 360 images." in markdown(record, summarize(record))


def test_a_diverged_run_is_named(record):
    _diverged(record)
    row = summarize(record)[1]
    assert row.diverged == 1
    assert math.isnan(row.loss.mean)
    assert "ptq4 (1 diverged)" in markdown(record, [row])


def test_equal_records_give_equal_svg(record, tmp_path):
    for name in ("a.svg", "b.svg"):
        save_figure(comparison_figure(record, summarize(record)), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_reading(record, tmp_path):
    write_json(tmp_path / "compare.json", record)
    assert read_comparison(tmp_path) == record
    assert read_comparison(tmp_path / "compare.json") == record
    write_json(tmp_path / "other.json", {"format": "x"})
    with pytest.raises(FqtError, match="no record of a comparison"):
        read_comparison(tmp_path / "other.json")
    with pytest.raises(FqtError, match="cannot read"):
        read_comparison(tmp_path / "nowhere")


def test_spread():
    assert MeanStd.of([]).count == 0
    assert math.isnan(MeanStd.of([]).error)
    assert math.isnan(MeanStd.of([1.0]).std)
    assert MeanStd.of([1.0, 3.0]).error == pytest.approx(1.0)
