"""Parallel text: two files whose lines are translations of each other, and a byte-pair vocabulary of both.

The vocabulary is learned from the training files each time they are opened, so that nothing is cached that could
belong to other files. That takes seconds, and the same text gives the same vocabulary (of one release of
`tokenizers`), on any number of threads.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.train.text import read_utf8

__all__ = ["BOS", "EOS", "PAD", "SPECIAL", "Vocabulary", "library", "read_pairs"]

PAD, BOS, EOS = 0, 1, 2
SPECIAL = 3  # numbers before the first token of text
BYTES = 256


class Vocabulary:
    """Byte-pair codes (Sennrich et al. 2016) of bytes within words: any text has codes, and comes back from them.

    Args:
        lines: to learn from.
        size: numbers in all: `PAD`, `BOS`, `EOS`, 256 bytes, and pairs that occur at least twice.

    Raises:
        FqtError: the library is missing, or the text does not give that many pairs.
    """

    def __init__(self, lines: Iterable[str], size: int) -> None:
        if size < SPECIAL + BYTES:
            raise FqtError(
                f"a vocabulary of {size} is too small for {BYTES} bytes and {SPECIAL} marks: --vocabulary"
            )
        tokenizers = library("tokenizers")
        level = tokenizers.pre_tokenizers.ByteLevel
        # Without special tokens: text that looks like one must not be taken for it.
        self._codes = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._codes.pre_tokenizer = level(add_prefix_space=True)
        self._codes.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size - SPECIAL, min_frequency=2, initial_alphabet=level.alphabet(), show_progress=False
        )
        self._codes.train_from_iterator(lines, trainer)
        found = self._codes.get_vocab_size() + SPECIAL
        if found < size:
            raise FqtError(f"the training text gives a vocabulary of {found}, not {size}: lower --vocabulary")

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Each line's numbers, with `EOS` behind them."""
        found = self._codes.encode_batch_fast(list(lines), add_special_tokens=False)
        return [[code + SPECIAL for code in line.ids] + [EOS] for line in found]

    def decode(self, codes: Sequence[int]) -> str:
        """The text of numbers, up to `EOS`; bytes that are no UTF-8 become U+FFFD."""
        codes = codes[: codes.index(EOS)] if EOS in codes else codes
        return str(self._codes.decode([code - SPECIAL for code in codes if code >= SPECIAL])).removeprefix(" ")


def library(name: str) -> Any:
    """A module of the libraries that translation needs besides.

    Raises:
        FqtError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FqtError(
            f"translation needs {name} ({error}): in a checkout of fqt, pip install '.[translation]'"
        ) from error


def read_pairs(data: str, stems: Sequence[str], languages: tuple[str, str]) -> tuple[str, list[str], list[str]]:
    """The lines of the first pair of files that is there, such as ``val.en`` and ``val.de``.

    Args:
        data: their folder.
        stems: what the files may be called, without the language.
        languages: their endings.

    Returns:
        The stem found, and both files' lines, equally many.

    Raises:
        FqtError: there is no such pair, or it is not UTF-8, or of unequal length.
    """
    if not data:
        raise FqtError(f"this task needs parallel files: give --data the folder of {_names(stems[0], languages)}")
    for stem in stems:
        files = [Path(data) / f"{stem}.{language}" for language in languages]
        if all(file.is_file() for file in files):
            first, second = map(_lines, files)
            if len(first) != len(second):
                raise FqtError(
                    f"{files[0]} has {len(first)} lines and {files[1]} {len(second)}: they must correspond line by "
                    "line"
                )
            return stem, first, second
    wanted = ", or ".join(_names(stem, languages) for stem in stems)
    raise FqtError(f"{data} has no {wanted}: give --data their folder, --source and --target their endings")


def _names(stem: str, languages: tuple[str, str]) -> str:
    return " and ".join(f"{stem}.{language}" for language in languages)


def _lines(file: Path) -> list[str]:
    """Lines end at line feeds only: other separators of Unicode stand within sentences."""
    text = read_utf8(file, newlines=False).removeprefix("\ufeff")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]
