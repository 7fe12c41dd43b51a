"""Remembered ranges: what is clipped, counted and learned, the mean and variance that clipping leaves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fqt import FqtError, Quantizer, certify
from fqt.quant import Best, Floats, Identity, Integers, RangeState, Rotated, Scale, quantizer
from fqt.quant.best import rounded
from tests.backends import reference_only

from .cases import FAMILIES, gaussian

NAMES = ("hind8", "hind4", "hind8d", "hind3n", "kim4", "kim8", "kim4n")
ZERO = Quantizer(scale=Scale("tensor", "zero", range="hindsight"))
POWERS = Quantizer(scale=Scale("tensor", "symmetric", range="hindsight"), grid=Floats(3, 0))
TURNED = Quantizer(transform=Rotated(Identity(), 16), scale=Scale("tensor", range="hindsight"), grid=Integers(4))
ALL = {name: quantizer(name) for name in NAMES} | {"zero": ZERO, "powers": POWERS, "turned": TURNED}
each = pytest.mark.parametrize("q", ALL.values(), ids=ALL)


def state_of(q: Quantizer, low: float, high: float) -> RangeState:
    """After one tensor: hindsight's range, or parts of the largest magnitude."""
    return RangeState(torch.tensor([low, high], dtype=torch.float64), torch.tensor([1, 0, 0]))


def narrow(q: Quantizer, x: Tensor, part: float = 0.6) -> RangeState:
    """A state that clips the outer part of x."""
    if q.scale.range == "steered":
        return state_of(q, -part, part)
    return state_of(q, part * float(x.min()), part * float(x.max()))


@each
def test_clipped_codes_are_the_references_bit_for_bit(q: Quantizer) -> None:
    for family, make in FAMILIES.items():
        x = make(17, 48, 3)
        x[0, 0], x[1, 1] = 3e38, -3e38  # far outside, where a cast of the position would overflow
        for axis in (0, 1):
            range = narrow(q, x[2:])
            fast, seen = q.quantize_measuring(x, range, 5, axis=axis)
            with reference_only():
                slow, again = q.quantize_measuring(x, range, 5, axis=axis)
            assert torch.equal(fast.codes, slow.codes), family
            assert torch.equal(fast.dequantize(), slow.dequantize())
            assert torch.equal(seen.bounds, again.bounds)
            assert torch.equal(seen.counts, again.counts)
            levels = q.coding.levels
            high = levels.high + q.coding.rounding.headroom
            assert levels.low <= int(fast.codes.min()) <= int(fast.codes.max()) <= high


@each
def test_in_its_own_range_it_is_the_quantizer_without_memory(q: Quantizer) -> None:
    """Before the first tensor, with no state at all, and with a remembered range that is the tensor's own."""
    x = gaussian(20, 33)
    x[3, 4] = -x.abs().max()  # symmetric: no other magnitude is larger
    plain = replace(q, scale=replace(q.scale, range="own"))
    wanted = plain.quantize(x, 9)
    first, seen = q.quantize_measuring(x, RangeState.empty(), 9)
    assert seen.counts.tolist() == [1, x.numel(), 0]
    whole = q.quantize(x, 9, range=q.learned(RangeState.empty(), seen)) if q.scale.range == "hindsight" else first
    for found in (q.quantize(x, 9), first, whole):
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.dequantize(), wanted.dequantize())
    assert not q.mean_error(x, 9, range=RangeState.empty()).any() or not q.draws


def test_hind8_is_ptq8_where_it_does_not_clip() -> None:
    """With the same range, after three tensors that had it."""
    state, q = RangeState.empty(), quantizer("hind8")
    for seed in range(3):
        x = gaussian(30, 20, seed).clamp(-1, 1.5)
        x[0, :2] = torch.tensor([-1, 1.5])
        found, seen = q.quantize_measuring(x, state, seed)
        wanted = quantizer("ptq8").quantize(x, seed)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.step, wanted.step)
        assert torch.equal(found.offset, wanted.offset)
        state = q.learned(state, seen)
    assert state.counts.tolist() == [3, 1800, 0]


