"""Translation: what a batch is, what the search finds, what is recorded, and what bad files are told."""

import itertools
import json
import math
import sys

import pytest
import torch

import fqt
from fqt.errors import FqtError, FqtWarning
from fqt.stats.monitor import first_half
from fqt.train import Interrupted, resolve, train
from fqt.train.decoding import beam_search
from fqt.train.models.translator import Translator, build_translator
from fqt.train.parallel import BOS, EOS, PAD, SPECIAL, Vocabulary, read_pairs
from fqt.train.task import IGNORED
from fqt.train.tasks import load_task
from fqt.train.trainer import Trainer, make_model, training_loss
from fqt.train.translation import cuts

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")

NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
THINGS = {"dogs": "Hunde", "cats": "Katzen", "foxes": "Füchse", "owls": "Eulen", "mice": "Mäuse"}


def _sentences(count, seed):
    """Short sentences of one to six phrases, and their translations word by word."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda known: list(known.items())[int(torch.randint(len(known), (), generator=generator))]
    for _ in range(count):
        words = [
            draw(known)
            for _ in range(int(torch.randint(1, 7, (), generator=generator)))
            for known in (NUMBERS, THINGS)
        ]
        yield " ".join(en for en, _ in words) + ".", " ".join(de for _, de in words) + "."


def _write(folder, stem, pairs):
    for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        (folder / f"{stem}.{language}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (stem, count) in enumerate([("train", 120), ("val", 12), ("test_2016_flickr", 9)]):
        _write(folder, stem, list(_sentences(count, seed)))
    return folder


@pytest.fixture
def config(files):
    """Three steps of a small net."""

    def make(**changes):
        small = {"data": str(files), "model": "train.test_translation:tiny", "vocabulary": 300, "batch_size": 256}
        given = {"context": 64, "steps": 3, "warmup_steps": 1, "beam": 2, "window": 2, "device": "cpu"}
        return resolve("translation", None, {**small, **given, **changes})

    return make


def tiny(vocabulary, context, dropout):
    return Translator(1, 2, 16, 24, vocabulary, context, dropout)


def _task(config):
    return load_task(config, torch.device("cpu"))


def _model(vocabulary=6, seed=0, scale=4.0):
    """One whose next tokens depend much on all that it reads."""
    torch.manual_seed(seed)
    model = Translator(1, 2, 8, 16, vocabulary, 32)
    with torch.no_grad():
        model.tokens.weight.mul_(scale)
    return model.eval()


def _score(model, source, translation, penalty):
    before = torch.tensor([[BOS, *translation[:-1]]])
    logp = model(source[None], before)[0].log_softmax(-1)
    return float(logp[range(len(translation)), translation].sum()) / len(translation) ** penalty


def _all(vocabulary, limit):
    for length in range(limit):
        for words in itertools.product(range(SPECIAL, vocabulary), repeat=length):
            yield [*words, EOS]


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_wide_search_finds_the_best_of_all(penalty):
    wrong = 0
    for seed in range(4):
        model = _model(seed=seed)
        source = torch.tensor([[3, 4, 5, EOS], [5, EOS, PAD, PAD]])
        limits = torch.tensor([4, 3])
        found = beam_search(model, source, limits, beam=3**4, penalty=penalty)
        for row, limit, given in zip(source, limits.tolist(), found, strict=True):
            alone = row[row != PAD]
            best = max(_all(6, limit), key=lambda t, alone=alone: _score(model, alone, t, penalty))
            assert given == best
        narrow = beam_search(model, source, limits, beam=1, penalty=penalty)
        wrong += narrow != found
    assert wrong  # else the search has nothing to find here


@torch.no_grad()
def test_a_narrow_search_takes_the_most_probable_word_each_time():
    model = _model(vocabulary=20)
    source = torch.tensor([[3, 9, 4, 7, EOS]])
    words = [BOS]
    while words[-1] != EOS:
        logits = model(source, torch.tensor([words]))[0, -1]
        logits[[PAD, BOS]] = -torch.inf
        words.append(EOS if len(words) == 12 else int(logits.argmax()))
    assert beam_search(model, source, torch.tensor([12]), beam=1, penalty=1.0) == [words[1:]]


@torch.no_grad()
def test_a_sentence_is_translated_the_same_in_any_company():
    """Others of other lengths, that end sooner and later, and padding."""
    model = _model(vocabulary=12, seed=3)
    sentences = [[3, 4, EOS], [5, 6, 7, 8, 9, 10, EOS], [11, EOS], [4, 4, 4, 4, EOS]]
    limits = [9, 14, 5, 7]
    source = torch.tensor([s + [PAD] * (8 - len(s)) for s in sentences])
    found = beam_search(model, source, torch.tensor(limits), beam=3, penalty=1.0)
    for sentence, limit, given in zip(sentences, limits, found, strict=True):
        assert [given] == beam_search(model, torch.tensor([sentence]), torch.tensor([limit]), beam=3, penalty=1.0)
        assert given.index(EOS) == len(given) - 1 < limit
    assert len({len(given) for given in found}) > 1


@torch.no_grad()
def test_the_model_reads_all_of_the_source_and_nothing_of_padding_or_what_follows():
    model = _model(vocabulary=12)
    source, before = torch.tensor([[3, 4, 5, EOS]]), torch.tensor([[BOS, 6, 7, 8]])
    logits = model(source, before)
    padded = model(torch.tensor([[3, 4, 5, EOS, PAD, PAD]]), torch.tensor([[BOS, 6, 9, 9, PAD]]))
    torch.testing.assert_close(padded[:, :2], logits[:, :2])
    assert not torch.allclose(padded[:, 2], logits[:, 2])
    assert not torch.allclose(model(torch.tensor([[9, 4, 5, EOS]]), before)[:, 0], logits[:, 0])
    torch.testing.assert_close(model.decode(before, *model.encode(source)), logits[:, -1])


def test_text_comes_back_from_its_codes():
    vocabulary = Vocabulary([line for pair in _sentences(60, 0) for line in pair], 300)
    lines = ["one dogs.", "Ünïcode </s> <pad> 猫", "", "zwei  Räume"]
    codes = vocabulary.encode(lines)
    assert [vocabulary.decode(line) for line in codes] == lines
    assert all(line[-1] == EOS and min(line[:-1], default=SPECIAL) >= SPECIAL for line in codes)
    assert vocabulary.decode([*codes[0], *codes[3]]) == lines[0]
    assert vocabulary.encode(lines) == Vocabulary([x for pair in _sentences(60, 0) for x in pair], 300).encode(
        lines
    )


def test_each_pair_comes_once_an_epoch_in_batches_of_tokens(config, files):
    task = _task(config())
    decode = task.vocabulary.decode
    known = sorted(zip(*read_pairs(str(files), ["train"], ("en", "de"))[1:], strict=True))
    orders = []
    for epoch in (0, 1):
        said = []
        batches = list(task.train(epoch))
        assert len(batches) == task.steps_per_epoch > 5
        for (source, before), targets in batches:
            assert len(source) * max(source.shape[1], targets.shape[1]) <= 256
            tokens = targets.where(targets != IGNORED, PAD)
            assert torch.equal(before[:, 1:], tokens[:, :-1])
            assert (before[:, 0] == BOS).all()
            assert ((targets == EOS).sum(1) == 1).all()
            said += [tuple(map(decode, pair)) for pair in zip(source.tolist(), tokens.tolist(), strict=True)]
        assert sorted(said) == known
        orders.append(said)
    assert orders[0] != orders[1]
    for got, wanted in zip(task.train(1, 3), batches[3:], strict=True):
        assert torch.equal(got[0][0], wanted[0][0])
        assert torch.equal(got[1], wanted[1])


def test_batches_are_few_and_alike():
    lengths = torch.randint(3, 40, (500,), generator=torch.Generator().manual_seed(0)).sort().values
    found = cuts(lengths, 300)
    sizes = [(b - a) * int(lengths[b - 1]) for a, b in itertools.pairwise(found)]
    assert found[0] == 0
    assert found[-1] == 500
    assert max(sizes) <= 300
    assert min(sizes) > 150
    assert cuts(torch.tensor([4]), 4) == [0, 1]


def test_what_is_recorded_says_how_it_was_scored(config, tmp_path, run):
    result = train(config(), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    note = lines[0]["metrics"][0]["note"]
    assert note.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert note.endswith("; beam 2, length penalty 1, test_2016_flickr.de")
    assert [kind.name for kind in result.kinds] == ["BLEU", "loss", "perplexity"]
    assert result.kinds[0].note == note
    assert 0 <= result.metrics["BLEU"] <= 100
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["loss"]))
    assert result.metrics["loss"] == pytest.approx(result.eval_loss)
    window = next(line for line in lines if line["kind"] == "train")
    assert window["loss"] != pytest.approx(window["metrics"]["loss"], rel=1e-4)  # the one is smoothed
    assert run("report", tmp_path / "run", "--html", "page.html")[0] == 0
    assert "case:mixed" in (tmp_path / "page.html").read_text(encoding="utf-8")


class Copier(torch.nn.Module):
    """Says what it is told."""

    def encode(self, source):
        return source, source != PAD

    def decode(self, before, memory, mask):
        return 20.0 * torch.nn.functional.one_hot(memory[:, before.shape[1] - 1], 290)


def test_bleu_is_of_what_the_model_says_of_each_line(config, files):
    task = _task(config(target="en", vocabulary=290))
    lines = read_pairs(str(files), ["test_2016_flickr"], ("en", "en"))[1]
    assert task.translate(Copier().eval()) == lines
    assert task.score(Copier().eval(), False)["BLEU"] == pytest.approx(100)
    task.translate = lambda model, amp: lines[::-1]
    assert task.score(Copier(), False)["BLEU"] < 60


def test_a_small_net_learns(config, tmp_path):
    """Of 300 tokens, 3 are left to choose from: what the source does not tell yet."""
    plain = {"average": 0.0, "label_smoothing": 0.0, "dropout": 0.0, "recipe": "default"}
    result = train(config(steps=60, epochs=9, lr=2e-2, warmup_steps=10, eval_every=60, **plain), tmp_path / "run")
    assert result.metrics["perplexity"] < 5


@pytest.mark.parametrize("recipe", ["none", "shq4"])
def test_an_interrupted_run_continues_to_the_same_numbers(config, tmp_path, metrics, interruption, recipe):
    config = config(recipe=recipe, eval_every=2, checkpointing=True)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", observer=interruption(1))
    train(config, tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_parts_of_a_batch_give_its_gradient(config):
    """Though they hold different numbers of tokens."""
    whole, parts = (Trainer(config(recipe="none", dropout=0.0, accumulate=n)) for n in (1, 3))
    batch = next(whole.batches())
    counts = [whole.task.count(part) for part in whole.task.split(batch, 3)]
    assert len(set(counts)) > 1
    for trainer in (whole, parts):
        trainer.train_step(batch)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert whole.take_window()["samples"] == parts.take_window()["samples"] == sum(counts)


@pytest.mark.parametrize("name", ["translator-4x128", "translator-6x512"])
def test_every_linear_of_a_translator_runs_on_integers(name):
    model = fqt.quantize_(build_translator(name, vocabulary=11, context=8, dropout=0.0), "default")
    assert model.head.weight is model.tokens.weight
    assert (model.source_tokens is None) == (name == "translator-4x128")
    report = str(fqt.explain(model))
    assert "decoder.blocks.3.cross.kv" in report
    assert "head" in report
    assert "simulated" not in report


def test_a_run_is_diagnosed(config, tmp_path, run):
    """Batches of about equally many tokens have different numbers of sentences."""
    train(config(recipe="shq4", dropout=0.1), tmp_path / "run")
    status, _, err = run("diagnose", tmp_path / "run", "--batches", 3, "--table", 0)
    assert (status, err) == (0, "")
    record = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert record["total"]["rho"]["value"] > 0
    sizes = {len(batch[1]) for batch in itertools.islice(_task(config()).train(0), 3)}
    assert len(sizes) > 1


def test_halves_say_what_batches_say(config):
    """Halves of a batch hold different numbers of tokens; the sampling variance that monitors take from them is
    all the same that from batch to batch, where batches are of one length.

    The quotient of the two has a standard deviation of 0.08 (over seeds); the bound is four times that.
    """
    made = config(recipe="none", dropout=0.0)
    task = _task(made)
    model, loss_fn = make_model(made, task, "none"), training_loss(made, task)
    rows = (task._train.lengths == task._train.lengths.mode().values).nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(rows), (150, 16), generator=generator)
    batches = [task._batch(task._train, rows[row]) for row in drawn]
    counts = [task.count(first_half(batch)[0]) for batch in batches]
    assert len(set(counts)) > 3

    def gradient(batch):
        found = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    whole = torch.stack([gradient(batch) for batch in batches])
    first = torch.stack([gradient(first_half(batch)[0]) for batch in batches])
    halves = (first - whole).square().sum(1).mean()
    assert halves / whole.var(0).sum() == pytest.approx(1, abs=0.32)


def test_adapt_reads_no_noise_from_a_batch_of_one_pair(config):
    longest = int(_task(config())._train.lengths.max())
    trainer = Trainer(config(recipe="shq8", adapt=True, adapt_every=1, batch_size=longest, dropout=0.0))
    alone = next(batch for batch in trainer.task.train(0) if len(batch[1]) == 1)
    others = next(batch for batch in trainer.task.train(0) if len(batch[1]) > 1)
    trainer.train_step(alone)
    assert trainer.take_events() == []
    trainer.train_step(others)
    assert trainer.take_events()[0]["kind"] == "monitor"


def _spoil(**changes):
    """A change to the files, by name; None removes."""

    def apply(folder):
        for name, content in changes.items():
            path = folder / name.replace("__", ".")
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (_spoil(), {"data": ""}, r"give --data the folder of train\.en and train\.de"),
        (_spoil(val__de=None), {}, r"has no val\.en and val\.de, or valid\.en .* give --data their folder"),
        (_spoil(), {"target": "fr"}, r"has no train\.en and train\.fr"),
        (_spoil(), {"test": "test_2017"}, r"has no test_2017\.en and test_2017\.de"),
        (_spoil(train__de=lambda b: b + b"mehr\n"), {}, "120 lines and .* 121: they must correspond"),
        (_spoil(train__de=lambda b: b.decode().encode("latin-1")), {}, r"is not UTF-8 \(byte \d+\): convert it"),
        (_spoil(val__de=lambda b: b"\n" + b.split(b"\n", 1)[1]), {}, r"line 1 of val\.en and val\.de is empty"),
        (_spoil(), {"context": 8}, r"of val\.en and val\.de has \d+ tokens: raise --context \(8\)"),
        (_spoil(), {"vocabulary": 5000}, r"gives a vocabulary of \d{3}, not 5000: lower --vocabulary"),
        (_spoil(), {"vocabulary": 100}, "too small for 256 bytes"),
        (_spoil(), {"batch_size": 8}, r"longer than a batch of 8: raise --batch-size"),
        (_spoil(train__en=lambda b: b"\n" * 120), {}, "have no pair of lines that are not empty"),
        (_spoil(train__en=lambda b: b"", train__de=lambda b: b""), {}, r"train\.en and train\.de hold no words"),
        (_spoil(), {"model": "gpt-4x128"}, "unknown model 'gpt-4x128'; known: translator-4x128"),
        (_spoil(), {"model": "torch.nn:Identity"}, "has no `encode` and `decode`"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::fqt.errors.FqtWarning")
def test_bad_input_is_told_in_one_line(config, files, spoil, changes, message):
    spoil(files)
    with pytest.raises(FqtError, match=message) as caught:
        Trainer(config(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizers", "sacrebleu"])
def test_a_missing_library(config, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    wanted = rf"translation needs {name} .*: in a checkout of fqt, pip install '.\[translation\]'"
    with pytest.raises(FqtError, match=wanted):
        _task(config())


def test_what_is_left_out_of_training_is_said(config, files):
    long = " ".join(["two cats"] * 40) + "."
    _write(files, "train", [("", "zwei"), ("one dogs", "   "), (long, long), *_sentences(120, 0)])
    said = r"3 of 123 pairs are left out \(2 with an empty line, 1 of more than 64 tokens, see --context\)"
    with pytest.warns(FqtWarning, match=said):
        task = _task(config())
    assert sum(len(targets) for _, targets in task.train(0)) == 120


def test_lines_end_at_line_feeds_only(files):
    (files / "val.en").write_bytes("\ufeffone\u2028two\r\nthree\x85four\n".encode())
    (files / "val.de").write_bytes(b"eins\nzwei")
    stem, source, target = read_pairs(str(files), ["val"], ("en", "de"))
    assert (stem, source, target) == ("val", ["one\u2028two", "three\x85four"], ["eins", "zwei"])
