"""Verification lets the right ones pass and catches planted wrong ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fqt
from fqt.bench import integers
from fqt.bench.contestants import Contestant, Runner, contestants, noiseless, slack
from fqt.bench.integers import IntegerProduct, best_product, whose
from fqt.bench.kept import Kept, kept_bytes
from fqt.bench.measure import _check
from fqt.bench.quantizing import Copy, Quantization, draw_all
from fqt.bench.verify import MOST_BIAS, Verification, bias, check_bias, relative_error
from fqt.errors import FqtError

from .conftest import BLOCKS, CONV, IMAGES, LINEAR, MATRIX

OURS = {c.name: c for recipe in ("psq8", "psq8d", "default", "shq8") for c in contestants([recipe])}


def verdict(case, contestant, change=lambda runner: None):
    reference = Runner(contestants([])[0], case.workload).outcome()
    runner = Runner(contestant, case.workload)
    change(runner)
    return _check(runner, reference, case, seeds=4)


@pytest.mark.parametrize("name", ["bf16", "psq8", "psq8 bf16", "psq8d", "default", "shq8"])
@pytest.mark.parametrize("case", [LINEAR, CONV, BLOCKS, IMAGES], ids=lambda c: c.name)
def test_the_right_pass(case, name):
    found = verdict(case, OURS[name])
    assert found.problem == ""
    assert found.error > 0
    if name not in ("bf16",):
        assert found.bias is None or 0.3 < found.bias <= MOST_BIAS


def wrong_gradient(runner):
    """One of 48 output channels loses its weight gradient."""
    weight = runner.plain.weight
    weight.register_hook(lambda g: torch.cat([g[:-1], torch.zeros_like(g[-1:])]))


def wrong_output(runner):
    runner.plain.register_forward_hook(lambda module, args, out: out * 1.2)


def wrong_sign(runner):
    next(p for p in runner.plain.parameters() if p.ndim > 1).register_hook(lambda g: -g)


def biased(runner):
    """Every weight gradient is 3 % too large: well inside 8 bits' error."""
    runner.plain.weight.register_hook(lambda g: g * 1.03)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (LINEAR, wrong_gradient, "grad weight is"),
        (LINEAR, wrong_output, "output is"),
        (BLOCKS, wrong_sign, "off fp32"),
        (IMAGES, wrong_sign, "off fp32"),
        (LINEAR, biased, "grad weight is biased"),
    ],
)
@pytest.mark.parametrize("name", ["psq8", "psq8 bf16"])
def test_the_wrong_are_caught(case, change, message, name):
    assert message in verdict(case, OURS[name], change).problem


@pytest.mark.parametrize("recipe", ["shq4d", "int4all", "psq2"])
@pytest.mark.parametrize("case", [CONV, BLOCKS, IMAGES], ids=lambda c: c.name)
def test_few_bits_pass_in_every_case(case, recipe):
    assert verdict(case, next(each for each in contestants([recipe]) if each.name == recipe)).problem == ""


@pytest.mark.parametrize("recipe", ["shq4d", "int4all", "psq2", "luq4", "e5m2", "int4"])
def test_few_bits_are_no_defect(recipe):
    """Errors are as much larger as the quantizers'; what is lost, negated or no number is still found.

    `int4` keeps a sample of a gradient's rows, whose error has no bound: one lost channel is below its noise.
    """
    contestant = next(each for each in contestants([recipe]) if each.name == recipe)
    assert verdict(LINEAR, contestant).problem == ""
    found = verdict(LINEAR, contestant, wrong_gradient).problem
    assert "grad weight is" in found or recipe == "int4"
    assert "grad weight is" in verdict(LINEAR, contestant, wrong_sign).problem
    assert "grad bias is 2 off" in verdict(LINEAR, contestant, negated("bias")).problem
    assert "grad weight is inf off" in verdict(LINEAR, contestant, not_a_number("weight")).problem
    assert "grad bias is inf off" in verdict(LINEAR, contestant, not_a_number("bias")).problem


