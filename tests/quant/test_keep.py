"""What is kept of rows: probabilities, weights, exact variances, and the order of a spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fqt
from fqt import FqtError, Quantizer, quantizer
from fqt.kernels import sampling
from fqt.nn import dump_recipe, load_recipe
from fqt.quant import ByRange, Integers, Kept, Leverage, LowSequency, Rotated, Scale, Sequency
from fqt.quant.keep import KEEPS, Keep, Sampled, keep_from


def rows(seed: int = 0, n: int = 40, width: int = 6) -> Tensor:
    """Rows of very different size, two of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator) * torch.randn(n, 1, generator=generator).mul(1.5).exp()
    x[3] = x[17] = 0
    return x


def by_rounds(score: Tensor, budget: float) -> Tensor:
    """The papers' rule as they have it: a probability above 1 is fixed there, and the rest share again."""
    fixed = torch.zeros_like(score, dtype=torch.bool)
    while True:
        p = torch.where(fixed, 1.0, score * (budget - fixed.sum()) / score[~fixed].sum())
        if not bool((p[~fixed] > 1).any()):
            return p
        fixed |= p > 1


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.8])
def test_probabilities_are_capped_and_share_the_rest(share: float) -> None:
    score = rows().norm(dim=1).double()
    p = sampling.capped(score, share)
    torch.testing.assert_close(p, by_rounds(score, share * 40), rtol=0, atol=2**-23)
    assert float(p.sum()) == pytest.approx(40 * share, abs=40 * 2**-23)
    assert bool((p[[3, 17]] == 0).all())
    assert bool(((p * 2**24) % 1 == 0).all())


def test_probabilities_of_few_or_equal_rows() -> None:
    assert sampling.capped(torch.zeros(0, dtype=torch.float64), 0.5).shape == (0,)
    assert sampling.capped(torch.zeros(5, dtype=torch.float64), 0.5).tolist() == [0] * 5
    assert sampling.capped(torch.tensor([0.0, 2, 0, 0], dtype=torch.float64), 0.5).tolist() == [0, 1, 0, 0]
    assert sampling.capped(torch.full((8,), 3.0, dtype=torch.float64), 0.5).tolist() == [0.5] * 8
    assert sampling.capped(torch.rand(9, dtype=torch.float64), 1.0).tolist() == [1] * 9
    assert bool(sampling.capped(torch.tensor([1.0, math.nan]).double(), 0.5).isnan().all())


def test_weights_have_mean_one() -> None:
    """Of 4,000 seeds × 20 rows the largest z is below 5: a false alarm in 1e-5."""
    p = torch.linspace(0.05, 1, 20, dtype=torch.float64).mul(2**24).ceil() / 2**24
    draws = torch.stack([sampling.weights(p, torch.tensor(seed)) for seed in range(4000)])
    error = ((1 / p - 1) / 4000).sqrt() + 1e-9
    assert float(((draws.mean(0) - 1) / error).abs().max()) < 5
    correlation = torch.corrcoef(draws.T[:-1])
    assert float((correlation - torch.eye(19)).abs().max()) < 5 / 4000**0.5


SAMPLED: dict[str, Keep] = {
    "leverage": Leverage(0.5),
    "range": ByRange(0.4),
    "sequency": Sequency(4, 8),
}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("alone", [True, False])
def test_the_variance_is_exact_and_the_mean_unbiased(name: str, alone: bool) -> None:
    """2,000 draws: the mean squared error within 7 standard errors (false alarm below 1e-9), the mean likewise."""
    keep, g = SAMPLED[name], rows().double() + 0.2
    x = None if alone else rows(1, width=5).double()
    truth = g if x is None else g.T @ x
    found = []
    for seed in range(2000):
        kept = keep.apply(g, x, torch.tensor(seed), 1)
        found.append(keep.back(kept, len(g)) if x is None else kept.T @ keep.turned(x))
    errors = torch.stack(found) - truth
    squares = errors.square().sum((1, 2))
    exact = float(keep.variance(g, x))
    assert abs(float(squares.mean()) - exact) < 7 * float(squares.std()) / 2000**0.5
    assert float(errors.mean(0).square().sum()) < 1.5 * exact / 2000


