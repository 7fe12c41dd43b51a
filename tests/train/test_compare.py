import json

import pytest

from fqt.errors import FqtError
from fqt.records import read_json
from fqt.train import Comparison, Interrupted, compare
from fqt.train.compare import recipe_label
from fqt.train.run import Silent


class Counter(Silent):
    def __init__(self):
        self.titles = []

    def begin(self, title, total, done):
        if not title.startswith("gradient noise"):
            self.titles.append((title, done))


@pytest.fixture
def comparison(small):
    def make(base=None, **changes):
        options = {"recipes": ("qat", "ptq4"), "seeds": (0, 1), "batches": 2, "draws": 2, "sampling_batches": 3}
        return Comparison(base=small(steps=4, window=1, **(base or {})), **{**options, **changes})

    return make


def test_runs_of_one_seed_are_paired(tmp_path, comparison):
    record = compare(comparison(), tmp_path)
    runs = {(run["recipe"], run["seed"]): run for run in record["runs"]}
    assert set(runs) == {(recipe, seed) for recipe in ("qat", "ptq4") for seed in (0, 1)}
    for seed in (0, 1):  # same weights, same batch, same forward: the first loss is the same, later ones are not
        qat, ptq = runs["qat", seed]["loss_curve"], runs["ptq4", seed]["loss_curve"]
        assert qat[0] == ptq[0]
        assert qat[1:] != ptq[1:]
    assert runs["qat", 0]["loss_curve"][0] != runs["qat", 1]["loss_curve"][0]


def test_gradient_noise_is_measured_at_the_same_weights_for_all(tmp_path, comparison):
    record = compare(comparison(recipes=("qat", "ptq8", "ptq4")), tmp_path)
    for seed in (0, 1):
        of = {e["recipe"]: e for e in record["gradient"] if e["seed"] == seed}
        assert of["qat"]["ratio"]["value"] == 0
        assert 0 < of["ptq8"]["ratio"]["value"] < of["ptq4"]["ratio"]["value"] / 10
        assert len({e["sampling"]["value"] for e in of.values()}) == 1
        assert all(e["step"] == 2 for e in of.values())
        e = of["ptq4"]
        assert e["ratio"]["value"] == pytest.approx(e["quantization"]["value"] / e["sampling"]["value"])
        assert e["ratio"]["error"] > 0


def test_the_weights_are_the_reference_runs_half_way(tmp_path, comparison):
    own = compare(comparison(recipes=("ptq4",), seeds=(0,)), tmp_path / "own")["gradient"][-1]
    base = compare(comparison(seeds=(0,)), tmp_path / "base")["gradient"][-1]
    assert (own["recipe"], base["recipe"]) == ("ptq4", "ptq4")
    # the same batches and noise; only the two steps before were made by another recipe
    assert own["sampling"]["value"] != base["sampling"]["value"]
    assert own["sampling"]["value"] == pytest.approx(base["sampling"]["value"], rel=0.2)


def test_the_record_is_the_file_and_finished_runs_are_not_made_again(tmp_path, comparison):
    counter = Counter()
    record = compare(comparison(), tmp_path, observer=counter, command=["fqt", "compare"])
    assert len(counter.titles) == 4
    assert json.loads(json.dumps(record)) == read_json(tmp_path / "compare.json")
    assert record["environment"]["command"] == ["fqt", "compare"]
    again = compare(comparison(), tmp_path, observer=counter)
    assert len(counter.titles) == 4
    for key in ("runs", "gradient", "config"):
        assert json.loads(json.dumps(again[key])) == json.loads(json.dumps(record[key]))


