import contextlib
import errno
import io
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

from fqt.errors import FqtError, FqtWarning
from fqt.train import Interrupted, read_result, train
from fqt.train.checkpoint import load_checkpoint, restore_rng, rng_state, save_checkpoint
from fqt.train.run import STATE, Silent, continue_config
from fqt.train.trainer import Trainer


class Dropped(nn.Module):
    """A model that draws from all three global generators."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            x = nn.functional.dropout(x, 0.2) * (0.5 + random.random()) + float(np.random.normal())
        return self.fc(x)


DROPPED = f"{__name__}:Dropped"


def _state(folder):
    return load_checkpoint(folder / "checkpoint.pt", STATE)


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


# 10 steps, windows of 2, epochs of 5: inside a window, at its end, at an epoch's end, inside the second epoch
CUTS = [("convnet", 3), (DROPPED, 2), (DROPPED, 3), (DROPPED, 5), (DROPPED, 8)]


@pytest.mark.parametrize(("model", "after"), CUTS)
def test_an_interrupted_run_continues_to_the_same_numbers(tmp_path, small, metrics, interruption, model, after):
    config = small(model=model)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"after step {after};"):
        train(config, tmp_path / "cut", observer=interruption(after))
    assert _state(tmp_path / "cut")["step"] == after
    torch.manual_seed(999)  # whatever else the process did in between
    continued = train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert (continued.metrics, continued.train_loss) == (whole.metrics, whole.train_loss)
    assert _same(_state(tmp_path / "cut"), {**_state(tmp_path / "whole"), **_clock(_state(tmp_path / "cut"))})
    assert _same(
        load_checkpoint(tmp_path / "cut" / "halfway.pt", ("model", "step")),
        load_checkpoint(tmp_path / "whole" / "halfway.pt", ("model", "step")),
    )


def test_an_interrupted_run_goes_on_with_the_ranges_that_it_remembered(tmp_path, small, metrics, interruption):
    config = small(recipe="hind4", model="convnet")
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", observer=interruption(3))
    train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ends = [_state(tmp_path / name)["model"] for name in ("whole", "cut")]
    assert _same(*ends)
    remembered = [state for name, state in ends[0].items() if name.endswith("hindsight")]
    assert {int(state[0]) for state in remembered} <= {0, 10}
    assert sum(int(state[2]) for state in remembered) > 0


def _clock(state):
    return {"metrics_bytes": state["metrics_bytes"]}  # the lines hold wall times of varying length


@pytest.mark.parametrize("generator", ["torch", "numpy", "python"])
def test_without_the_random_state_the_numbers_would_differ(
    tmp_path, small, metrics, interruption, monkeypatch, generator
):
    def forgetful(state):
        restore_rng({**rng_state(), **{k: v for k, v in state.items() if k != generator}})

    config = small(model=DROPPED)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", observer=interruption(3))
    torch.manual_seed(999)
    np.random.seed(999)
    random.seed(999)
    monkeypatch.setattr("fqt.train.trainer.restore_rng", forgetful)
    train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") != metrics(tmp_path / "whole")


def test_lines_written_after_the_last_checkpoint_are_not_doubled(tmp_path, small, metrics, interruption):
    config = small(recipe="none")
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", observer=interruption(3))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:  # as a killed process leaves them
        file.write('{"kind": "train", "step": 4}\n{"kind": "tra')
    train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_seed_reproduces_and_another_does_not(tmp_path, small, metrics):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name))
        train(small(seed=seed), tmp_path / name)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_recipes_share_weights_and_batches(small):
    first, second = (Trainer(small(recipe=recipe)) for recipe in ("none", "shq4"))
    assert _same(dict(first.model.state_dict()), dict(second.model.state_dict()))
    for (x, y), (u, v) in zip(first.batches(), second.batches(), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_the_record_is_complete(tmp_path, small, metrics):
    result = train(small(), tmp_path, command=["fqt", "train"])
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.toml", "environment.json", "metrics.jsonl", "metrics.sums", "checkpoint.pt", "halfway.pt",
    }  # fmt: skip
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 5, 7, 9, 10]
    assert [line["samples"] for line in lines if line["kind"] == "train"] == [512, 512, 256] * 2
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [5, 10]
    assert lines[-1] == {"kind": "end", "step": 10, "diverged": False}
    assert load_checkpoint(tmp_path / "halfway.pt", ("model",))["step"] == 5
    assert result == read_result(tmp_path)
    last = [line for line in lines if line["kind"] == "train" and line["epoch"] == 1]
    expected = sum(line["loss"] * line["samples"] for line in last) / 1280
    assert result.train_loss == pytest.approx(expected, rel=1e-12)
    assert result.metrics == lines[-2]["metrics"]


@pytest.mark.parametrize("steps", [1, 4, 5, 7])
def test_a_cap_on_steps_ends_the_run_with_an_evaluation(tmp_path, small, metrics, steps):
    result = train(small(steps=steps, recipe="none"), tmp_path)
    assert result.steps == steps
    assert [line["step"] for line in metrics(tmp_path) if line["kind"] == "eval"][-1] == steps


def test_the_digits_are_learnt(tmp_path, small):
    result = train(small(epochs=6, batch_size=64), tmp_path)
    assert result.metrics["accuracy"] > 0.9
    assert result.best["accuracy"] >= result.metrics["accuracy"]


def test_an_occupied_folder_is_not_overwritten_unless_told_so(tmp_path, small, metrics):
    train(small(steps=2), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FqtError, match=r"already holds a run.*--resume.*--force"):
        train(small(steps=3), tmp_path)
    with pytest.raises(FqtError, match="unknown model"):  # even with force, a faulty command discards nothing
        train(small(steps=3, model="nonsense"), tmp_path, force=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    assert train(small(steps=3), tmp_path, force=True).steps == 3
    assert (tmp_path / "notes.txt").exists()


class TooShort(nn.Module):
    """Takes no batch."""

    def __init__(self, *sizes):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        raise FqtError(f"{len(x)} are too many")


def test_a_run_that_cannot_begin_leaves_nothing_in_the_way(tmp_path, small):
    """The mended command finds no run in its folder; whatever else was there stays."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FqtError, match="are too many"):
        train(small(steps=2, recipe="none", model="train.test_run:TooShort"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert train(small(steps=2), tmp_path).steps == 2


def test_a_run_that_fails_later_keeps_what_was_saved(tmp_path, small, interruption):
    with pytest.raises(Interrupted):
        train(small(), tmp_path, observer=interruption(1))
    saved = (tmp_path / "checkpoint.pt").read_bytes()

    class Failing(Silent):
        def step(self) -> None:
            raise RuntimeError("a fault of later")

    with pytest.raises(RuntimeError, match="of later"):
        train(small(), tmp_path, resume=True, observer=Failing())
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_a_finished_run_is_read_and_not_run_again(tmp_path, small):
    result = train(small(steps=2), tmp_path)
    stamp = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    assert train(small(steps=2), tmp_path, resume=True) == result
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_a_run_is_not_continued_as_another(tmp_path, small, interruption):
    with pytest.raises(Interrupted):
        train(small(), tmp_path, observer=interruption(1))
    with pytest.raises(FqtError, match=r"was started with lr = 0.1; 0.2 would make it a different run"):
        train(small(lr=0.2), tmp_path, resume=True)
    with pytest.raises(FqtError, match=r"lr = 0\.1"):
        continue_config(tmp_path, {"lr": 0.2})
    with pytest.raises(FqtError, match="steps = None; 3"):
        continue_config(tmp_path, {"steps": 3})
    assert continue_config(tmp_path, {"lr": None, "workers": 7}).workers == 7
    with pytest.raises(FqtError, match="holds no run"):
        continue_config(tmp_path / "nowhere", {})


def test_a_recipe_file_that_changed_is_noticed(tmp_path, small, interruption):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "qat"\ngrad_input = "psq4"\n')
    with pytest.raises(Interrupted):
        train(small(recipe=str(recipe)), tmp_path / "run", observer=interruption(1))
    recipe.write_text('base = "qat"\ngrad_input = "psq5"\n')
    with pytest.raises(FqtError, match="no longer what the run was started with"):
        train(small(recipe=str(recipe)), tmp_path / "run", resume=True)


def test_a_recipe_file_that_changed_is_noticed_after_the_run_too(tmp_path, small):
    """A finished run is not made again: it must not pass for the run of an edited recipe."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text('grad_input = "psq4"\n')
    config = small(recipe=str(recipe), steps=2)
    train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    recipe.write_text('grad_input = "psq2"\n')
    with pytest.raises(FqtError, match="no longer what the run was started with"):
        train(config, tmp_path / "run", resume=True)


def test_a_file_in_the_place_of_the_folder(tmp_path, small):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FqtError, match="is a file"):
        train(small(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign(path):
    torch.save({"state_dict": {}}, path)


def _code(path):
    torch.save({"format": "fqt checkpoint 1", "model": nn.Linear(1, 1)}, path)


def _other_model(path):
    state = torch.load(path)
    state["model"]["fc.weight"] = torch.zeros(3, 3)
    save_checkpoint(path, state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is damaged or is no checkpoint of fqt"),
        (lambda path: path.write_bytes(b""), "is damaged or is no checkpoint of fqt"),
        (lambda path: path.write_text("hello"), "is damaged or is no checkpoint of fqt"),
        (_foreign, "no checkpoint of fqt; name another folder"),
        (_code, "is damaged or is no checkpoint of fqt"),
        (_other_model, "does not fit this model"),
    ],
)
def test_unusable_checkpoints_are_refused_and_left_alone(tmp_path, small, interruption, damage, message):
    config = small(model=DROPPED)
    with pytest.raises(Interrupted):
        train(config, tmp_path, observer=interruption(3))
    damage(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FqtError, match=message) as caught:
        train(config, tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_can_go_on(tmp_path, small, metrics, monkeypatch):
    config = small()
    train(config, tmp_path / "whole")
    replace = os.replace
    saves = []

    def full_at_the_second_checkpoint(source, target):
        if str(target).endswith("checkpoint.pt"):
            saves.append(target)
            if len(saves) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr("fqt.records.os.replace", full_at_the_second_checkpoint)
    with pytest.raises(FqtError, match=r"the disk is full: .*checkpoint\.pt was not written"):
        train(config, tmp_path / "cut")
    assert _state(tmp_path / "cut")["step"] == 5
    assert not list((tmp_path / "cut").glob("*.part"))
    train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_run_that_diverges_ends_and_says_so(tmp_path, small, metrics):
    result = train(small(lr=1e30, recipe="none", model=DROPPED), tmp_path)
    assert result.diverged
    assert np.isnan(result.train_loss)
    assert metrics(tmp_path)[-1]["diverged"]
    assert train(small(lr=1e30, recipe="none", model=DROPPED), tmp_path, resume=True).diverged
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(FqtError, match="cut short"):
        read_result(tmp_path)
    (tmp_path / "metrics.sums").unlink()  # as an earlier version left it
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    with pytest.raises(FqtError, match="incomplete: it has no 'epoch'"):
        read_result(tmp_path)


def test_the_users_signal_handlers_come_back(tmp_path, small, interruption):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.getsignal(number)
        if before is signal.SIG_IGN:  # under nohup it is meant to stay so
            continue
        with pytest.raises(Interrupted):
            train(small(), tmp_path, force=True, observer=interruption(1, number))
        assert signal.getsignal(number) is before


def test_checkpoints_are_also_made_within_long_epochs(tmp_path, small, monkeypatch, interruption):
    monkeypatch.setattr("fqt.train.run.CHECKPOINT_SECONDS", 0.0)
    seen = []

    class Watch(interruption):
        def step(self):
            path = tmp_path / "checkpoint.pt"
            seen.append(_state(tmp_path)["step"] if path.exists() else 0)

    train(small(recipe="none"), tmp_path, observer=Watch(0))
    assert seen == list(range(10))  # at step k the state after k steps is already there


def test_a_missing_device_is_a_clear_error(tmp_path, small):
    for name in ("cuda:99", "abacus"):
        with pytest.raises(FqtError, match=f"cannot use the device '{name}'"):
            train(small(device=name), tmp_path)
    assert not list(tmp_path.iterdir())


def test_autocast_runs(tmp_path, small):
    assert np.isfinite(train(small(steps=2, amp=True, recipe="none"), tmp_path).train_loss)


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path, small, interruption):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(small(steps=3), tmp_path, observer=interruption(1, signal.SIGHUP)).steps == 3
    finally:
        signal.signal(signal.SIGHUP, before)


class Second(Silent):
    """Another run of the same folder, while the first is at work."""

    def __init__(self, config, folder, **options):
        self.again = lambda: train(config, folder, **options)

    def step(self):
        with pytest.raises(FqtError, match=rf"in use by another run \(process {os.getpid()} on "):
            self.again()


@pytest.mark.parametrize("options", [{"resume": True}, {"force": True}])
def test_two_runs_in_one_folder_at_once(tmp_path, small, metrics, options):
    config = small(recipe="none")
    train(config, tmp_path / "alone")
    train(config, tmp_path / "run", observer=Second(config, tmp_path / "run", **options))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_finished_run_is_cleared_of_the_lock_of_a_killed_process(tmp_path, small):
    config = small(recipe="none")
    result = train(config, tmp_path)
    (tmp_path / ".lock").write_text("process 1 on here, killed before it could remove this\n")
    assert train(config, tmp_path, resume=True) == result
    assert not (tmp_path / ".lock").exists()


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(tmp_path, small, metrics, interruption):
    config = small(model=DROPPED)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", observer=interruption(7))
    checkpoint = tmp_path / "cut" / "checkpoint.pt"
    torch.save({**torch.load(checkpoint), "format": "fqt checkpoint 1"}, checkpoint)
    (tmp_path / "cut" / "metrics.sums").unlink()
    old = checkpoint.read_bytes()
    changed = bytearray(old)
    changed[old.index(_state_bytes(old))] ^= 1
    checkpoint.write_bytes(changed)
    with pytest.raises(FqtError, match="has another checksum"):
        train(config, tmp_path / "cut", resume=True)
    checkpoint.write_bytes(old)
    with pytest.warns(FqtWarning, match="earlier version of fqt, without a digest"):
        train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def _state_bytes(data):
    return torch.load(io.BytesIO(data))["model"]["fc.weight"].numpy().tobytes()


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-9], lambda data: data.replace(b"0", b"1", 1)]
)
def test_damaged_metrics_are_not_continued(tmp_path, small, interruption, damage):
    config = small(model=DROPPED)
    with pytest.raises(Interrupted):
        train(config, tmp_path, observer=interruption(3))
    path = tmp_path / "metrics.jsonl"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(FqtError, match=r"metrics\.jsonl is (damaged|cut short).*--force"):
        train(config, tmp_path, resume=True)
    assert path.read_bytes() == damaged


def test_a_lost_end_is_made_again_from_the_checkpoint(tmp_path, small, metrics):
    config = small(model=DROPPED)
    result = train(config, tmp_path)
    lines = metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert train(config, tmp_path, resume=True) == result
    assert metrics(tmp_path) == lines


class Killed(BaseException):
    pass


def test_a_run_killed_at_any_write_of_its_start_can_be_started_again(tmp_path, small, monkeypatch):
    """Also where it had been started before and killed before its first checkpoint."""
    config, real = small(steps=1, model=DROPPED, recipe="none"), {}
    left = [0]

    def counted(name):
        def call(*given, **named):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real[name](*given, **named)

        return call

    for name in ("fsync", "replace", "unlink", "truncate"):
        real[name] = getattr(os, name)
        monkeypatch.setattr(os, name, counted(name))
    for point in range(1, 60):
        folder = tmp_path / str(point)
        for _ in range(2):
            left[0] = point
            with contextlib.suppress(Killed):
                train(config, folder, resume=(folder / "config.toml").exists())
        if left[0] > 0:
            break
        if (folder / "config.toml").exists():
            continue_config(folder, {})
        left[0] = 0
        assert train(config, folder, resume=(folder / "config.toml").exists()).steps == 1
    assert point > 8  # every write was one at which it was killed
