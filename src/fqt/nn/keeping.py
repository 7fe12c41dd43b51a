"""What one forward pass keeps for its backward: bytes by module and operation, as codes or in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8)
_MOST = 6


@dataclass(frozen=True)
class Kept:
    """What one operation in one module keeps.

    Attributes:
        layer: the qualified name of the module in whose forward it ran.
        operation: as autograd names it: "Rectified", "NativeLayerNorm", "_Products" (a converted layer's), …
        form: "codes" (bits among them) or "in full".
        bytes: of storages that no operation before it keeps; parameters and buffers left out.
    """

    layer: str
    operation: str
    form: str
    bytes: int


class Keeping:
    """Sees what autograd saves while a model runs.

    Args:
        here: the name of the module that is running.
        tensors: the model's own, which are there anyway.
    """

    def __init__(self, here: Callable[[], str], tensors: Iterable[Tensor]) -> None:
        self._here = here
        self._own = {place for t in tensors if (place := _place(t))}
        self._storages: dict[int, Any] = {}  # held, so that no address is used twice
        self._found: dict[tuple[int, str], list[int]] = {}

    @contextmanager
    def seen(self) -> Iterator[None]:
        """While it lasts, saved tensors are noted. A checkpoint's are not: they are not kept."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place and place not in self._own and place not in self._storages:
            storage = tensor.untyped_storage()
            self._storages[place] = storage
            made = torch.autograd._get_sequence_nr() - 1  # the node that this is saved for was numbered last
            sizes = self._found.setdefault((made, self._here()), [0, 0])
            sizes[tensor.dtype not in _INTEGERS] += storage.nbytes()
        return tensor

    def rows(self, root: Any) -> tuple[Kept, ...]:
        """What was kept, the largest first; `root` is the node of the graph that all others are reached from."""
        names = _names(root)
        sums: dict[tuple[str, str, str], int] = {}
        for (made, layer), (codes, floats) in self._found.items():
            form = "codes" if codes > floats else "in full"
            key = (layer, names.get(made, "an operation that the output does not depend on"), form)
            sums[key] = sums.get(key, 0) + codes + floats
        self._storages.clear()
        return tuple(sorted((Kept(*key, size) for key, size in sums.items()), key=lambda row: -row.bytes))


def _place(tensor: Tensor) -> int:
    """Where its memory begins; 0 if it has none to tell by."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _names(root: Any) -> dict[int, str]:
    """The operations of a graph's nodes by their numbers."""
    names: dict[int, str] = {}
    seen, ahead = {root}, [root]
    while ahead:
        node = ahead.pop()
        names[node._sequence_nr()] = node.name().rstrip("0123456789").removesuffix("Backward")
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                ahead.append(below)
    return names


def summary(rows: Iterable[Kept]) -> str:
    """One line: how much is kept, how much of it as codes, and what is largest of the rest."""
    rows = list(rows)
    codes, full = (sum(r.bytes for r in rows if r.form == form) for form in ("codes", "in full"))
    line = f"kept for backward: {_size(codes + full)}, {_size(codes)} of it as codes and bits"
    largest = [r for r in rows if r.form == "in full"][:_MOST]
    if not largest:
        return line
    named = ", ".join(f"{r.operation} in {r.layer or '(model)'} ({_size(r.bytes)})" for r in largest)
    return f"{line}; in full: {named}{', …' if len(largest) == _MOST else ''}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