def test_an_interrupted_comparison_continues_to_the_same_numbers(tmp_path, comparison, interruption):
    whole = compare(comparison(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        compare(comparison(), tmp_path / "cut", observer=interruption(6))  # inside the second of four runs
    counter = Counter()
    cut = compare(comparison(), tmp_path / "cut", observer=counter)
    assert counter.titles == [("ptq4 seed 0", 2), ("qat seed 1", 0), ("ptq4 seed 1", 0)]
    assert cut["gradient"] == whole["gradient"]
    for a, b in zip(cut["runs"], whole["runs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_comparison_grows_by_recipes_and_seeds(tmp_path, comparison):
    compare(comparison(seeds=(0,)), tmp_path)
    counter = Counter()
    record = compare(comparison(recipes=("qat", "ptq4", "psq4")), tmp_path, observer=counter)
    assert [title for title, _ in counter.titles] == ["psq4 seed 0", "qat seed 1", "ptq4 seed 1", "psq4 seed 1"]
    assert len(record["gradient"]) == 6


def test_without_the_baselines_run_the_first_recipe_gives_the_weights(tmp_path, comparison):
    record = compare(comparison(recipes=("psq4",), seeds=(0,)), tmp_path)
    assert (record["measurement"]["reference"], record["baseline"]) == ("psq4", "qat")
    assert record["gradient"][0]["ratio"]["value"] > 0


def test_the_measurement_can_be_left_out(tmp_path, comparison):
    assert compare(comparison(batches=0, seeds=(0,)), tmp_path)["gradient"] == []


def test_other_settings_measure_again(tmp_path, comparison):
    first = compare(comparison(seeds=(0,)), tmp_path)
    second = compare(comparison(seeds=(0,), draws=3), tmp_path)
    assert first["gradient"] != second["gradient"]
    assert len(second["gradient"]) == 2


def test_a_reference_that_diverged_is_not_measured(tmp_path, comparison):
    record = compare(comparison({"lr": 1e30}, recipes=("none",), seeds=(0,)), tmp_path)
    assert record["runs"][0]["diverged"]
    assert record["gradient"] == []


def test_another_training_is_refused_and_force_discards(tmp_path, comparison):
    compare(comparison(seeds=(0,), batches=0), tmp_path)
    before = (tmp_path / "compare.json").read_bytes()
    with pytest.raises(FqtError, match="another lr: name another --out"):
        compare(comparison({"lr": 0.2}, seeds=(0,), batches=0), tmp_path)
    with pytest.raises(FqtError, match="another lr"):  # also when the recipes have no folder yet
        compare(comparison({"lr": 0.2}, recipes=("psq4",), seeds=(0,), batches=0), tmp_path)
    assert (tmp_path / "compare.json").read_bytes() == before
    record = compare(comparison({"lr": 0.2}, seeds=(0,), batches=0), tmp_path, force=True)
    assert record["config"]["lr"] == 0.2
    for other in ('{"format": "other"}', "{}", "[]", "null", "0"):
        (tmp_path / "compare.json").write_text(other)
        with pytest.raises(FqtError, match="no record of a comparison"):
            compare(comparison(seeds=(0,), batches=0), tmp_path)


def test_bad_comparisons_are_refused_before_anything_runs(comparison):
    with pytest.raises(FqtError, match="unknown recipe 'nonsense'; known:"):
        comparison(recipes=("qat", "nonsense"))
    with pytest.raises(FqtError, match="qat are named twice"):
        comparison(recipes=("qat", "qat"))
    with pytest.raises(FqtError, match="at least one recipe and one seed"):
        comparison(seeds=())
    with pytest.raises(FqtError, match="at least 2 batches"):
        comparison(batches=1)


def test_a_recipe_that_does_not_fit_is_found_before_anything_runs_or_is_discarded(tmp_path, comparison):
    compare(comparison(seeds=(0,), batches=0), tmp_path / "out")
    before = (tmp_path / "out" / "compare.json").read_bytes()
    path = tmp_path / "misfit.toml"
    path.write_text('base = "qat"\n[[rules]]\npattern = "no.such.layer"\nrecipe = "none"\n')
    with pytest.raises(FqtError, match=r"no\.such\.layer"):
        compare(comparison(recipes=("qat", str(path)), seeds=(0,), batches=0), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "compare.json").read_bytes() == before
    assert (tmp_path / "out" / "qat-seed0" / "checkpoint.pt").exists()


def test_a_forced_comparison_that_is_interrupted_can_be_continued(tmp_path, comparison, interruption):
    compare(comparison(seeds=(0,), batches=0), tmp_path)
    changed = comparison({"lr": 0.2}, seeds=(0,), batches=0)
    with pytest.raises(Interrupted):
        compare(changed, tmp_path, force=True, observer=interruption(2))
    counter = Counter()
    compare(changed, tmp_path, observer=counter)
    assert counter.titles == [("qat seed 0", 2), ("ptq4 seed 0", 0)]


def test_recipe_files_go_by_their_stem(tmp_path, comparison):
    path = tmp_path / "my recipe.toml"
    path.write_text('base = "qat"\ngrad_input = "psq6"\n')
    assert recipe_label(str(path)) == "my_recipe"
    record = compare(comparison(recipes=(str(path),), seeds=(0,), batches=0), tmp_path / "out")
    assert record["recipes"] == ["my_recipe"]
    assert (tmp_path / "out" / "my_recipe-seed0" / "config.toml").exists()


def test_an_interruption_in_a_runs_last_step_stops_the_comparison(tmp_path, comparison, interruption):
    with pytest.raises(Interrupted):
        compare(comparison(batches=0), tmp_path, observer=interruption(4))
    counter = Counter()
    record = compare(comparison(batches=0), tmp_path, observer=counter)
    assert counter.titles == [("qat seed 0", 4), ("ptq4 seed 0", 0), ("qat seed 1", 0), ("ptq4 seed 1", 0)]
    assert len(record["runs"]) == 4
