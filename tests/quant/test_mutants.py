"""Every check fails on a planted defect, and passes on a control that plants none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from . import checks, mutants
from .cases import FAMILIES, build


def _b(name: str, family: str = "gaussian") -> Callable[[], None]:
    return lambda: checks.check_b_unbiased(build(name, guard=False), FAMILIES[family](8, 5, 1))


def _c(method: str) -> Callable[[], None]:
    return lambda: checks.check_c_no_clipping(method, 4, FAMILIES["heavy_rows"](16, 12, 5))


def _h() -> None:
    checks.check_h_grouping(torch.rand(37, generator=torch.Generator().manual_seed(0)) * 1e-2)


CAUGHT = {
    "A biased_up": (mutants.biased_up, lambda: checks.check_a_rounding(4)),
    "A nearest": (mutants.nearest, lambda: checks.check_a_rounding(4)),
    "A always_up": (mutants.always_up, lambda: checks.check_a_rounding(4)),
    "A noise_too_narrow": (mutants.noise_too_narrow, lambda: checks.check_a_rounding(4)),
    "B biased_up": (mutants.biased_up, _b("psq4")),
    "B down": (mutants.down, _b("bhq4")),
    "B nearest": (mutants.nearest, _b("ptq5")),
    "B decode_scale_off": (mutants.decode_scale_off, _b("psq4")),
    "B offset_lost": (mutants.offset_lost, _b("shq4")),
    "B step_too_small": (mutants.step_too_small, _b("psq4")),
    "B transform_not_undone bhq": (mutants.transform_not_undone, _b("bhq4", "one_large")),
    "B transform_not_undone shq": (mutants.transform_not_undone, _b("shq4", "one_large")),
    "B dither_not_subtracted": (mutants.dither_not_subtracted, _b("psq4d")),
    "C step_too_small": (mutants.step_too_small, _c("psq")),
    "C step_too_large": (mutants.step_too_large, _c("ptq")),
    "C power_of_two_bins": (mutants.power_of_two_bins, _c("psq")),
    "C transform_not_undone": (mutants.transform_not_undone, _c("shq")),
    "D step_too_large": (mutants.step_too_large, lambda: checks.check_d_ratio("psq", 6)),
    "D power_of_two_bins": (
        mutants.power_of_two_bins,
        lambda: checks.check_d_bound("psq", 4, FAMILIES["gaussian"](16, 8, 2)),
    ),
    "E power_of_two_bins": (mutants.power_of_two_bins, lambda: checks.check_e_bit_law("psq")),
    "F transform_dropped": (mutants.transform_dropped, lambda: checks.check_f_large_row(0.01)),
    "F step_too_large": (mutants.step_too_large, lambda: checks.check_f_large_row(1.0)),
    "F squared_sizes": (mutants.squared_sizes, lambda: checks.check_f_large_row(0.01)),
    "G reflection_too_long": (mutants.reflection_too_long, lambda: checks.check_g_reflection(8, 1e-3)),
    "G transform_dropped": (mutants.transform_dropped, lambda: checks.check_g_reflection(8, 1e-3)),
    "H absolute_epsilon": (mutants.absolute_epsilon, _h),
    "H smallest_is_large": (mutants.smallest_is_large, _h),
    "H squared_sizes": (mutants.squared_sizes, _h),
    "I no_guard bhq": (mutants.no_guard, lambda: checks.check_i_never_worse("bhq")),
    "I no_guard shq": (mutants.no_guard, lambda: checks.check_i_never_worse("shq")),
    "R column_steps_shared": (mutants.column_steps_shared, checks.check_r_same_weight_quantizer),
    "R noise_too_narrow": (mutants.noise_too_narrow, checks.check_r_same_weight_quantizer),
}


@pytest.mark.parametrize("case", CAUGHT)
def test_check_catches(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, check = CAUGHT[case]
    check()
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_checks_pass_on_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants' own encode, with the right rule: what they catch is the defect, not the replacement."""
    mutants.right_rounding(monkeypatch)
    checks.check_a_rounding(4)
    _b("psq4")()
    _b("bhq4")()
    _c("psq")()
    checks.check_r_same_weight_quantizer()
