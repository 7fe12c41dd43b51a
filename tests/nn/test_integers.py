"""Products on integer codes are the products of the values that the codes stand for.

The same layer with the same seed runs twice: on integer codes, and in float on dequantized codes. What is quantized
is the same (grad_output is given), so the two differ by float rounding only.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import Recipe
from fqt.kernels import integer, low_rank, ops, products, taps
from fqt.kernels.codes import Dither
from fqt.kernels.cpu import fused
from fqt.nn.arithmetic import obstacle
from fqt.nn.layers import linear_map

from .cases import FORWARD, LAYERS, Case, both, converted, gradients, q, simulate

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
RECIPES = {
    "ptq8": Recipe(grad_input="ptq8", grad_weight="ptq8"),
    "psq4": Recipe(grad_input="psq4", grad_weight="psq4@channel"),
    "dithered": Recipe(grad_input="psq4d", grad_weight="psq8d@channel"),
    "tensor_dither": Recipe(grad_input="ptq4d", grad_weight="ptq8d"),
    "best": Recipe(grad_input="shq8x", grad_weight="psq8x@channel"),
    "bhq": Recipe(grad_input="bhq4", grad_weight="bhq8d@channel"),
    "shq": Recipe(grad_input="shq4d", grad_weight="shq4@channel"),
    "default": fqt.nn.load_recipe("default"),
    "folded_rows": Recipe(
        input=FORWARD["rows"].input, weight="psq8", grad_input="psq4", grad_weight="psq4d@channel", fold="always"
    ),
    "folded_mixed": Recipe(input="psq8", grad_input="psq8", grad_weight="shq8x@channel", fold="always"),
    "folded_samples": Recipe(
        input=q("row", "zero", "sample", rounding="nearest"), grad_input="psq8", grad_weight="ptq4d", fold="always"
    ),
    "folded_symmetric": Recipe(
        input=q("row", "symmetric", rounding="nearest"),
        grad_input="psq8",
        grad_weight="psq4@channel",
        fold="always",
    ),
    "nearest": Recipe(grad_input="psq8n", grad_weight="ptq8n"),
}
LARGE = {
    "linear": (nn.Linear(96, 70), (50, 96)),
    "linear_tokens": (nn.Linear(64, 130), (3, 40, 64)),
    "conv2d": (nn.Conv2d(16, 70, 3, padding=1), (6, 16, 12, 12)),
    "conv2d_grouped": (nn.Conv2d(64, 128, 3, padding=1, groups=2), (4, 64, 8, 8)),
    "conv2d_strided": (nn.Conv2d(20, 24, 3, stride=2, padding=1, bias=False), (5, 20, 13, 11)),
    "conv1d": (nn.Conv1d(12, 33, 5, padding=2), (4, 12, 37)),
    "conv2d_depthwise": (nn.Conv2d(40, 40, 3, padding=1, groups=40), (3, 40, 9, 11)),
    "conv2d_narrow": (nn.Conv2d(32, 48, 3, stride=2, padding=1, groups=8), (3, 32, 9, 9)),
    "transposed": (nn.ConvTranspose2d(20, 24, 4, stride=2, padding=1), (3, 20, 6, 5)),
    "transposed_narrow": (nn.ConvTranspose1d(24, 48, 3, stride=3, output_padding=2, groups=6), (3, 24, 11)),
    "conv3d": (nn.Conv3d(9, 10, 3, stride=(2, 1, 1), padding=1), (2, 9, 5, 6, 7)),
}
TOLERANCE = 2e-5  # of the largest entry: the corrections cancel most of the first term, rounded to 2⁻²⁴ of itself


def check(module: nn.Module, x: Tensor, patch: pytest.MonkeyPatch) -> None:
    for mine, truth in both(module, x, patch):
        assert mine.dtype == truth.dtype
        error = (mine - truth).abs().max()
        assert error <= TOLERANCE * truth.abs().max(), f"{error:.3g} of {truth.abs().max():.3g}"


def runs(module: nn.Module) -> set[str]:
    """The products that have no obstacle."""
    map, recipe = linear_map(module), module.fqt_recipe
    return {name for name in ("output", "grad_input", "grad_weight") if not obstacle(name, map, recipe)}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_small_layers(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(converted(case, RECIPES[name], torch.float32), case.input(torch.float32), monkeypatch)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", LARGE)
def test_layers_of_more_than_one_tile(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LARGE[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3
    try:
        check(fqt.quantize_(layer, RECIPES[name]), x, monkeypatch)
        check(layer, x.relu(), monkeypatch)  # no offset: a correction is left out
    finally:
        fqt.restore_(layer)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d"])
def test_all_three_products_run_on_integers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LARGE[kind]
    seen = []
    for name in ("output", "grad_input", "grad_weight"):
        real = getattr(integer, name)
        monkeypatch.setattr(integer, name, lambda *a, real=real, name=name: seen.append(name) or real(*a))
    for recipe in ("psq8", "psq8d", "bhq8", "shq8", "default"):
        seen.clear()
        try:
            gradients(fqt.quantize_(layer, recipe), torch.randn(shape))
            assert runs(layer) == {"output", "grad_input", "grad_weight"}
        finally:
            fqt.restore_(layer)
        assert seen == ["output", "grad_input", "grad_weight"]


@pytest.mark.parametrize("kind", ["conv2d_depthwise", "conv2d_narrow", "transposed", "transposed_narrow", "conv3d"])
@pytest.mark.parametrize("recipe", ["psq8", "psq8d", "default"])
def test_what_is_made_of_other_products_runs_on_integers_too(kind: str, recipe: str) -> None:
    layer, shape = LARGE[kind]
    try:
        explained = fqt.explain(fqt.quantize_(layer, recipe), torch.randn(shape, requires_grad=True))
        assert runs(layer) == {"output", "grad_input", "grad_weight"}
    finally:
        fqt.restore_(layer)
    wanted = "simulated" if integer.machine_obstacle("cpu") else "integer"
    assert {row.arithmetic for row in explained.products} == {wanted}


def test_what_cannot_run_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> Tensor:
        raise AssertionError("an integer product with an obstacle")

    cases = {
        "output": (nn.Conv2d(2, 3, 3), Recipe(input="psq8@token", grad_input="psq8", grad_weight="ptq8")),
        "grad_input": (
            nn.Conv2d(2, 3, 3),
            Recipe(weight="psq8", grad_input="psq8", grad_weight="ptq8", fold="auto"),
        ),
        "grad_weight": (nn.Linear(4, 3), Recipe(grad_input="psq8", grad_weight="psq8@token")),
    }
    for product, (layer, recipe) in cases.items():
        fqt.quantize_(layer, recipe)
        assert product not in runs(layer)
        with monkeypatch.context() as context:
            context.setattr(integer, product, fail)
            gradients(layer, torch.randn(4, 2, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(5, 4))
    with monkeypatch.context() as context:
        context.setattr(integer, "output", fail)
        fqt.quantize_(nn.Linear(4, 3).double(), "psq8")(torch.randn(5, 4, dtype=torch.float64))


def ones_mask(weight: Tensor, input_size: tuple[int, int], geometry: object, of: str) -> Tensor:
    size = geometry.output_size(input_size, weight.shape[2:]) if of == "output" else input_size  # type: ignore[attr-defined]
    return weight.float().sum((2, 3)).sum(1 if of == "output" else 0).expand(*size, -1).contiguous()


DEFECTS = {
    "border": (products, "conv2d_mask", ones_mask, "psq4"),
    "taps": (taps.Taps, "sums", lambda self, map: map.double().sum((0, 1)).expand(9, -1), "psq4"),
    "dither": (low_rank, "from_bytes", lambda sums: sums[0].double() * 0, "dithered"),
    "centre": (Dither, "centre", 0.0, "dithered"),
    "row sums": (
        ops,
        "column_sums",
        lambda c, w=None: (c.long().sum(0) * 0, None if w is None else c.long().sum(0)),
        "psq4",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_wrong_correction_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, attribute, broken, recipe = DEFECTS[name]
    case = next(c for c in LAYERS if c.name == "conv2d")
    module, x = converted(case, RECIPES[recipe], torch.float32), case.input(torch.float32)
    torch.manual_seed(5)
    with monkeypatch.context() as context:
        simulate(context)
        truth = gradients(module, x)
    torch.manual_seed(5)
    monkeypatch.setattr(place, attribute, broken)
    for product in ("output", "grad_input", "grad_weight"):
        monkeypatch.setattr(fused, product, lambda *_: None)
    found = gradients(module, x)
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, truth, strict=True)]
    assert max(apart) > 100 * TOLERANCE


def test_more_rows_than_a_32_bit_sum_of_codes() -> None:
    """8.5 million rows of code 255: the input's sum of codes passes 2³¹."""
    torch.manual_seed(0)
    layer, x = nn.Linear(1, 1, bias=False), torch.ones(8_500_000, 1)
    x[:1000] = 0
    upstream = torch.randn_like(x) + 0.3
    fqt.quantize_(layer, "psq8")(x).backward(upstream)
    assert float(layer.weight.grad) == pytest.approx(float((upstream * x).sum(dtype=torch.float64)), rel=1e-3)


