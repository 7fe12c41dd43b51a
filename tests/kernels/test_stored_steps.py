"""Steps as short formats store them: a power of two or an E4M3 number, never so small that a value is clipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.codes import Blocks, Levels
from fqt.kernels.rounding import STOCHASTIC, Coding
from fqt.kernels.steps import STORES, stored_step

HIGHEST = [7, 12, 64, 127, 1]
E4M3 = torch.float8_e4m3fn
by_steps = pytest.mark.parametrize("steps", HIGHEST)


def magnitudes(decades: float, seed: int = 0) -> Tensor:
    """4000 positive numbers over so many factors of e either way, and those beside powers of two."""
    g = torch.Generator().manual_seed(seed)
    x = torch.exp(decades * torch.randn(4000, generator=g))
    return torch.cat([x, beside(torch.exp2(torch.arange(-8, 9).float()))])


def beside(x: Tensor) -> Tensor:
    """Each number and its two neighbours."""
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return torch.cat([x, torch.nextafter(x, up), torch.nextafter(x, down)])


@by_steps
def test_power_is_the_least_that_does_not_clip(steps: int) -> None:
    """Exactly, in float64, also where the quotient is beside a power of two."""
    x = torch.cat([magnitudes(8), beside(steps * torch.exp2(torch.arange(-100, 100).float()))])
    step = stored_step(-x, x / 2, steps, "power").double()
    assert torch.equal(step.log2(), step.log2().round())
    assert (step * steps >= x.double()).all()
    assert (step / 2 * steps < x.double()).all()


@by_steps
def test_power_at_the_ends_of_the_floats(steps: int) -> None:
    tiny = stored_step(torch.zeros(2), torch.tensor([1e-45, 1e-38]), steps, "power")
    assert (tiny >= 2.0**-126).all()
    assert torch.isfinite(tiny).all()
    largest = torch.tensor([2.0**127])
    assert float(stored_step(-largest, largest, steps, "power")) >= 2.0**127 / steps


@by_steps
@pytest.mark.parametrize("decades", [0.5, 3, 8])
def test_e4m3_never_clips(decades: float, steps: int) -> None:
    """Down into E4M3's subnormal range, 2⁻¹⁵ of the largest block and less; to the rounding of float32."""
    x = magnitudes(decades)
    step = stored_step(-x, x / 3, steps, "e4m3").double()
    assert (step * steps >= x.double() * (1 - 2.0**-22)).all()


def parts(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """What is cast to E4M3, and the float32 that is common to the tensor."""
    common = x.amax() / (448 * steps * (16 / 17))
    return x / (steps * (16 / 17)) / common, common


@by_steps
def test_e4m3_is_torchs_cast_where_that_does_not_clip(steps: int) -> None:
    x = magnitudes(5)
    wanted, common = parts(x, steps)
    cast = wanted.to(E4M3).float()
    step = stored_step(x * 0, x, steps, "e4m3")
    holds = cast * common * steps >= x
    subnormal = (wanted >= 2.0**-9) & (wanted < 2.0**-6)
    assert holds[wanted >= 2.0**-6].double().mean() > 0.999  # that is what the head-room is for; else by a last bit
    assert 0.2 < float(holds[subnormal].double().mean()) < 0.9
    assert torch.equal(step[holds], (cast * common)[holds])


@by_steps
def test_e4m3_elsewhere_is_the_next_number(steps: int) -> None:
    x = magnitudes(5)
    wanted, common = parts(x, steps)
    cast = wanted.to(E4M3)
    clips = cast.float() * common * steps < x
    next_up = (cast.view(torch.uint8) + 1).view(E4M3).float()  # of positive numbers the bits are in order
    assert torch.equal(stored_step(x * 0, x, steps, "e4m3")[clips], (next_up * common)[clips])


@by_steps
def test_shift_is_the_furthest_that_does_not_clip(steps: int) -> None:
    x = torch.cat([magnitudes(3), beside(8 * torch.exp2(-torch.arange(14).float()))])
    step = stored_step(-x, x, steps, "shift").double()
    shift = (step.amax() / step).log2()
    assert torch.equal(shift, shift.round())
    assert float(shift.amax()) == 15
    clips = x.double() > x.amax().double() * torch.exp2(-shift - 1)
    assert (x.double() <= x.amax().double() * torch.exp2(-shift)).all()
    assert (clips | (shift == 15)).all()


@pytest.mark.parametrize("each", [2, 4, 8])
def test_fallback_gives_a_quarter_of_the_blocks_their_second_code(each: int) -> None:
    x, c = magnitudes(2), 2 ** (each - 1) - 1
    step = stored_step(-x, x, c * (2 * c + 1), "fallback")
    two = x.argsort(descending=True, stable=True)[: -(-x.numel() // 4)]
    wanted = (x / (c * (2 * c + 1))).index_fill(0, two, 0) * (2 * c + 1)
    wanted[two] = x[two] / (c * (2 * c + 1))
    assert torch.equal(step, wanted)


@by_steps
def test_correctable_leaves_room_above_and_clips_a_little(steps: int) -> None:
    """At most 256 of E4M3's 448, for a correction of up to 1.75; no value is far beyond the last level."""
    x = magnitudes(1)
    step = stored_step(-x, x, steps, "correctable").double()
    largest = x.amax().double() / (256 * steps * 16 / 17 / 0.93)
    assert float(step.amax()) <= 256 * float(largest) * (1 + 1e-6)
    over = x.double() / (step * steps)
    assert 1.0 < float(over.amax()) < 1.08 * 17 / 16
    assert stored_step(x[:1] * 0 - 1e-9, x[:2].sum().view(1), steps, "correctable").item() > 0


STORED = [name for name in STORES if name not in ("float32", "fallback")]


@pytest.mark.parametrize("store", STORED)
def test_zeros_and_values_that_are_not_finite(store: str) -> None:
    lo, hi = torch.tensor([[0.0, -1.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 2.0, torch.nan, 1.0]])
    step = stored_step(lo, hi, 7, store)
    alone = store == "power"  # each step is one of its own
    assert torch.isnan(step).tolist() == ([[False, False, True, True]] if alone else [[True] * 4])
    clean = stored_step(lo[:, :2], hi[:, :2], 7, store)
    assert float(clean[0, 0]) == 0
    assert float(clean[0, 1]) >= 2 / 7 * (0.9 if store == "correctable" else 1)
    assert stored_step(lo[:, :0], hi[:, :0], 7, store).shape == (1, 0)
    assert not stored_step(torch.zeros(3), torch.zeros(3), 7, store).any()


def test_double_steps_stay_double() -> None:
    x = magnitudes(3).double()
    for store in STORED:
        assert stored_step(-x, x, 12, store).dtype == torch.float64


def test_scales_have_the_stored_step_and_no_offset() -> None:
    lo, hi = torch.tensor([[-1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    for store in STORED:
        coding = Coding("symmetric", Levels(-12, 12, 1), STOCHASTIC, store)
        scales = ops.scales_of(lo, hi, coding, Blocks(1, 16))
        assert torch.equal(scales.step, stored_step(lo, hi, 12, store))
        assert not scales.offset.any()
