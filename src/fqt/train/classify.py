"""Classification of lines of text, such as SST-2's: words, numbered, and an encoder from fresh weights."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fqt.errors import FqtError, FqtWarning
from fqt.seeds import derive_seed
from fqt.train.config import TrainConfig
from fqt.train.loaders import epoch_order
from fqt.train.models.encoders import PADDING, build_encoder
from fqt.train.task import Task
from fqt.train.text import read_utf8

__all__ = ["UNKNOWN", "Labelled", "LineTask", "open_lines", "read_labelled", "split_words"]

UNKNOWN = 1  # the token of every word that the vocabulary lacks
SPECIAL = 2  # tokens before the first word's
POOL = 50  # batches whose lines are put together by length
WORD = re.compile(r"\w+|[^\w\s]")

Labelled = tuple[list[list[str]], list[int]]  # words of each line, and its label


def open_lines(config: TrainConfig, device: torch.device) -> Task:
    """Reads ``train.tsv`` and ``dev.tsv`` in the folder that ``config.data`` names.

    Raises:
        FqtError: a file is missing, or holds something else than labelled lines.
    """
    if not config.data:
        raise FqtError("the task classify needs lines: give --data a folder with train.tsv and dev.tsv")
    files = [Path(config.data) / name for name in ("train.tsv", "dev.tsv")]
    for file in files:
        if not file.is_file():
            raise FqtError(f"there is no {file}; --data must name a folder with train.tsv and dev.tsv")
    train, evaluation = (read_labelled(file, config.context) for file in files)
    _check_labels(files, train[1], evaluation[1])
    return LineTask(train, evaluation, config, device)


class LineTask(Task):
    """Lines of text, each of one class.

    The vocabulary is `PADDING`, `UNKNOWN` and the training lines' most frequent words. Batches are drawn so that
    lines of about one length come together: the order is random, sorted by length within every `POOL` batches, and
    the batches are put in random order again.

    Args:
        train: words and labels, from 0 on without a gap.
        evaluation: the same.
        config: seed, batch_size, drop_last, context, vocabulary, dropout.
        device: where the batches go.

    Raises:
        FqtError: too few lines for a batch, or a vocabulary of no words.
    """

    samples = "lines"

    def __init__(self, train: Labelled, evaluation: Labelled, config: TrainConfig, device: torch.device) -> None:
        self.vocabulary = _vocabulary(train[0], config.vocabulary)
        self._train, self._eval = (self._numbered(part) for part in (train, evaluation))
        self._config, self._device = config, device
        self.num_classes = max(train[1]) + 1
        count, size = len(train[1]), config.batch_size
        self.steps_per_epoch = count // size if config.drop_last else -(-count // size)
        if not self.steps_per_epoch:
            raise FqtError(f"{count} training lines do not fill a batch of {size}: lower --batch-size")

    def _numbered(self, lines: Labelled) -> tuple[list[Tensor], Tensor]:
        numbers = {word: i for i, word in enumerate(self.vocabulary, start=SPECIAL)}
        rows = [torch.tensor([numbers.get(word, UNKNOWN) for word in words]) for words in lines[0]]
        return rows, torch.tensor(lines[1])

    def build(self, name: str) -> nn.Module:
        """An encoder of this vocabulary, context and number of classes."""
        return build_encoder(
            name,
            vocabulary=SPECIAL + len(self.vocabulary),
            context=self._config.context,
            num_classes=self.num_classes,
            dropout=self._config.dropout,
        )

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of tokens (batch_size, longest), filled up with `PADDING`, and labels (batch_size,), int64."""
        lines, labels = self._train
        size = self._config.batch_size
        order = epoch_order(self._config.seed, epoch, len(lines))[: self.steps_per_epoch * size]
        lengths = torch.tensor([len(line) for line in lines])
        pools = [pool[lengths[pool].argsort(stable=True)] for pool in order.split(POOL * size)]
        batches = [batch for pool in pools for batch in pool.split(size)]
        generator = torch.Generator().manual_seed(derive_seed(self._config.seed, "batches", epoch))
        for i in torch.randperm(len(batches), generator=generator)[start:].tolist():
            yield self._padded([lines[k] for k in batches[i].tolist()], labels[batches[i]])

    def eval(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All evaluation lines, in the file's order."""
        lines, labels = self._eval
        for first in range(0, len(lines), self._config.batch_size):
            where = slice(first, first + self._config.batch_size)
            yield self._padded(lines[where], labels[where])

    def _padded(self, lines: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = nn.utils.rnn.pad_sequence(list(lines), batch_first=True, padding_value=PADDING)
        return tokens.to(self._device), labels.to(self._device)

    def is_whole(self, batch: tuple[Tensor, Tensor]) -> bool:
        """Whether a batch is of the full size, or the only one."""
        return len(batch[1]) == self._config.batch_size or self.steps_per_epoch == 1


def split_words(text: str) -> list[str]:
    """A text's words and other characters, in lower case.

    >>> split_words("It's n't bad .")
    ['it', "'", 's', 'n', "'", 't', 'bad', '.']
    """
    return WORD.findall(text.lower())


def read_labelled(file: Path, context: int) -> Labelled:
    """Lines ``text TAB label``, UTF-8; a first line whose label is no number is a heading.

    Args:
        file: a path.
        context: words of a line at most.

    Raises:
        FqtError: a line that is empty, too long or of other columns, a label that is no whole number from 0 on, no
            line at all, or a file that is not UTF-8.
    """
    words: list[list[str]] = []
    labels: list[int] = []
    lines = read_utf8(file).removeprefix("\ufeff").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        text, label = _columns(line, f"line {number} of {file}")
        if number == 1 and not _is_label(label):
            continue
        if not _is_label(label):
            raise FqtError(f"line {number} of {file}: the label {label!r} is no whole number from 0 on")
        found = split_words(text)
        if not 0 < len(found) <= context:
            what = (
                f"{len(found)} words are more than --context {context}: raise it"
                if found
                else "no word before the tab"
            )
            raise FqtError(f"line {number} of {file}: {what}")
        words.append(found)
        labels.append(int(label))
    if not labels:
        raise FqtError(f"{file} holds no labelled line")
    return words, labels


def _columns(line: str, where: str) -> tuple[str, str]:
    if not line.strip():
        raise FqtError(f"{where} is empty: remove it")
    columns = line.split("\t")
    if len(columns) != 2:
        raise FqtError(f"{where} has {len(columns)} columns; expected a text, a tab and its label")
    return columns[0], columns[1].strip()


def _is_label(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 10


def _check_labels(files: Sequence[Path], train: Sequence[int], evaluation: Sequence[int]) -> None:
    """Labels are 0, 1, … without a gap, two at least, and evaluation has no others."""
    known = set(train)
    missing = min(set(range(len(known) + 1)) - known)
    if missing < len(known):
        raise FqtError(f"labels are 0, 1, … without a gap, and {files[0]} has no line of {missing}")
    if len(known) < 2:
        raise FqtError(f"all lines of {files[0]} have the label 0: nothing is to be told apart")
    if unknown := set(evaluation) - known:
        raise FqtError(f"{files[1]} has the label {min(unknown)}, which no line of {files[0]} has")


def _vocabulary(lines: Sequence[Sequence[str]], size: int) -> list[str]:
    """The most frequent words, ties in the order of the alphabet, so that with `SPECIAL` there are ``size``."""
    if size <= SPECIAL:
        raise FqtError(f"a vocabulary of {size} has no words beside {SPECIAL} special tokens: raise --vocabulary")
    counts = Counter(word for words in lines for word in words)
    if len(counts) < size - SPECIAL:
        warnings.warn(
            f"the training lines have {len(counts)} different words, all of which are taken: --vocabulary {size} "
            "leaves room for more",
            FqtWarning,
            stacklevel=2,
        )
    return sorted(counts, key=lambda word: (-counts[word], word))[: size - SPECIAL]
