"""Bits that follow the noise: ρ is held, changes are recorded, a continued run makes the same ones."""

import pytest
import torch

from fqt import Product, Recipe, quantize_
from fqt.errors import FqtError
from fqt.train import Interrupted, train
from fqt.train.adapt import BAND, Adapter
from fqt.train.checkpoint import load_checkpoint
from fqt.train.run import STATE
from fqt.train.trainer import Trainer

ADAPT = {"recipe": "shq8", "adapt": True, "adapt_every": 2, "epochs": 4, "batch_size": 256, "window": 5}


def _kinds(lines, kind):
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 20 steps."""
    from fqt.train import resolve

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapt") / "whole"
    train(resolve("digits", None, {**ADAPT, "device": "cpu"}), folder)
    torch.set_num_threads(threads)
    return folder


def test_widths_come_down_and_noise_stays_at_the_target(whole, metrics):
    lines = metrics(whole)
    readings, changes = _kinds(lines, "monitor"), _kinds(lines, "adapt")
    assert [r["step"] for r in readings] == list(range(2, lines[-1]["step"] + 1, 2))
    assert readings[0]["mean_width"] == 8
    assert readings[0]["rho"] < 0.01
    assert changes[0]["step"] == 2
    assert changes[0]["mean_width"] < 4
    assert set(changes[0]["widths"]) == {"features.3", "features.6", "classifier"}  # not the first layer
    for change in changes:
        assert change["predicted"] <= 0.1
        assert not BAND[0] * 0.1 <= change["rho"] <= BAND[1] * 0.1
        after = next((r for r in readings if r["step"] > change["step"]), None)
        assert after is None or after["mean_width"] == change["mean_width"]
    assert lines[-1]["kind"] == "end"
    per_step = []
    for step in range(1, lines[-1]["step"] + 1):
        before = [c["mean_width"] for c in changes if c["step"] < step]
        per_step.append(before[-1] if before else 8)
    assert lines[-1]["mean_width"] == pytest.approx(sum(per_step) / len(per_step))


@pytest.mark.parametrize("after", [2, 13])
def test_an_interrupted_run_continues_to_the_same_numbers(whole, tmp_path, small, metrics, interruption, after):
    config = small(**ADAPT)
    with pytest.raises(Interrupted):
        train(config, tmp_path, observer=interruption(after))
    torch.manual_seed(999)
    train(config, tmp_path, resume=True)
    assert metrics(tmp_path) == metrics(whole)
    states = [load_checkpoint(folder / "checkpoint.pt", STATE) for folder in (whole, tmp_path)]
    assert states[0]["adapter"] == states[1]["adapter"]
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())


def test_without_the_recipe_in_force_the_numbers_would_differ(
    whole, tmp_path, small, metrics, interruption, monkeypatch
):
    config = small(**ADAPT)
    with pytest.raises(Interrupted):
        train(config, tmp_path, observer=interruption(13))
    restore = Adapter.restore
    monkeypatch.setattr(Adapter, "restore", lambda self, state: restore(self, {**state, "recipe": None}))
    train(config, tmp_path, resume=True)
    assert metrics(tmp_path) != metrics(whole)


def test_it_is_part_of_what_the_run_is(whole, small):
    with pytest.raises(FqtError, match="started with adapt = True"):
        train(small(**{**ADAPT, "adapt": False}), whole, resume=True)


def test_measuring_leaves_the_training_alone(small):
    """Before the first change of widths the weights are those of a run without --adapt."""
    trainers = [Trainer(small(**{**ADAPT, "adapt": adapt, "adapt_every": 3})) for adapt in (True, False)]
    weights = []
    for trainer in trainers:
        torch.manual_seed(0)
        for batch in trainer.batches():
            trainer.train_step(batch)
            if trainer.step == 2:
                break
        trainer.train_step(batch)
        weights.append(trainer.model.state_dict())
    assert trainers[0].take_events()
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@pytest.mark.parametrize("recipe", ["qat", "none"])
def test_it_needs_a_grad_input_to_adapt(small, recipe):
    with pytest.raises(FqtError, match="--adapt changes the widths of grad_input"):
        Trainer(small(**{**ADAPT, "recipe": recipe}))


def test_a_right_operand_alone_has_no_width_to_adapt():
    recipe = Recipe(grad_input=Product(None, "ptq4"), grad_weight="psq4")
    model = quantize_(torch.nn.Linear(4, 4), recipe)
    with pytest.raises(FqtError, match="--adapt changes the widths of grad_input"):
        Adapter(model, lambda model, batch: model(batch).sum(), target=0.1, every=1, seed=0)


@pytest.mark.parametrize("changes", [{"rho": 0.0}, {"rho": float("nan")}, {"adapt_every": 0}])
def test_values_that_make_no_sense(small, changes):
    with pytest.raises(FqtError, match=r"rho must be|adapt_every must be"):
        small(**changes)


def test_divergence_is_reported_as_without(tmp_path, small, metrics):
    config = small(**{**ADAPT, "lr": 1e30, "momentum": 0.0, "schedule": "constant", "adapt_every": 1})
    assert train(config, tmp_path).diverged


def test_a_short_last_batch_is_not_read(tmp_path, small, metrics):
    """Its sampling variance is not that of the others; one sample has no halves at all."""
    config = small(**{**ADAPT, "batch_size": 359, "adapt_every": 1, "epochs": 2, "drop_last": False})
    train(config, tmp_path)
    lines = metrics(tmp_path)
    steps = lines[-1]["step"]
    read = [r["step"] for r in _kinds(lines, "monitor")]
    per_epoch = steps // 2
    assert read == [step for step in range(1, steps + 1) if step % per_epoch]


def test_a_batch_of_one_is_refused_at_the_start(small):
    with pytest.raises(FqtError, match="batch_size must be over 1"):
        small(**{**ADAPT, "batch_size": 1})
