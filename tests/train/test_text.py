"""Language models of characters: what a batch is, what is counted, and what a bad text is told."""

import math

import pytest
import torch

import fqt
from fqt.errors import FqtError
from fqt.train import Interrupted, Metric, Task, resolve, train
from fqt.train.config import TrainConfig
from fqt.train.models.transformers import Attention, build_gpt
from fqt.train.snapshot import Snapshot
from fqt.train.tasks import load_task
from fqt.train.text import encode
from fqt.train.trainer import Trainer

TEXT = "".join(f"{i} thousand quizzing foxes jump over {i * i} dögs.\n" for i in range(60))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def config(text):
    """Three steps on a short text."""

    def make(**changes):
        small = {"data": str(text), "model": "gpt-4x128", "context": 16, "batch_size": 4, "steps": 3, "window": 2}
        return resolve("shakespeare", None, {**small, "warmup_steps": 0, "device": "cpu", **changes})

    return make


def _task(config):
    return load_task(config, torch.device("cpu"))


def test_characters_are_places_in_their_sorted_set():
    codes, known = encode("hé, ha")
    assert known == [" ", ",", "a", "h", "é"]
    assert codes.tolist() == [3, 4, 1, 0, 3, 2]


def test_each_character_is_asked_for_after_those_before_it(config):
    task = _task(config())
    known = task.vocabulary
    for x, y in task.train(0):
        assert x.shape == y.shape == (4, 16)
        for before, after in zip(x.tolist(), y.tolist(), strict=True):
            piece = "".join(known[c] for c in [*before, after[-1]])
            assert piece in TEXT[: int(0.9 * len(TEXT))]
            assert before[1:] == after[:-1]


def test_evaluation_goes_over_the_rest_once(config):
    task = _task(config())
    said = "".join(task.vocabulary[c] for _, y in task.eval() for c in y.flatten().tolist())
    assert said == TEXT[int(0.9 * len(TEXT)) + 1 :]


def test_an_epoch_from_its_middle_is_the_same(config):
    task = _task(config())
    whole = list(task.train(1))
    assert len(whole) == task.steps_per_epoch
    for (x, y), (u, v) in zip(whole[2:], task.train(1, 2), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert not torch.equal(whole[0][0], next(task.train(2))[0])


def test_what_is_reported_is_nats_and_bits(config, tmp_path):
    result = train(config(), tmp_path / "run")
    assert result.metrics["bits per character"] == pytest.approx(result.metrics["loss"] / math.log(2))
    assert result.metrics["loss"] == result.eval_loss
    assert [kind.name for kind in result.kinds] == ["loss", "bits per character"]
    assert result.best["loss"] == min(value for _, value in result.metric_curves["loss"])
    assert str(result).startswith(f"loss {result.eval_loss:.4f} nats, bits per character")


@pytest.mark.parametrize("changes", [{}, {"recipe": "shq4", "dropout": 0.1, "average": 0.9, "checkpointing": True}])
def test_an_interrupted_run_continues_to_the_same_numbers(config, tmp_path, metrics, interruption, changes):
    config = config(eval_every=2, **changes)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", observer=interruption(1))
    train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole") if line["kind"] == "eval"] == [2, 3]


def test_parts_of_a_batch_give_its_gradient(config):
    whole, parts = Trainer(config(recipe="none")), Trainer(config(recipe="none", accumulate=3))
    batch = next(whole.batches())
    for trainer in (whole, parts):
        trainer.train_step(batch)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert whole.take_window()["samples"] == parts.take_window()["samples"] == 64


def test_checkpointing_changes_no_gradient(config):
    kept, again = Trainer(config(dropout=0.2)), Trainer(config(dropout=0.2, checkpointing=True))
    for trainer in (kept, again):
        torch.manual_seed(5)
        trainer.train_step(next(trainer.batches()))
    for p, q in zip(kept.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_gradient_is_clipped(config):
    trainer = Trainer(config(clip_norm=1e-3))
    trainer.train_step(next(trainer.batches()))
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_averaged_weights_are_what_is_evaluated(config):
    trainer = Trainer(config(average=0.5, recipe="none"))
    means = None
    for step, batch in zip(range(3), trainer.batches(), strict=False):
        trainer.train_step(batch)
        now = [p.detach().clone() for p in trainer.model.parameters()]
        means = now if step == 0 else [0.5 * m + 0.5 * p for m, p in zip(means, now, strict=True)]
    for mean, parameter in zip(means, trainer.averaged.model.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter, rtol=1e-5, atol=1e-7)
    plain = trainer.evaluate()["loss"]
    trainer.averaged = None
    assert trainer.evaluate()["loss"] != plain


def test_a_gpt_sees_nothing_of_what_follows():
    model = build_gpt("gpt-4x128", vocabulary=11, context=8, dropout=0.0).eval()
    tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_every_linear_of_a_gpt_runs_on_integers():
    model = fqt.quantize_(build_gpt("gpt-4x128", vocabulary=11, context=8, dropout=0.0), "shq8")
    assert model.head.weight is model.tokens.weight
    report = str(fqt.explain(model))
    assert "head" in report
    assert "simulated" not in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "give --data a UTF-8 file, or a folder with input.txt"),
        ({"data": "nowhere.txt"}, "there is no text nowhere.txt"),
        ({"context": 10_000}, "too few for batches of 4 sequences of 10000: lower --batch-size or --context"),
        ({"model": "resnet18"}, "unknown model 'resnet18'; known: gpt-4x128"),
        ({"optimizer": "adam8"}, "unknown optimizer 'adam8'; known: sgd, adam, adamw"),
        ({"optimizer": "torch.nn:Linear"}, "optimizer torch.nn:Linear: cannot be made"),
    ],
)
def test_bad_input_is_told_in_one_line(config, changes, message):
    with pytest.raises(FqtError, match=message) as caught:
        Trainer(config(**changes))
    assert "\n" not in str(caught.value)