def test_leverage_has_the_least_variance_of_all_samples_of_its_size() -> None:
    g, x = rows().double(), rows(1).double()
    leverage, by_range = (keep(0.3).variance(g, x) for keep in (Leverage, ByRange))
    even = (1 / 0.3 - 1) * (g.norm(dim=1) * x.norm(dim=1)).square().sum()
    assert float(leverage) < float(by_range)
    assert float(leverage) < float(even)


def test_a_constant_row_is_not_lost() -> None:
    """Its range is 0, that of the row and 0 is not."""
    g = torch.full((4, 3), 2.0)
    kept = torch.stack([ByRange(0.5).apply(g, None, torch.tensor(seed), 1) for seed in range(64)])
    assert set(kept.unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_walsh_rows_are_orthonormal_and_in_the_order_of_their_sequency(block: int) -> None:
    h = sampling.walsh(block, block, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(h @ h.T, torch.eye(block, dtype=torch.float64))
    assert (h.sign().diff(dim=1) != 0).sum(1).tolist() == list(range(block))


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_blocks_of_tokens_do_not_cross_samples(length: int) -> None:
    x = torch.randn(3, length, 5)
    whole, low = Sequency(8, 16), LowSequency(8, 16)
    torch.testing.assert_close(whole.back(whole.turned(x), length), x)
    assert low.turned(x).shape == (3, -(-length // 16) * 8, 5)
    assert torch.equal(low.turned(x)[1:2], low.turned(x[1:2]))
    torch.testing.assert_close(low.turned(low.back(low.turned(x), length))[..., :0, :], low.turned(x)[..., :0, :])


def test_what_changes_slowly_survives_and_what_does_not_is_dropped() -> None:
    slow, fast = torch.ones(32, 3), torch.ones(32, 3)
    fast[1::2] = -1
    low = LowSequency(8, 16)
    torch.testing.assert_close(low.back(low.turned(slow), 32), slow)
    assert float(low.turned(fast).abs().max()) < 1e-6
    assert low.bias.startswith("biased")
    assert {Sequency().bias, Leverage().bias, ByRange().bias, LowSequency(4, 4).bias} == {"exact"}


def test_what_is_not_finite_is_not_lost() -> None:
    g = rows()
    g[5, 2] = math.nan
    for keep in SAMPLED.values():
        assert bool(keep.apply(g, None, torch.tensor(0), 1).isnan().any())


def test_words() -> None:
    for keep in (*SAMPLED.values(), LowSequency(3, 4)):
        assert keep_from(keep.words) == keep
    assert str(Leverage(0.5)) == "leverage, share=0.5"
    assert issubclass(KEEPS["range"], Sampled)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Leverage(0), "above 0"),
        (lambda: ByRange(True), "True"),
        (lambda: LowSequency(17, 16), "17"),
        (lambda: Sequency(8, 12), "power of two"),
        (lambda: keep_from({"by": "size"}), "leverage"),
        (lambda: keep_from({"by": "range", "rows": 2}), "share"),
        (lambda: keep_from("leverage"), "by ="),
        (lambda: Keep(), "Keep.. leaves apply, variance .*Leverage"),
        (lambda: Sampled(0.5), "Sampled.. leaves score .*Leverage"),
        (lambda: fqt.Product("psq8", keep="leverage"), "sampler of rows"),
        (lambda: Kept(LowSequency(8, 16)), "sample of rows"),
        (lambda: Leverage(0.5).variance(torch.ones(4, 5), torch.ones(3, 5)), "4 rows and x has 3"),
        (lambda: ByRange(0.5).chances(torch.ones(4)), r"g must be a matrix of floats.*\(4,\)"),
        (lambda: Sequency(8, 16).variance(torch.ones(4, 5), torch.ones(4, 5, 6)), "x must be a matrix"),
        (lambda: Leverage(0.5).chances(torch.ones(4, 3, dtype=torch.int64)), "int64"),
        (lambda: Leverage(0.5).chances("g"), "not 'g'"),
    ],
)
def test_messages(make: object, word: str) -> None:
    with pytest.raises(FqtError, match=word) as error:
        make()
    assert "\n" not in str(error.value)


QUANTIZERS = {
    "agp4": quantizer("agp4"),
    "by norm": Quantizer(transform=Kept(Leverage(0.5)), grid=Integers(3)),
    "rotated": Quantizer(transform=Rotated(Kept(ByRange(0.5)), block=4), grid=Integers(3)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_of_kept_rows_knows_its_variance(name: str) -> None:
    """Of keeping and rounding, plain and weighted: the mean of 2,000 squared errors within 7 standard errors."""
    q, x = QUANTIZERS[name], rows() + 0.2
    weight = torch.linspace(0.2, 3, 40)[:, None]
    errors = torch.stack([q.quantize(x, seed).dequantize() - x for seed in range(2000)]).double()
    seeds = range(20 if name == "rotated" else 1)  # a rotation changes ranges, so probabilities
    for scale in (None, weight):
        squares = (errors.square() * (1 if scale is None else scale)).sum((1, 2))
        stated = [q.variances(x, [q.bits], seed, weight=scale) for seed in seeds]
        exact, bound = (sum(float(pair[i]) for pair in stated) / len(seeds) for i in (0, 1))
        assert abs(float(squares.mean()) - exact) < 7 * float(squares.std()) / 2000**0.5 + 0.02 * exact
        assert exact <= bound
    assert float(q.variance(x, 0)) == pytest.approx(float(q.variances(x, [q.bits], 0)[0]), rel=1e-9)


@pytest.mark.parametrize("name", ["agp4", "agp8d"])
def test_rows_at_the_end_of_the_float_range_are_kept_more_often(name: str) -> None:
    """Over a quarter they would be infinite. 2,000 draws: no entry's mean is off by 6 standard errors (false alarms
    1e-6), nor the mean squared error from the exact variance by 7.
    """
    largest = float(torch.finfo(torch.float32).max)
    x = (torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) - 0.5).double()
    x[0, 0], x[1, 0], x[2:] = 0.7, -0.8, x[2:] / 3
    q, given = quantizer(name), (x * largest).float()
    errors = torch.stack([q.quantize(given, seed).dequantize(torch.float64) for seed in range(2000)]) / largest - x
    assert bool(errors.isfinite().all())
    assert float((errors.mean(0).abs() / (errors.std(0) / 2000**0.5 + 1e-7)).max()) < 6
    squares = errors.square().sum((1, 2))
    stated = float(q.variance(given)) / largest**2
    assert abs(float(squares.mean()) - stated) < 7 * float(squares.std()) / 2000**0.5
    sample, small = q.transform.rows, given / 64
    assert float(sample.chances(given)[:2].min()) >= 0.7
    assert float(sample.chances(given).sum()) > 0.25 * 8
    assert torch.equal(sample.chances(small), sampling.capped(sample.score(small, None), 0.25))


def test_rows_that_are_not_kept_have_code_zero() -> None:
    q, x = quantizer("agp4"), rows() + 0.2
    quantized = q.quantize(x, 1)
    lost = (quantized.dequantize() == 0).all(1)
    assert 20 < int(lost.sum()) < 38  # a quarter of 40 are kept on average
    assert not quantized.codes[lost].any()
    with pytest.raises(FqtError, match="row scales"):
        replace(q, scale=Scale("tensor"))


def test_a_quantizer_of_kept_rows_in_words() -> None:
    own = Quantizer(transform=Kept(Leverage(0.3)), grid=Integers(5))
    for q in (quantizer("agp4d@token"), own, QUANTIZERS["rotated"]):
        recipe = fqt.Recipe(grad_input=q)
        assert load_recipe(dump_recipe(recipe)) == fqt.Recipe.of_text(recipe.text) == recipe
    with pytest.raises(FqtError, match="'range' or 'leverage'"):
        load_recipe({"grad_input": {"keep": {"by": "sequency"}}})
    with pytest.raises(FqtError, match="one transform"):
        load_recipe({"grad_input": {"keep": {"by": "range"}, "transform": "hadamard"}})


def test_certificates_of_samples() -> None:
    """Of functions whose entries of a row are kept together: samples are exact, the published form is biased."""

    def of(keep: Keep) -> Callable[[Tensor, int], Tensor]:
        return lambda x, seed: keep.back(keep.apply(x, None, torch.tensor(seed), 1), len(x))

    for keep in (Leverage(0.5), ByRange(0.5)):
        assert fqt.certify(of(keep), draws=64, mixes=1).verdict == "exact"
    assert fqt.certify(of(LowSequency(8, 16)), draws=64).verdict == "biased"
