"""Translation: parallel files, byte pairs, an encoder-decoder transformer, BLEU of what a beam search finds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fqt.errors import FqtError, FqtWarning
from fqt.seeds import derive_seed
from fqt.train.config import TrainConfig
from fqt.train.decoding import beam_search
from fqt.train.models.translator import build_translator
from fqt.train.parallel import BOS, PAD, Vocabulary, library, read_pairs
from fqt.train.task import IGNORED, Metric, Task, cross_entropy_sum

__all__ = ["Pairs", "TranslationTask", "open_translation"]

NATS = Metric(name="loss", unit="nats", higher=False, digits=4)  # per token
PERPLEXITY = Metric(name="perplexity", higher=False)
VALIDATION = ("val", "valid", "dev")
Batch = tuple[tuple[Tensor, Tensor], Tensor]


class TranslationTask(Task):
    """The target's next token, from the source and the target's tokens before it; at the end also BLEU.

    A batch is ``((source (B, S), before (B, T)), targets (B, T))``, int64, padded with 0, targets with `IGNORED`;
    B·max(S, T) is at most ``batch_size``. Pairs are sorted by length, equal ones in an order of (seed, epoch), cut
    at places that are the same in every epoch, and the batches shuffled; so are pairs within a batch, whose halves
    are therefore alike. Pairs of very different lengths never meet in a batch, as in most trainings of the kind.

    Empty lines and pairs longer than ``context`` are left out of training, with a warning that counts them; in the
    files that models are judged on they are errors, since without them the figures would be of other data.

    Args:
        config: data, source, target, test, vocabulary, context, batch_size, seed, dropout, beam, length_penalty.
        device: where the batches go.

    Raises:
        FqtError: files or libraries that are missing, or files that do not fit the configuration.
    """

    samples = "tokens"
    equal_batches = False

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        bleu = library("sacrebleu").metrics.BLEU
        languages = (config.source, config.target)
        train, valid = read_pairs(config.data, ["train"], languages), read_pairs(config.data, VALIDATION, languages)
        test = read_pairs(config.data, [config.test], languages) if config.test else valid
        if not any(map(any, train[1:])):
            raise FqtError(f"{train[0]}.{config.source} and {train[0]}.{config.target} hold no words to train on")
        self.vocabulary = Vocabulary((line for side in train[1:] for line in side), config.vocabulary)
        self._train = self._encode(*train, judged=False)
        self._eval, self._test = self._encode(*valid), self._encode(*test)
        self._cuts = cuts(self._train.lengths.sort().values, config.batch_size)
        self.steps_per_epoch = len(self._cuts) - 1
        self._bleu = bleu(references=[test[2]])
        how = f"beam {config.beam}, length penalty {config.length_penalty:g}, {test[0]}.{config.target}"
        self.metrics = (Metric(name="BLEU", note=f"{self._bleu.get_signature()}; {how}"), NATS, PERPLEXITY)

    def build(self, name: str) -> nn.Module:
        """A translator of this vocabulary and context."""
        config = self._config
        return build_translator(name, vocabulary=config.vocabulary, context=config.context, dropout=config.dropout)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of pairs of nearly one length, each pair once."""
        generator = torch.Generator().manual_seed(derive_seed(self._config.seed, "order", epoch))
        count = len(self._train.lengths)
        order = torch.randperm(count, generator=generator)
        order = order[self._train.lengths[order].argsort(stable=True)]
        shuffle = torch.rand(count, generator=generator)  # so that a batch's halves are alike
        for i in torch.randperm(self.steps_per_epoch, generator=generator)[start:].tolist():
            rows = order[self._cuts[i] : self._cuts[i + 1]]
            yield self._batch(self._train, rows[shuffle[rows].argsort()])

    def eval(self) -> Iterator[Batch]:
        """The validation pairs by length."""
        for rows in self._by_length(self._eval):
            yield self._batch(self._eval, rows)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B·T, vocabulary) and the tokens that came (B·T,)."""
        inputs, targets = batch
        return model(*inputs).flatten(0, 1), targets.flatten()

    def sums(self, logits: Tensor, targets: Tensor, loss: Tensor | None = None) -> Tensor:
        """(loss in nats, the same without smoothing, tokens)."""
        nats, count = cross_entropy_sum(logits, targets), (targets != IGNORED).sum()
        return torch.stack([nats if loss is None else loss.double() * count, nats, count])

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Cross entropy per token without smoothing, and its exponential."""
        nats = sums[1] / sums[-1]
        return {NATS.name: nats, PERPLEXITY.name: math.exp(min(nats, 700.0))}

    def score(self, model: nn.Module, amp: bool) -> Mapping[str, float]:
        """BLEU of the test files' translations."""
        return {"BLEU": float(self._bleu.corpus_score(self.translate(model, amp), None).score)}

    def translate(self, model: nn.Module, amp: bool = False) -> list[str]:
        """What the beam search finds for each line of the test files; of at most twice its tokens and 10 more."""
        config = self._config
        lines = [""] * len(self._test.lengths)
        for rows in self._by_length(self._test):
            source = self._test.source.padded(rows).to(self._device)
            limits = (2 * self._test.source.lengths[rows] + 10).clamp(max=config.context).to(self._device)
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=amp):
                found = beam_search(model, source, limits, beam=config.beam, penalty=config.length_penalty)
            for row, codes in zip(rows.tolist(), found, strict=True):
                lines[row] = self.vocabulary.decode(codes)
        return lines

    def is_whole(self, batch: Batch) -> bool:
        """Whether a batch can be halved: a long pair may fill one alone."""
        return len(batch[1]) > 1

    def _encode(self, stem: str, source: list[str], target: list[str], judged: bool = True) -> Pairs:
        """The pairs of two files, without those that cannot be trained on."""
        context = self._config.context
        coded = list(zip(*(self.vocabulary.encode(side) for side in (source, target)), strict=True))
        longest = [max(map(len, pair)) for pair in coded]
        empty = [i for i, lines in enumerate(zip(source, target, strict=True)) if not all(lines)]
        long = [i for i, length in enumerate(longest) if length > context]
        files = f"{stem}.{self._config.source} and {stem}.{self._config.target}"
        if judged and (empty or long):
            raise FqtError(
                f"line {empty[0] + 1} of {files} is empty: take the pair out"
                if empty
                else f"line {long[0] + 1} of {files} has {longest[long[0]]} tokens: raise --context ({context})"
            )
        left_out = {*empty, *long}
        if left_out:
            warnings.warn(
                f"{files}: {len(left_out)} of {len(coded)} pairs are left out ({len(empty)} with an empty line, "
                f"{len(long)} of more than {context} tokens, see --context)",
                FqtWarning,
                stacklevel=2,
            )
        kept = [pair for i, pair in enumerate(coded) if i not in left_out]
        if not kept:
            raise FqtError(f"{files} have no pair of lines that are not empty and fit a context of {context}")
        return Pairs(*(Sequences.of(side) for side in zip(*kept, strict=True)))

    def _by_length(self, pairs: Pairs) -> Sequence[Tensor]:
        order = pairs.lengths.argsort(stable=True)
        return order.tensor_split(cuts(pairs.lengths[order], self._config.batch_size)[1:-1])

    def _batch(self, pairs: Pairs, rows: Tensor) -> Batch:
        source, targets = pairs.source.padded(rows), pairs.target.padded(rows)
        before = F.pad(targets[:, :-1], (1, 0), value=BOS)
        targets = targets.masked_fill(targets == PAD, IGNORED)
        return (source.to(self._device), before.to(self._device)), targets.to(self._device)