@each
def test_mean_error_is_what_was_cut_off_and_the_variance_is_about_the_mean(q: Quantizer) -> None:
    """2000 draws: means of 384 entries within 5.5 standard errors, a false alarm in 2e-5 per quantizer.

    An error of a step that comes too rarely to be seen hides a mean of at most 16 steps/2000, but for 2e-7 each.
    """
    x = gaussian(8, 48, 4)
    range, draws = narrow(q, x), 2000
    signs = 3 if isinstance(q.transform, Rotated) else None  # one rotation, with the noise of many seeds

    def estimate(seed: int) -> Tensor:
        if signs is None:
            return q.quantize(x, seed, range=range).dequantize().double()
        inner = replace(q, transform=Identity())
        y, undo = q.transform.apply(q._entries(x, 0, None)[0], q.coding, torch.tensor(signs))
        return undo.rotation.undo_columns(inner.quantize(y.matrix, seed, range=range).dequantize()).double()

    sample = torch.stack([estimate(seed) for seed in torch.arange(draws).tolist()])
    off = q.mean_error(x, signs or 0, range=range).double()
    error = sample.mean(0) - x.double() - off
    rare = 16 * float((sample - x.double() - off).abs().max()) / draws
    spread = (sample.std(0) / math.sqrt(draws) * 5.5).clamp(min=rare)
    assert bool((error.abs() <= spread + 2e-6 * float(x.abs().max())).all())
    assert float(off.abs().max()) > 0.1  # it does clip
    stated = float(q.variance(x, signs or 0, range=range))
    assert float(sample.var(0).sum()) == pytest.approx(stated, rel=0.05, abs=1e-9)
    assert stated <= float(q.variance_bound(x, signs or 0, range=range)) * (1 + 1e-9)
    both = q.variances(x, [q.bits], signs or 0, range=range)
    assert float(both[0]) == pytest.approx(stated, rel=1e-12)


@pytest.mark.parametrize("name", ["hind8", "hind5d", "kim4"])
def test_the_mean_error_in_closed_form(name: str) -> None:
    """clip(x) − x, on the range and not on the levels; nothing elsewhere, and the count is of those entries."""
    q, x = quantizer(name), torch.linspace(-2, 3, 101)
    low, high = (-1.8, 1.8) if name == "kim4" else (-1.0, 2.0)
    range = state_of(q, -0.6, 0.6) if name == "kim4" else state_of(q, low, high)
    outside = (x < low - 1e-6) | (x > high + 1e-6)
    assert torch.allclose(q.mean_error(x, range=range), x.clamp(low, high) - x, atol=1e-6)
    assert not q.mean_error(x, range=range)[~outside].abs().gt(1e-6).any()
    seen = q.quantize_measuring(x, range, 1)[1]
    assert seen.counts.tolist() == [1, 101, int(outside.sum())]


def test_zero_mode_clips_beyond_its_levels_which_reach_further_than_the_range() -> None:
    range = state_of(ZERO, -1.0, 2.0)
    inside = ZERO.quantize(torch.tensor([-1.0, 2.0]), 1, range=range)
    ends = [float(inside.offset), float(inside.offset + 255 * inside.step)]
    assert ends[0] <= -1 < 2 <= ends[1]
    assert ends != [-1.0, 2.0]
    x = torch.tensor([ends[0], ends[1], 0.0, -1.1, 2.2])
    seen = ZERO.quantize_measuring(x, range, 1)[1]
    assert seen.counts.tolist() == [1, 5, 2]
    assert ZERO.mean_error(x, range=range)[:3].tolist() == [0, 0, 0]


def test_hindsight_learns_the_decayed_mean_of_ranges() -> None:
    """lo ← 0.9·lo + 0.1·min, from the first tensor's own range on; used before it is learned."""
    q, state, wanted = quantizer("hind8"), RangeState.empty(), None
    clipped = 0
    for t in range(6):
        x = gaussian(40, 30, t) * 1.3**t + 0.1
        used = wanted
        found, seen = q.quantize_measuring(x, state, t)
        state = q.learned(state, seen)
        own = (float(x.min()), float(x.max()))
        if used is None:
            used = wanted = own
        else:
            wanted = tuple(0.9 * w + 0.1 * o for w, o in zip(used, own, strict=True))
        assert float(found.offset) == pytest.approx(used[0], rel=1e-6)
        assert float(found.step) == pytest.approx((used[1] - used[0]) / 255, rel=1e-6)
        clipped += int(((x < used[0]) | (x > used[1])).sum())
        assert state.bounds.tolist() == pytest.approx(wanted, rel=1e-12)
    assert state.counts.tolist() == [6, 7200, clipped]
    assert clipped > 100
    assert float(state.clipped_share) == clipped / 7200


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_steered_follows_the_released_rule(bits: int) -> None:
    """The first γ by the walk down from 1, step by step; then one step per tensor by the sign."""
    q, state, aim = quantizer("kim", bits=bits), RangeState.empty(), 1e-3 / (2**bits - 1)
    gamma, turns = None, set()
    for t in range(12):
        scale = 3.0 if t == 6 else 1.0  # magnitudes alone change nothing
        x = (gaussian(299, 200, t) * torch.rand(299, 1, generator=torch.Generator().manual_seed(t)) ** t) * scale
        found, seen = q.quantize_measuring(x, state, t)
        state = q.learned(state, seen)
        size, parts = x.abs().double(), float(x.abs().max())
        used = 1.0 if gamma is None else gamma
        assert float(found.step) == pytest.approx(used * parts / (2 ** (bits - 1) - 1), rel=1e-6)
        if gamma is None:
            gamma = 1.0
            while float((size > gamma * parts).double().mean()) <= aim:
                gamma = round(gamma - 1e-3, 3)
            gamma = round(gamma + 1e-3, 3)
        else:
            share = float((size > gamma * parts * (1 + 1e-7)).double().mean())
            turns.add(share > aim)
            gamma = min(max(round(gamma + math.copysign(1e-3, share - aim), 3), 1e-3), 1.0)
        assert state.bounds.tolist() == [-gamma, gamma]
    assert turns == {True, False}
    assert 0 < int(state.clipped) < 0.01 * int(state.entries)


