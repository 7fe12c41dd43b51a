"""What is kept, and gradients made of it: the C++ kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fqt.kernels import kept
from fqt.kernels.kept import Codes


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 255, 4096, 4097, 70_001])
def test_flags_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    x, grad = drawn(n, dtype=dtype), drawn(n, dtype=dtype, seed=1)
    x[0], x[-1] = torch.nan, 0.0
    flags = kept.positive(x)
    assert torch.equal(flags, kept.positive.reference(x))
    assert torch.equal(kept.gate(grad, flags), kept.gate.reference(grad, flags))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_from_codes(dtype: torch.dtype, bits: int) -> None:
    """To the rounding of sums in another order; channels in runs, side by side, and rows across groups."""
    for rows, features, inner in ((30, 24, 7), (900, 6, 1), (64, 12, 64), (3, 300, 1)):
        n = rows * features * inner
        x, grad = drawn(n, dtype=dtype) + 3, drawn(n, dtype=dtype, seed=1)
        codes = Codes.of(x, bits, torch.tensor(5))
        mean, rstd, weight = drawn(features, seed=2), drawn(features, seed=3).abs() + 0.5, drawn(features, seed=4)
        norms = [(kept.batch_norm, (mean, rstd, w, inner)) for w in (weight, None)]
        by_row = drawn(rows, seed=5), drawn(rows, seed=6).abs() + 0.5, drawn(features * inner, seed=7)
        norms += [(kept.row_norm, (by_row[0], by_row[1], by_row[2])), (kept.row_norm, (None, by_row[1], None))]
        norms += [(kept.times, ())]
        for operation, arguments in norms:
            found, truth = operation(grad, codes, *arguments), operation.reference(grad, codes, *arguments)
            pairs = [(found, truth)] if isinstance(found, Tensor) else zip(found, truth, strict=True)
            for mine, reference in pairs:
                assert mine.dtype == reference.dtype
                assert mine.shape == reference.shape
                tolerance = 1e-2 if mine.dtype == torch.bfloat16 else 2e-5
                assert (mine - reference).abs().max() <= tolerance * reference.abs().max()


def test_packing_is_the_references() -> None:
    codes = torch.randint(4, (1024,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for bits in (2, 4):
        assert torch.equal(kept.pack(codes, bits), kept.pack.reference(codes, bits))


def test_the_native_kernels_run() -> None:
    from fqt.kernels.cpu.library import status

    x = drawn(512)
    codes = Codes.of(x, 4, torch.tensor(1))
    wanted = "reference" if status().level == "reference" else "cpu"
    assert kept.positive.backend(x) == kept.times.backend(x, codes) == wanted
    assert kept.row_norm.backend(x, codes, None, drawn(2), None) == wanted