def test_an_output_of_few_bits_may_err_and_not_be_another():
    recipe = fqt.nn.Recipe("psq8", input="ptq2", weight="psq2@channel")
    contestant = replace(OURS["psq8"], convert=lambda model: fqt.quantize_(model, recipe), slack=slack(recipe))
    assert verdict(LINEAR, contestant).problem.partition(" is ")[0] != "output"

    def negated_output(runner):
        runner.plain.register_forward_hook(lambda module, args, out: out - 2 * out.detach())

    assert "output is" in verdict(LINEAR, contestant, negated_output).problem


def negated(name):
    return lambda runner: getattr(runner.plain, name).register_hook(lambda g: -g)


def not_a_number(name):
    return lambda runner: getattr(runner.plain, name).register_hook(lambda g: torch.full_like(g, math.nan))


def test_a_bias_that_is_no_number_is_found():
    exact = {"grad a": torch.ones(64, 64), "grad b": torch.ones(64, 64)}
    noisy = [{"grad a": torch.ones(64, 64), "grad b": torch.full((64, 64), math.nan)}] * 2
    assert "grad b is biased" in check_bias(Verification(0.0), noisy, exact, 0.0).problem


def test_eight_bits_have_the_case_s_bound():
    for name in ("psq8", "psq8d", "default", "shq8", "thq8d"):
        assert set(slack(fqt.nn.load_recipe(name)).values()) == {1.0}
    found = slack(fqt.nn.load_recipe("psq2"))  # in grad_input alone
    assert found["output"] == found["grad_weight"] == 1
    assert 16 < found["grad_input"] < 128
    assert all(4 < value < 16 for value in slack(fqt.nn.load_recipe("int4all")).values())
    assert slack(fqt.nn.load_recipe("hlq_sampled"))["grad_weight"] == math.inf


def test_rounding_to_nearest_is_caught():
    """Its error is smaller than stochastic rounding's: only the bias tells."""
    nearest = Contestant(
        name="nearest", group="ours", recipe="psq4", convert=lambda model: fqt.quantize_(model, "psq4n")
    )
    case = replace(LINEAR, bound=0.5)
    assert "biased" in verdict(case, nearest).problem
    assert verdict(case, replace(nearest, convert=lambda model: fqt.quantize_(model, "psq4"))).problem == ""


def test_a_wrong_shape_or_a_missing_gradient():
    want = {"output": torch.ones(3, 4)}
    assert relative_error(torch.ones(4, 3), want["output"], by_row=True) == math.inf
    assert relative_error(torch.full((3, 4), torch.nan), want["output"], by_row=True) == math.inf

    def detached(runner):
        weight, bias = runner.plain.weight.detach(), runner.plain.bias
        runner.model = lambda x: torch.nn.functional.linear(x, weight, bias)

    with pytest.raises(RuntimeError, match="no gradient came back: grad weight"):
        verdict(LINEAR, OURS["psq8"], detached)


def test_one_wrong_row_of_many():
    want = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    got = want.clone()
    got[17] = 0
    assert relative_error(got, want, by_row=True) == pytest.approx(1.0, abs=0.3)
    assert relative_error(got, want, by_row=False) < 0.03  # what one number for all would have said


def test_bias_is_in_standard_errors():
    """Entries: 20,000; 4 draws. The statistic is 1 ± 0.01, and √(1 + 4·shift²/σ²) with a shift."""
    generator = torch.Generator().manual_seed(0)
    exact = {"output": torch.zeros(1), "grad": torch.zeros(20_000), "small": torch.zeros(8)}
    for shift in (0.0, 1.0):
        draws = [
            {name: shift + torch.randn(x.shape, generator=generator) for name, x in exact.items()} for _ in range(4)
        ]
        found = bias(iter(draws), exact, 0.0)
        assert list(found) == ["grad"]
        assert found["grad"] == pytest.approx(math.sqrt(1 + 4 * shift**2), rel=0.04)