def test_a_share_that_is_aimed_at_is_found() -> None:
    """Steered: after 1500 tensors of one kind, a share near the aim, whatever γ it began with."""
    q = quantizer("kim2")
    states = [state_of(q, -1.0, 1.0), state_of(q, -0.3, 0.3)]
    for t in range(800):
        x = gaussian(1, 3000, t)
        states = [q.learned(s, q.quantize_measuring(x, s, t)[1]) for s in states]
    gammas = [float(s.bounds[1]) for s in states]
    assert gammas[0] == pytest.approx(gammas[1], abs=0.02)
    late = [q.quantize_measuring(gaussian(1, 3000, t), states[0], t)[1].counts for t in range(2000, 2100)]
    assert float(torch.stack(late).sum(0)[2]) / 3e5 == pytest.approx(1e-3 / 3, rel=0.4)


@pytest.mark.parametrize("name", ["hind8", "kim4"])
def test_what_is_not_finite_or_empty_teaches_nothing(name: str) -> None:
    q, x = quantizer(name), gaussian(9, 9)
    state = q.learned(RangeState.empty(), q.quantize_measuring(x, RangeState.empty(), 1)[1])
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[2, 3] = bad
        with pytest.raises(FqtError, match="NaN or Inf"):
            q.quantize(y, 1, range=state)
        found, seen = q.quantize_measuring(y, state, 1, nonfinite="propagate")
        assert bool(found.dequantize().isnan().all())
        again = q.learned(state, seen)
        assert torch.equal(again.packed, state.packed)
        assert torch.equal(q.learned(RangeState.empty(), seen).packed, RangeState.empty().packed)
    seen = q.quantize_measuring(x[:0], state, 1)[1]
    assert torch.equal(q.learned(state, seen).packed, state.packed)


@pytest.mark.parametrize("name", ["hind8", "kim4"])
def test_a_gradient_of_zeros_at_first_does_not_clip_all_that_follow(name: str) -> None:
    """As of a branch whose last factor starts at zero."""
    q, state = quantizer(name), RangeState.empty()
    for x in (torch.zeros(4, 5), torch.zeros(4, 5), gaussian(4, 5)):
        found, seen = q.quantize_measuring(x, state, 1)
        assert int(seen.counts[2]) == 0
        assert torch.isfinite(found.dequantize()).all()
        state = q.learned(state, seen)
    assert float(state.bounds[1]) > 0.1
    zeros = q.quantize_measuring(torch.zeros(4, 5), state, 1)[1]
    kept = 0.9 if name == "hind8" else 1.0  # a zero range counts as any; of no magnitude there are no parts
    assert q.learned(state, zeros).bounds.tolist() == pytest.approx((state.bounds * kept).tolist())


def test_a_state_is_a_value_and_survives_packing() -> None:
    q, x = quantizer("hind8"), gaussian(9, 9)
    empty = RangeState.empty()
    state = q.learned(empty, q.quantize_measuring(x * 1.1, empty, 1)[1])
    assert empty.counts.tolist() == [0, 0, 0]
    kept = state.packed
    copy = RangeState.unpacked(kept)
    assert copy.bounds.tolist() == state.bounds.tolist()
    assert copy.counts.tolist() == state.counts.tolist()
    assert kept.dtype == torch.int64
    q.learned(copy, q.quantize_measuring(x * 9, copy, 2)[1])
    assert torch.equal(copy.packed, kept)
    kept.zero_()
    assert copy.bounds.tolist() == state.bounds.tolist()


