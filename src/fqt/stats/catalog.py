"""The catalog measured: what each method's noise is on the gradient matrices that ship with the package."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fqt.quant import RangeState
from fqt.quant.catalog import METHODS
from fqt.quant.examples import FAMILIES, gradients
from fqt.quant.names import method_of, quantizer
from fqt.quant.quantizer import Quantizer
from fqt.stats.certification import certify

__all__ = ["STORED_SHAPE", "catalog_record", "catalog_row", "certified", "mean_ratio"]

STORED_SHAPE = (1024, 1024)
DRAWS = 4  # of random signs, whose average is taken
REMEMBERED = 0.9  # of a tensor's own range: what certificates of remembered ones are quantized in


def catalog_row(name: str, families: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """One row of the table: what is known of a quantizer, and its variance over `psq`'s of the same width.

    `psq`'s width is the one in the name: for a method with two codes per entry that is the width of one. Methods
    that remember ranges are measured on a first tensor, in its own.

    Args:
        name: of a quantizer.
        families: the matrices by family, as `gradients` gives them.
    """
    method, q = method_of(name), quantizer(name)
    bits = method.bits_of(name)
    plain = f"psq{bits}"
    return {
        "name": name,
        "title": method.title,
        "paper": method.paper.name,
        "arxiv": method.paper.arxiv,
        "year": method.paper.year,
        "what": method.what,
        "rounding": q.rounding_name,
        "stored": q.bits_stored(STORED_SHAPE) / math.prod(STORED_SHAPE),
        "bias": method.bias,
        "product": method.product,
        "width": bits,
        "variance": {family: mean_ratio(name, plain, found.values()) for family, found in families.items()},
    }


def catalog_record() -> dict[str, Any]:
    """All rows, measured now."""
    families = {family: gradients(family) for family in FAMILIES}
    rows = [catalog_row(name, families) for method in METHODS.values() for name in method.shown]
    return {"matrices": {family: len(found) for family, found in families.items()}, "rows": rows}


def mean_ratio(name: str, other: str, matrices: Iterable[Tensor]) -> float:
    """Geometric mean over matrices of one quantizer's variance over another's, each the mean of DRAWS seeds'."""
    ratios = [math.log(_variance(quantizer(name), x) / _variance(quantizer(other), x)) for x in matrices]
    return math.exp(sum(ratios) / len(ratios))


def _variance(q: Quantizer, x: Tensor) -> float:
    seeds = range(DRAWS if q.transform != METHODS["psq"].transform else 1)
    return sum(float(q.variance(x, seed)) for seed in seeds) / len(seeds)


def certified(name: str, draws: int = 1024) -> dict[str, Any]:
    """What `certify` says of a name, in short; of one that remembers ranges, with a tenth of the range cut off."""
    q = quantizer(name)
    found = certify((lambda x, seed: _cut_off(q, x, seed)) if q.scale.remembers else name, draws=draws)
    convicted = sorted({f.test for tests in found.convicted.values() for f in tests})
    return {"verdict": found.verdict, "draws": found.draws, "seed": found.seed, "failed": convicted}


def _cut_off(q: Quantizer, x: Tensor, seed: int) -> Tensor:
    """An estimate of x in less than its own range."""
    first = RangeState.empty()
    own = q.learned(first, q.quantize_measuring(x, first, seed)[1])
    return q.quantize(x, seed, range=replace(own, bounds=REMEMBERED * own.bounds)).dequantize()
