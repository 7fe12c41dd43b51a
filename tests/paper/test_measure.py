"""The measurements of the paper's figures on a network of seconds: kept, continued, and never mixed."""

import dataclasses
import shutil

import pytest
import torch

import fqt
from fqt.errors import FqtError
from fqt.nn import Recipe, dump_recipe, load_recipe
from fqt.paper import measure
from fqt.paper.measure import Effort, Reproduction, trained_network
from fqt.paper.overhead import Convolution
from fqt.paper.quantizers import paper_quantizer, sweep
from fqt.records import read_json, write_json
from fqt.stats import quantization_variance, sampling_variance
from fqt.stats.decomposition import decompose
from fqt.train.checkpoint import load_checkpoint, save_checkpoint
from fqt.train.run import Silent
from fqt.train.snapshot import Snapshot

TINY = Effort(
    bits=(2, 4), batches=2, draws=2, sampling_batches=3, repeats=1,
    convolution=Convolution(samples=16, channels=8, size=20),
)  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "network"
    trained_network(folder, steps=4)
    return folder


@pytest.fixture
def network(run_folder):
    return Snapshot.of_run(run_folder)


class Interrupting(Silent):
    """Stops the user's patience after some steps."""

    def __init__(self, after):
        self.left = after

    def step(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_the_network_is_half_way(run_folder, network):
    assert network.step == 2
    assert network.config.recipe == "qat"
    again = trained_network(run_folder, steps=4)  # not trained again
    assert again.identity() == network.identity()
    with pytest.raises(FqtError, match="started with seed = 0"):
        trained_network(run_folder, steps=4, seed=1)


def test_a_snapshot_is_that_of_the_run(network):
    other = {name: value.clone() for name, value in network.weights.items()}
    assert dataclasses.replace(network, weights=other).identity() == network.identity()
    next(iter(other.values())).view(-1)[0] += 1e-6
    assert dataclasses.replace(network, weights=other).identity() != network.identity()
    unseen = next(network.task.train(network.config.epochs))[1]
    assert torch.equal(network.batches(1)[0][1], unseen)
    assert len(network.batches(40)) == 40  # more than an epoch has
    assert torch.equal(network.batches(1, start=2)[0][1], network.batches(3)[2][1])
    model = network.model("psq4")
    assert model.training
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in network.weights.items())


def test_a_snapshot_at_the_latest_checkpoint(run_folder):
    latest = Snapshot.of_run(run_folder, at="checkpoint", data=None)
    assert (latest.step, latest.recipe) == (4, "qat")
    halfway = Snapshot.of_run(run_folder).weights
    assert any(not torch.equal(value, halfway[name]) for name, value in latest.weights.items())


def test_a_snapshot_has_the_recipe_that_adapting_made(run_folder, tmp_path):
    saved = load_checkpoint(run_folder / "checkpoint.pt", ())
    adapted = dump_recipe(load_recipe("psq3"))
    save_checkpoint(tmp_path / "checkpoint.pt", {**saved, "adapter": {"recipe": adapted}})
    shutil.copy(run_folder / "config.toml", tmp_path)
    snapshot = Snapshot.of_run(tmp_path, at="checkpoint")
    assert snapshot.recipe == adapted
    assert "psq3" in str(fqt.explain(snapshot.model()))
    assert "psq3" not in str(fqt.explain(snapshot.model("psq5")))


def test_variance_is_what_the_estimators_say(network, tmp_path, monkeypatch):
    cells = [sweep(TINY.bits)[i] for i in (1, 8, -1)]
    monkeypatch.setattr(measure, "sweep", lambda bits: cells)
    Reproduction(tmp_path, effort=TINY, seed=5).variance(network)
    record = read_json(tmp_path / "variance.json")
    assert record["figure"] == "variance"
    assert record["network"]["step"] == 2
    assert [row["bits"] for row in record["rows"]] == [cell.bits for cell in cells]
    batches = network.batches(3)
    sampling = sampling_variance(network.model("qat"), network.loss, batches, 5).total
    assert record["sampling"] == pytest.approx(dataclasses.asdict(sampling))
    for i in range(3):
        expected = quantization_variance(network.model(cells[i].recipe()), network.loss, batches[:2], 2, 5).total
        assert record["rows"][i]["value"] == pytest.approx(expected.value)
        assert record["rows"][i]["error"] == pytest.approx(expected.error)