def test_a_long_line_takes_memory_in_proportion() -> None:
    """Which pixels a tap reads, along one axis of 200,000: a square table would be 40 GB."""
    reads, serves = taps._met_on((9, 200_000, 199_992, 1, 0, 1), torch.device("cpu"))
    assert reads.shape == (9, 200_000)
    assert (reads[3].nonzero().flatten() == torch.arange(3, 199_995)).all()
    assert serves.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In and out in the short dtype, rounded once; the weight's gradient in float32."""
    layer, shape = LARGE[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    fqt.quantize_(layer, "default")
    try:
        with torch.autocast("cpu", dtype):
            pairs = list(both(layer, x, monkeypatch))
    finally:
        fqt.restore_(layer)
    assert [mine.dtype for mine, _ in pairs] == [dtype, dtype, torch.float32, torch.float32]
    for mine, truth in pairs:
        # An entry beside a rounding boundary may fall on either side of it.
        unit = torch.finfo(mine.dtype).eps if mine.dtype == dtype else 0.0
        error = (mine.float() - truth.float()).abs()
        assert bool((error <= unit * truth.float().abs() + TOLERANCE * truth.float().abs().max()).all())
        assert float((error > TOLERANCE * truth.float().abs().max()).float().mean()) < 0.01


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_torchs(channels_last: bool) -> None:
    x = torch.randn(2, 3, 6, 5)
    layer = nn.Conv2d(3, 4, 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    plain = layer(x)
    quantized = fqt.quantize_(layer, "psq8")(x.requires_grad_())
    assert quantized.stride() == plain.stride()
    quantized.backward(torch.randn_like(quantized))
    assert x.grad is not None
    assert x.grad.shape == x.shape
