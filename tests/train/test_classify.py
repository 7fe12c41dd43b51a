"""Labelled lines: what a batch is, what an encoder sees, and what bad files are told."""

import warnings

import pytest
import torch

import fqt
from fqt.errors import FqtError, FqtWarning
from fqt.train import Interrupted, resolve, train
from fqt.train.classify import UNKNOWN
from fqt.train.models.encoders import PADDING, build_encoder
from fqt.train.tasks import load_task
from fqt.train.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:the training lines have:fqt.errors.FqtWarning")
GOOD, BAD = "a {} fine, charming film .", "it 's a {} dull and lifeless mess of a thing"


def _lines(count, start=0):
    return "".join(f"{(GOOD, BAD)[i % 2].format(f'w{i % 7}')}\t{1 - i % 2}\n" for i in range(start, start + count))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + _lines(41), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text(_lines(9, 100), encoding="utf-8")
    return tmp_path


@pytest.fixture
def config(folder):
    """Three steps on a few lines."""

    def make(**changes):
        few = {"data": str(folder), "batch_size": 8, "context": 16, "steps": 3, "warmup_steps": 0, "window": 2}
        return resolve("classify", None, {**few, "device": "cpu", **changes})

    return make


def _task(config):
    return load_task(config, torch.device("cpu"))


def _said(task, batch):
    words = ["", "?", *task.vocabulary]
    rows = [" ".join(words[k] for k in row if k != PADDING) for row in batch[0].tolist()]
    return list(zip(rows, batch[1].tolist(), strict=True))


def test_an_epoch_is_every_line_once_in_lower_case(config):
    task = _task(config(drop_last=False))
    assert task.steps_per_epoch == 6
    found = [pair for batch in task.train(0) for pair in _said(task, batch)]
    lines = [line.split("\t") for line in _lines(41).splitlines()]
    expected = [(text.replace(",", " ,").replace("'s", "' s"), int(label)) for text, label in lines]
    assert sorted(found) == sorted(expected)
    assert found != expected


def test_an_epoch_from_its_middle_is_the_same(config):
    task = _task(config())
    whole = list(task.train(1))
    assert len(whole) == task.steps_per_epoch == 5
    for (x, y), (u, v) in zip(whole[2:], task.train(1, 2), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert _said(task, whole[0]) != _said(task, next(task.train(2)))


def test_evaluation_goes_over_all_lines_and_new_words_are_unknown(config, folder):
    (folder / "dev.tsv").write_text("a fine zebra\t1\n" + _lines(9), encoding="utf-8")
    batches = list(_task(config()).eval())
    assert [len(labels) for _, labels in batches] == [8, 2]
    row = batches[0][0][0].tolist()
    assert row[2] == UNKNOWN
    assert UNKNOWN not in row[:2]
    assert set(row[3:]) == {PADDING}


def test_a_vocabulary_larger_than_the_text_is_said(config):
    words = len(_task(config()).vocabulary)
    with pytest.warns(FqtWarning, match=f"the training lines have {words} different words, all of which are taken"):
        assert len(_task(config(vocabulary=words + 3)).vocabulary) == words
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _task(config(vocabulary=words + 2))


def test_a_vocabulary_keeps_the_most_frequent_words(config):
    assert _task(config(vocabulary=6)).vocabulary == ["a", ",", ".", "charming"]  # 61, and 21 of each


def test_padding_changes_nothing():
    model = build_encoder("bert-2x128", vocabulary=20, context=12, num_classes=3, dropout=0.0).eval()
    tokens = torch.randint(2, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(tokens, (0, 4), value=PADDING)
    torch.testing.assert_close(model(padded), model(tokens))
    with pytest.raises(FqtError, match="a sequence of 13 tokens does not fit a context of 12"):
        model(torch.ones(1, 13, dtype=torch.int64))


def test_every_linear_of_an_encoder_runs_on_integers(config):
    trainer = Trainer(config(recipe="default"))
    report = str(fqt.explain(trainer.model))
    assert "head" in report
    assert "simulated" not in report


def test_it_learns_the_words(config, tmp_path):
    result = train(config(recipe="none", dropout=0.0, steps=None, epochs=4), tmp_path / "run")
    assert result.metrics == {"accuracy": 1.0}


def test_an_interrupted_run_continues_to_the_same_numbers(config, tmp_path, metrics, interruption):
    train(config(recipe="shq4"), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config(recipe="shq4"), tmp_path / "cut", observer=interruption(1))
    train(config(recipe="shq4"), tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 of .*train.tsv is empty: remove it"),
        ("sentence\tlabel\n", "holds no labelled line"),
        ("fine\t1\n\ndull\t0\n", "line 2 of .*train.tsv is empty: remove it"),
        ("fine\t1\ndull 0\n", "line 2 of .*train.tsv has 1 columns; expected a text, a tab and its label"),
        ("fine\t1\n0\tdull\t0\n", "line 2 of .*train.tsv has 3 columns"),
        ("text\tlabel\nfine\tgood\n", "line 2 of .*: the label 'good' is no whole number from 0 on"),
        ("fine\t1\ndull\t-1\n", "line 2 of .*: the label '-1' is no whole number"),
        ("fine\t1\ndull\t" + "9" * 5000 + "\n", "is no whole number"),
        (" \t1\ndull\t0\n", "line 1 of .*: no word before the tab"),
        ("fine\t1\n" + "dull " * 17 + "\t0\n", "line 2 of .*: 17 words are more than --context 16: raise it"),
        ("fine\t1\ndull\t2\n", "labels are 0, 1, … without a gap, and .*train.tsv has no line of 0"),
        ("fine\t0\ndull\t0\n", "all lines of .*train.tsv have the label 0"),
        ("fine\t1\ndull\t0\n", "2 training lines do not fill a batch of 8: lower --batch-size"),
    ],
)
def test_bad_lines_are_told_in_one_line(config, folder, text, message):
    (folder / "train.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(FqtError, match=message) as caught:
        Trainer(config())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "give --data a folder with train.tsv and dev.tsv"),
        ({"data": "nowhere"}, "there is no nowhere.train.tsv; --data must name a folder"),
        ({"vocabulary": 2}, "a vocabulary of 2 has no words beside 2 special tokens: raise --vocabulary"),
        ({"model": "resnet18"}, "unknown model 'resnet18'; known: bert-2x128"),
    ],
)
def test_bad_configurations(config, changes, message):
    with pytest.raises(FqtError, match=message):
        Trainer(config(**changes))


def test_bad_evaluation_files(config, folder):
    (folder / "dev.tsv").write_text("fine\t7\n", encoding="utf-8")
    with pytest.raises(FqtError, match=r"dev.tsv has the label 7, which no line of .*train.tsv has"):
        _task(config())
    (folder / "dev.tsv").write_bytes("dög\t1\n".encode("latin-1"))
    with pytest.raises(FqtError, match=r"dev.tsv is not UTF-8 \(byte 1\)"):
        _task(config())
    (folder / "dev.tsv").unlink()
    with pytest.raises(FqtError, match=r"there is no .*dev.tsv"):
        _task(config())


def test_windows_files_are_the_same(config, folder):
    plain = _task(config())
    (folder / "train.tsv").write_bytes(
        b"\xef\xbb\xbf" + (folder / "train.tsv").read_bytes().replace(b"\n", b"\r\n")
    )
    again = _task(config())
    assert again.vocabulary == plain.vocabulary
    assert _said(again, next(again.train(0))) == _said(plain, next(plain.train(0)))