def test_an_interrupted_sweep_goes_on_to_the_same_numbers(network, tmp_path, monkeypatch):
    cells = sweep((4,))[:5]
    monkeypatch.setattr(measure, "sweep", lambda bits: cells)
    Reproduction(tmp_path / "whole", effort=TINY).variance(network)
    with pytest.raises(KeyboardInterrupt):
        Reproduction(tmp_path / "cut", effort=TINY, observer=Interrupting(2)).variance(network)
    kept = read_json(tmp_path / "cut" / "variance.json")["rows"]
    assert len(kept) == 3
    measured = []
    monkeypatch.setattr(
        measure,
        "quantization_variance",
        lambda *arguments: measured.append(1) or quantization_variance(*arguments),
    )
    Reproduction(tmp_path / "cut", effort=TINY).variance(network)
    assert len(measured) == 2
    assert (
        read_json(tmp_path / "cut" / "variance.json")["rows"]
        == read_json(tmp_path / "whole" / "variance.json")["rows"]
    )


def test_records_are_never_mixed(network, tmp_path):
    Reproduction(tmp_path, effort=TINY).profile(network)
    before = (tmp_path / "profile.json").read_text()
    for changed in (
        lambda: Reproduction(tmp_path, effort=TINY, seed=1).profile(network),
        lambda: Reproduction(tmp_path, effort=dataclasses.replace(TINY, bits=(4,))).profile(network),
        lambda: Reproduction(tmp_path, effort=TINY).profile(dataclasses.replace(network, step=3)),
    ):
        with pytest.raises(FqtError, match="--force"):
            changed()
    assert (tmp_path / "profile.json").read_text() == before
    Reproduction(tmp_path, effort=TINY, seed=1, force=True).profile(network)
    assert read_json(tmp_path / "profile.json")["settings"]["seed"] == 1
    write_json(tmp_path / "histogram.json", {"rows": []})
    with pytest.raises(FqtError, match="no record of this figure"):
        Reproduction(tmp_path, effort=TINY).histogram(network)


def test_profile_and_histogram(network, tmp_path):
    work = Reproduction(tmp_path, effort=TINY)
    work.profile(network)
    rows = read_json(tmp_path / "profile.json")["rows"]
    assert len(rows) == 3  # four layers, of which the first needs no grad_input
    for row in rows:
        by_bits = row["variance"]["psq"]["stochastic"]
        assert by_bits[0] > 10 * by_bits[1] > 0
        assert row["variance"]["ptq"]["stochastic"][1] >= by_bits[1]
    work.histogram(network)
    record = read_json(tmp_path / "histogram.json")
    assert record["layer"] == rows[1]["layer"]
    assert record["shape"] == [rows[1]["rows"], rows[1]["columns"]]
    for row in record["rows"]:
        assert len(row["counts"]) == 256
        assert sum(row["counts"]) == rows[1]["rows"] * rows[1]["columns"]
        assert len(row["bins"]) == rows[1]["rows"]
    with pytest.raises(FqtError, match="no layer 'nowhere'"):
        Reproduction(tmp_path / "other", effort=TINY).histogram(network, "nowhere")
    assert not (tmp_path / "other").exists()


def test_layers_is_what_the_decomposition_says(network, tmp_path):
    Reproduction(tmp_path, effort=TINY, seed=3).layers(network)
    table = read_json(tmp_path / "layers.json")["table"]
    model = network.model(Recipe(grad_input=paper_quantizer("bhq", 4)))
    expected = decompose(model, network.loss, network.batches(2), 2, 3)
    assert tuple(table["sources"]) == expected.sources
    for source, parts in expected.parts.items():
        for target, part in parts.items():
            assert table["parts"][source][target]["value"] == pytest.approx(part.value)
    text = (tmp_path / "layers.json").read_text()
    Reproduction(tmp_path, effort=TINY, seed=3).layers(network)  # not measured again
    assert (tmp_path / "layers.json").read_text() == text
    with pytest.raises(FqtError, match="measured with other settings"):
        Reproduction(tmp_path, effort=TINY, seed=4).layers(network)


def test_overhead(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Reproduction(tmp_path, effort=TINY, observer=Interrupting(3)).overhead()
    assert len(read_json(tmp_path / "overhead.json")["rows"]) == 4
    Reproduction(tmp_path, effort=TINY).overhead()
    record = read_json(tmp_path / "overhead.json")
    assert len(record["rows"]) == 1 + 8 + 8
    assert record["rows"][0]["method"] is None
    assert {row["samples"] for row in record["rows"]} == {4, 8, 16}
    text = (tmp_path / "overhead.json").read_text()
    Reproduction(tmp_path, effort=TINY).overhead()  # nothing is timed again
    assert (tmp_path / "overhead.json").read_text() == text


def test_a_network_that_moved(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "copy")
    assert Snapshot.of_run(tmp_path / "copy", data="").step == 2
    (tmp_path / "copy" / "halfway.pt").unlink()
    with pytest.raises(FqtError, match=r"has no halfway\.pt: it ended without keeping it"):
        Snapshot.of_run(tmp_path / "copy")