@each
def test_a_tensor_of_zeros_is_exact(q: Quantizer) -> None:
    """Whether zero is among the codes of what is remembered or not."""
    zeros = torch.zeros(6, 16)
    range = RangeState(torch.tensor([-0.7, 0.9], dtype=torch.float64), torch.tensor([1, 96, 0]))
    assert not q.quantize(zeros, 3, range=range).dequantize().any()
    assert float(q.variance(zeros, 3, range=range)) == float(q.variance_bound(zeros, 3, range=range)) == 0
    assert not q.mean_error(zeros, 3, range=range).any()


@each
def test_bounds_that_float64_taught_are_cut_at_the_largest_float_of_the_tensor(q: Quantizer) -> None:
    large = gaussian(6, 16).double() * 1e60
    state = q.learned(RangeState.empty(), q.quantize_measuring(large, RangeState.empty(), 1)[1])
    x = gaussian(6, 16)
    assert bool(q.quantize(x, 3, range=state).dequantize().isfinite().all())
    assert math.isfinite(float(q.variance(x, 3, range=state)))
    assert bool(q.quantize(large, 3, range=state).dequantize().isfinite().all())


def test_dtypes_axes_and_factors() -> None:
    for name in ("hind8", "kim4"):
        q, x = quantizer(name), gaussian(12, 20)
        range = narrow(q, x)
        for dtype in (torch.float64, torch.bfloat16):
            found, seen = q.quantize_measuring(x.to(dtype), range, 1)
            assert found.dequantize().dtype == dtype
            assert seen.counts.dtype == torch.int64
        factor = torch.linspace(0.5, 2, 20)
        mine = q.quantize_measuring(x, range, 2, factor=factor)
        whole = q.quantize_measuring(x * factor, range, 2)
        assert torch.equal(mine[0].codes, whole[0].codes)
        assert mine[1].counts.tolist() == whole[1].counts.tolist()


def test_a_certificate_is_exact_where_the_range_covers_and_biased_where_it_clips() -> None:
    """64 draws: a tenth of the range cut off shows at once. An exact one is convicted in a thousandth of cases."""
    for name in ("hind8", "kim8"):
        q = quantizer(name)

        def within(part: float, q: Quantizer = q) -> object:
            return lambda x, seed: q.quantize(x, seed, range=narrow(q, x, part)).dequantize()

        assert certify(name, draws=64).verdict == "exact"
        assert certify(within(0.9), draws=64).verdict == "biased"
        if name == "hind8":
            assert certify(within(1.0), draws=64).verdict == "exact"


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Scale("row", range="hindsight"), "one for the tensor"),
        (lambda: Scale((8, 8), range="hindsight"), "one for the tensor"),
        (lambda: Scale("tensor", range="steered"), "symmetric"),
        (lambda: Scale("tensor", range="yesterday"), "own, hindsight, steered"),
        (lambda: rounded(Identity(), Scale("tensor", range="hindsight"), Integers(8), "best"), "own range"),
        (lambda: Best(candidates=(quantizer("hind8"), quantizer("hind8d"))), "own range"),
        (
            lambda: Quantizer(
                scale=Scale("tensor", "symmetric", store="correctable", range="steered"), rounding="corrected"
            ),
            "own range",
        ),
        (lambda: quantizer("hind8x"), "no best rounding"),
        (lambda: quantizer("kim4d"), "no dithered rounding"),
        (lambda: quantizer("ptq8").quantize(gaussian(2, 2), 1, range=RangeState.empty()), "takes no other"),
        (lambda: quantizer("ptq8").variance(gaussian(2, 2), 1, range=RangeState.empty()), "takes no other"),
        (lambda: quantizer("hind8").quantize(gaussian(2, 2), 0, range=5), "is a RangeState.*not 5"),
        (lambda: quantizer("hind8").variance(gaussian(2, 2), 0, range=(-1, 1)), "is a RangeState"),
        (lambda: quantizer("hind8").quantize_measuring(gaussian(2, 2), None, 0), "is a RangeState"),
        (lambda: quantizer("hind8").learned(RangeState.empty(), gaussian(2, 2)), "second result"),
        (lambda: quantizer("eden4").mean_error(gaussian(2, 2)), "no closed form"),
        (lambda: quantizer("ptq4x").mean_error(gaussian(2, 2)), "no closed form"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(build: object, says: str) -> None:
    with pytest.raises(FqtError, match=says) as error:
        build()  # type: ignore[operator]
    assert "\n" not in str(error.value)


def test_the_mean_error_of_nearest_rounding_is_its_error() -> None:
    for name in ("psq4n", "bhq4n", "luq4n"):
        q, x = quantizer(name), gaussian(12, 10)
        assert torch.allclose(q.mean_error(x), q.quantize(x).dequantize() - x, atol=1e-5)
    assert not quantizer("shq4d").mean_error(gaussian(6, 6)).any()
