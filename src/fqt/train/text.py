"""Text by characters: a language model of any UTF-8 file, such as tiny Shakespeare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fqt.errors import FqtError
from fqt.seeds import derive_seed
from fqt.train.config import TrainConfig
from fqt.train.models.transformers import build_gpt
from fqt.train.task import Metric, Task

__all__ = ["CharacterTask", "open_characters", "read_text", "read_utf8"]

TRAIN_SHARE = 0.9  # of the file, from its start, as nanoGPT splits it
NATS = Metric(name="loss", unit="nats", higher=False, digits=4)
BITS = Metric(name="bits per character", higher=False, digits=4)


def open_characters(config: TrainConfig, device: torch.device) -> Task:
    """Reads the text that ``config.data`` names, a file or a folder with ``input.txt``."""
    return CharacterTask(read_text(config.data), config, device)


class CharacterTask(Task):
    """Each next character of a text, from at most ``context`` before it.

    The vocabulary is the text's characters. Training sequences begin anywhere in the first 90 % (drawn from seed
    and epoch, with replacement; an epoch has as many characters as there are); evaluation goes once over the rest.

    Args:
        text: the whole of it.
        config: seed, batch_size (sequences), context, dropout.
        device: where the batches go.

    Raises:
        FqtError: the text is too short for one batch.
    """

    metrics = (NATS, BITS)
    samples = "characters"

    def __init__(self, text: str, config: TrainConfig, device: torch.device) -> None:
        codes, self.vocabulary = encode(text)
        cut = int(TRAIN_SHARE * len(codes))
        self._train, self._eval = codes[:cut], codes[cut:]
        self._config, self._device = config, device
        tokens = config.batch_size * config.context
        if len(self._train) <= tokens or len(self._eval) <= config.context:
            raise FqtError(
                f"{len(text)} characters are too few for batches of {config.batch_size} sequences of "
                f"{config.context}: lower --batch-size or --context, or give a longer text"
            )
        self.steps_per_epoch = len(self._train) // tokens

    def build(self, name: str) -> nn.Module:
        """A GPT of this vocabulary and context."""
        return build_gpt(
            name, vocabulary=len(self.vocabulary), context=self._config.context, dropout=self._config.dropout
        )

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of characters (batch_size, context) and those that follow them, int64."""
        size, length = self._config.batch_size, self._config.context
        generator = torch.Generator().manual_seed(derive_seed(self._config.seed, "order", epoch))
        first = torch.randint(len(self._train) - length, (self.steps_per_epoch, size), generator=generator)
        for row in first[start:]:
            yield self._cut(self._train, row, length)

    def eval(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the text in sequences of ``context``; the last is shorter."""
        size, length = self._config.batch_size, self._config.context
        pairs = len(self._eval) - 1  # of a character and the next
        first = torch.arange(0, pairs - length + 1, length)
        for rows in first.split(size):
            yield self._cut(self._eval, rows, length)
        if left := pairs % length:
            yield self._cut(self._eval, torch.tensor([pairs - left]), left)

    def _cut(self, text: Tensor, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
        pieces = text[first[:, None] + torch.arange(length + 1)].long().to(self._device)
        return pieces[:, :-1], pieces[:, 1:]

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (characters of the batch, vocabulary) and the characters that came."""
        inputs, targets = batch
        return model(inputs).flatten(0, 1), targets.flatten()

    def values(self, sums: Sequence[float]) -> dict[str, float]:
        """Cross entropy per character, in nats and in bits."""
        nats = sums[0] / sums[-1]
        return {NATS.name: nats, BITS.name: nats / math.log(2)}


def encode(text: str) -> tuple[Tensor, list[str]]:
    """The characters' places in their sorted set, int32 (characters,), and that set."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known, codes = np.unique(points, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int32)), [chr(point) for point in known]


def read_text(data: str) -> str:
    """A UTF-8 file, or ``input.txt`` in a folder; tiny Shakespeare's name is also looked for.

    Raises:
        FqtError: there is no such file, or it is not UTF-8.
    """
    if not data:
        raise FqtError("this task needs a text: give --data a UTF-8 file, or a folder with input.txt")
    path = Path(data)
    looked = [path] if not path.is_dir() else [path / "input.txt", path / "tinyshakespeare" / "input.txt"]
    file = next((p for p in looked if p.is_file()), None)
    if file is None:
        raise FqtError(f"there is no text {' or '.join(map(str, looked))}: give --data a UTF-8 file, or its folder")
    return read_utf8(file)


def read_utf8(file: Path, *, newlines: bool = True) -> str:
    """A file's text, every end of a line made a line feed unless `newlines` is off.

    Raises:
        FqtError: it cannot be read, or is not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FqtError(
            f"{file} is not UTF-8 (byte {error.start}): convert it, for instance with iconv -t UTF-8"
        ) from error
    except OSError as error:
        raise FqtError(f"cannot read {file}: {error.strerror}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if newlines else text