def test_noiseless_is_the_expectation_with_rules_too():
    recipe = fqt.Recipe(grad_input="psq8", grad_weight="ptq8", rules=(fqt.Rule("0.qkv", "psq4"),))
    ours = replace(OURS["psq8"], recipe=recipe, convert=lambda model: fqt.quantize_(model, recipe))
    quiet = Runner(noiseless(ours), BLOCKS.workload)
    a, b = quiet.outcome(1), quiet.outcome(2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(a["output"], Runner(ours, BLOCKS.workload).outcome()["output"])


def offset_by_a_step(quantized):
    scales = quantized.scales
    return replace(quantized, scales=replace(scales, offset=scales.step))


def test_the_quantizer(monkeypatch):
    sources = draw_all(replace(MATRIX.workload, matrices=3))
    assert not torch.equal(sources[0], sources[1])
    for recipe in ("psq8", "psq8d", "bhq8", "shq4"):
        found = Quantization(sources, recipe).verify(4)
        assert found.problem == ""
        assert found.bias == pytest.approx(1, abs=0.1)
    with pytest.raises(FqtError, match="quantizes no gradient"):
        Quantization(sources, "qat")
    quantization = Quantization(sources, "psq8")
    right = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", lambda seed: right(0), raising=False)
    assert "biased" in quantization.verify(4).problem  # the same noise each time does not average out
    wrong = Quantization(sources, "psq8")
    monkeypatch.setattr(wrong, "quantize", lambda seed: offset_by_a_step(right(seed)), raising=False)
    assert "squared error" in wrong.verify(4).problem
    copy = Copy(sources)
    assert copy.verify().problem == ""
    for call in (copy, quantization):
        for _ in sources:
            call()
    assert all(torch.equal(target, source) for target, source in zip(copy.targets, sources, strict=True))
    assert copy.bytes == 2 * 4 * 64 * 256
    assert quantization.bytes == 64 * 256 * 5 + 64 * 8


def test_the_integer_limit(monkeypatch):
    product, tried = best_product([(32, 48, 64), (64, 64, 64)])
    assert len(tried) == 4
    assert product.macs / 64 in (32 * 48, 64 * 64)
    assert all(row["macs_per_second"] > 0 for row in tried)
    for transposed in (False, True):
        assert IntegerProduct((32, 48, 64), transposed).is_right()
        assert IntegerProduct((32, 48, 64), transposed, by=integers.OURS).is_right()
    right = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b) + 1)
    assert not product.is_right()


def test_whose_product_is_the_limit(monkeypatch):
    """Ours where torch's is a scalar loop, as it is without VNNI; torch's where the two are alike."""
    right = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", integers.matmul)
    assert whose() == integers.TORCH
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: [right(a, b) for _ in range(200)][-1])
    assert whose() == integers.OURS
    product, tried = best_product([(32, 48, 64)])
    assert (product.by, len(tried)) == (integers.OURS, 2)


def test_a_wrong_product_of_torch_is_no_limit(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: integers.matmul(a, b) + 1)
    assert whose() == integers.OURS


def test_bytes_kept():
    rows, inputs = LINEAR.workload.input
    by_name = {name: kept_bytes(Runner(c, LINEAR.workload)) for name, c in OURS.items() if not c.compiled}
    assert by_name["fp32"] == Kept(4 * rows * inputs, 4 * rows * inputs)
    assert by_name["bf16"].layers == 2 * rows * inputs  # the cast of the weight is left out
    assert by_name["psq8"].layers == by_name["psq8 bf16"].layers == rows * inputs
    whole = kept_bytes(Runner(contestants([])[0], IMAGES.workload))
    x = 8 * 3 * 16 * 16, 8 * 16 * 16 * 16, 8 * 32 * 8 * 8, 8 * 128
    assert whole.layers == 4 * (x[0] + x[1] + x[2] + x[3])
    assert whole.total > whole.layers
    assert isinstance(Runner(contestants([])[0], IMAGES.workload).plain.classifier, nn.Linear)


def test_bytes_kept_beside_a_weight_that_wraps_others():
    """Such a subclass, as other libraries quantize weights by, has no storage to be counted."""

    def convert(model):
        model.weight = nn.Parameter(TwoTensor(model.weight.detach(), model.weight.detach().clone()))
        return model

    wrapped = Contestant(name="wrapped", group="torchao", convert=convert)
    rows, inputs = LINEAR.workload.input
    assert kept_bytes(Runner(wrapped, LINEAR.workload)).total == 4 * rows * inputs