def open_translation(config: TrainConfig, device: torch.device) -> Task:
    """Reads the parallel files in the folder ``config.data`` and learns their vocabulary."""
    return TranslationTask(config, device)


@dataclass(frozen=True)
class Sequences:
    """Token sequences one behind the other: ``codes`` (tokens,) int32, where each begins, and its length."""

    codes: Tensor
    first: Tensor
    lengths: Tensor

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> Sequences:
        """From lists."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        codes = torch.tensor([code for sequence in sequences for code in sequence], dtype=torch.int32)
        return Sequences(codes, lengths.cumsum(0) - lengths, lengths)

    def padded(self, rows: Tensor) -> Tensor:
        """Some of them (n, longest), int64, filled up with `PAD`."""
        lengths = self.lengths[rows][:, None]
        places = torch.arange(int(lengths.max()))
        inside = places < lengths
        index = torch.where(inside, self.first[rows][:, None] + places, 0)
        return torch.where(inside, self.codes[index].long(), PAD)


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations."""

    source: Sequences
    target: Sequences

    @property
    def lengths(self) -> Tensor:
        """Of the longer of the two."""
        return torch.maximum(self.source.lengths, self.target.lengths)


def cuts(lengths: Tensor, size: int) -> list[int]:
    """Where to cut sentences into the fewest batches of at most ``size`` padded tokens, the batches much alike.

    Args:
        lengths: (n,), ascending.
        size: tokens of a batch: its rows times the longest.

    Returns:
        0, the places between batches, n.

    Raises:
        FqtError: a sentence is longer than a batch.
    """
    known = lengths.tolist()
    if known[-1] > size:
        raise FqtError(
            f"a pair of {known[-1]} tokens is longer than a batch of {size}: raise --batch-size (tokens)"
        )
    enough, best = known[-1] - 1, _fill(known, size)
    # The smallest batches that are as few: filled to the brim, the last one would be a rest of any size.
    while size - enough > 1:
        middle = (size + enough) // 2
        tried = _fill(known, middle)
        if len(tried) == len(best):
            size, best = middle, tried
        else:
            enough = middle
    return best


def _fill(lengths: Sequence[int], size: int) -> list[int]:
    """Cuts such that each batch has as many rows as go into it."""
    found = [0]
    for i, length in enumerate(lengths):
        if (i + 1 - found[-1]) * length > size:
            found.append(i)
    return [*found, len(lengths)]
