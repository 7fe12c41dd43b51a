"""What a converted layer tells of its products while somebody asks: which ran, on what, and how large they were.

The layer itself decides at each call whether a product runs on integers; a report that decided anew would be a
second opinion. So the decision is noted where it is made. A layer carries a witness only inside
`explain(model, batch)`; it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Count:
    """How often something ran, and the multiplications in all of it."""

    calls: int = 0
    multiplications: int = 0

    def add(self, multiplications: int) -> None:
        """One more call."""
        self.calls += 1
        self.multiplications += multiplications


@dataclass
class Witness:
    """The products of one layer as they ran. As a context, it lasts while the layer is at work.

    Attributes:
        at_work: the layers at work right now, one list for all witnesses of a run: what torch is asked to
            compute meanwhile is part of their products.
        products: by product ("output", "grad_input", "grad_weight") and arithmetic ("integer", "simulated",
            "float").
    """

    at_work: list[Witness]
    products: dict[tuple[str, str], Count] = field(default_factory=dict)
    _arithmetic: str = "float"

    def __enter__(self) -> Witness:
        self.at_work.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        self.at_work.pop()

    def decided(self, on_integers: bool) -> None:
        """Two operands in codes are about to be multiplied; without this call one of them is float."""
        self._arithmetic = "integer" if on_integers else "simulated"

    def ran(self, product: str, multiplications: int) -> None:
        """The product is done."""
        self.products.setdefault((product, self._arithmetic), Count()).add(multiplications)
        self._arithmetic = "float"