def test_a_text_that_is_no_utf8(config, tmp_path):
    (tmp_path / "input.txt").write_bytes(TEXT.encode("latin-1"))
    with pytest.raises(FqtError, match=r"is not UTF-8 \(byte \d+\): convert it"):
        _task(config())


def test_checkpointing_of_a_model_without(small):
    with pytest.raises(FqtError, match="has no attribute `checkpointing`"):
        Trainer(small(checkpointing=True))


def test_gradients_are_measured_without_dropout(config, tmp_path):
    """Attention's too: its noise could not be told from quantization's."""
    train(config(dropout=0.5, recipe="none"), tmp_path)
    snapshot = Snapshot.of_run(tmp_path)
    model, batch = snapshot.model(), snapshot.batches(1)[0]
    assert snapshot.loss(model, batch) == snapshot.loss(model, batch)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(FqtError, match="a width of 10 has no 4 heads"):
        Attention(10, 4)


def open_counted(config, device):
    return CountedTask(config, device)


class CountedTask(Task):
    """A task of a user: a regression, whose sums are its own."""

    metrics = (Metric(name="error", unit="m", higher=False, digits=3),)
    steps_per_epoch = 4

    def __init__(self, config: TrainConfig, device: torch.device):
        self.x = torch.randn(8, 3, generator=torch.Generator().manual_seed(config.seed))

    def build(self, name):
        return torch.nn.Linear(3, 1)

    def train(self, epoch, start=0):
        return ((self.x, self.x.sum(1)) for _ in range(start, 4))

    def eval(self):
        yield self.x, self.x.sum(1)

    def predict(self, model, batch):
        return model(batch[0])[:, 0], batch[1]

    def loss(self, outputs, targets, smoothing=0.0):
        return torch.nn.functional.mse_loss(outputs, targets)

    def sums(self, outputs, targets, loss=None):
        count = torch.tensor(float(len(targets)), dtype=torch.float64)
        return torch.stack([count * self.loss(outputs, targets), (outputs - targets).abs().sum().double(), count])

    def values(self, sums):
        return {"error": sums[1] / sums[-1]}

    def score(self, model, amp):
        return {"weight": float(model.weight.abs().max())}


def test_a_task_by_import_path(tmp_path):
    config = TrainConfig(task="train.test_text:open_counted", model="linear", epochs=3, device="cpu", recipe="none")
    result = train(config, tmp_path)
    assert result.metrics["error"] < 2
    assert [step for step, _ in result.metric_curves["error"]] == [4, 8, 12]
    assert str(result).startswith("error ")
    with pytest.raises(FqtError, match=r"returned OrderedDict, not a fqt.train.Task"):
        Trainer(config.replace(task="train.test_text:open_nothing"))


def open_nothing(config, device):
    from collections import OrderedDict

    return OrderedDict()


def test_a_step_computes_its_loss_once(config, monkeypatch):
    trainer, calls = Trainer(config(recipe="none")), []
    plain = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "torch.nn.functional.cross_entropy", lambda *args, **words: calls.append(1) or plain(*args, **words)
    )
    trainer.train_step(next(trainer.batches()))
    assert len(calls) == 1
