"""`diagnose` against the slow estimators, brute force, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fqt
from fqt.errors import FqtError
from fqt.nn import GradientOperand, observe
from fqt.quant import METHODS, Leverage
from fqt.report.diagnosis import diagnosis_section, diagnosis_tables
from fqt.seeds import derive_seed
from fqt.stats import quantization_variance, sampling_variance
from fqt.stats.operands import WIDTHS, multiplications, nuclear_norm
from fqt.stats.record import diagnosis_from, diagnosis_record

from .nets import Attention, InARow, Twice, batches, loss, make, mlp


def test_sampling_variance_is_that_of_the_qat_model() -> None:
    found = fqt.diagnose(make(), loss, batches(6), table=0)
    slow = sampling_variance(make(recipe="qat"), loss, batches(6))
    assert found.total.sampling.value == pytest.approx(slow.total.value, rel=1e-6)
    for layer, noise in found.layers.items():
        expected = sum(e.value for name, e in slow.parameters.items() if name.startswith(f"{layer}."))
        assert noise.sampling.value == pytest.approx(expected, rel=1e-6)
    assert 0.2 < found.total.sampling.error / slow.total.error < 5
    assert set(found.layers) == {"0", "1", "3", "5"}
    assert found.total.sampling.value == pytest.approx(sum(n.sampling.value for n in found.layers.values()))


def test_quantization_variance_agrees_with_the_slow_estimator() -> None:
    """|z| < 5 for the difference of two independent estimates, on batch statistics of 16."""
    found = fqt.diagnose(make(), loss, batches(16), draws=3, table=0, seed=1)
    slow = quantization_variance(make(), loss, batches(16), draws=3, seed=2).total
    ours = found.total.quantization
    assert abs(ours.value - slow.value) < 5 * math.hypot(ours.error, slow.error)
    assert found.total.rho.value == pytest.approx(ours.value / found.total.sampling.value)
    assert 0 < found.total.rho.error < found.total.rho.value


def test_the_two_estimators_of_quantization_variance_are_one() -> None:
    """The same draws: they differ by what float32 rounds."""
    for recipe in ("psq8d", "ufp4"):
        model, data = make(recipe=recipe), batches(3)
        ours = fqt.diagnose(model, loss, data, draws=3, table=0, seed=1).total.quantization
        slow = quantization_variance(model, loss, data, draws=3, seed=1).total
        assert ours.value == pytest.approx(slow.value, rel=1e-6)
        assert ours.error == pytest.approx(slow.error, rel=1e-5)


def test_columns_stand_below_each_other_whatever_the_names() -> None:
    found = fqt.diagnose(make(), loss, batches(3))
    long = lambda named: {f"encoder.block.{name}.projection.dense": value for name, value in named.items()}
    lines = str(dataclasses.replace(found, layers=long(found.layers))).splitlines()
    assert len({len(line.removesuffix("  ‖g‖ < √3·noise")) for line in lines}) == 1
    planned = fqt.plan(found, mean_width=4)
    lines = str(dataclasses.replace(planned, widths=long(planned.widths))).splitlines()[:-1]
    assert len({len(line) for line in lines}) == 1


def test_right_operands_that_are_quantized_again_are_said() -> None:
    found = fqt.diagnose(make(recipe="ufp4"), loss, batches(2), table=0)
    products = [f"{layer} {role}" for layer in ("0", "3", "5") for role in ("grad_input", "grad_weight")]
    assert list(found.again) == products
    assert str(found).endswith(", ".join(products))
    record = json.loads(json.dumps(diagnosis_record(found)))
    assert diagnosis_from(record).again == found.again
    assert "5 grad_weight" in diagnosis_tables(record)[1].note
    nearest = fqt.Recipe(grad_input="psq4", grad_weight=fqt.Product("psq4", "ptq8n"))
    for recipe in ("psq4", nearest):  # what draws nothing adds no noise
        assert fqt.diagnose(make(recipe=recipe), loss, batches(2), table=0).again == ()


@pytest.mark.parametrize("left", [None, "psq4"])
@pytest.mark.parametrize("role", ["grad_input", "grad_weight"])
def test_rows_that_are_kept_are_refused_whatever_is_quantized(role: str, left: str | None) -> None:
    recipe = fqt.Recipe(**{"grad_input": "psq4", role: fqt.Product(left, keep=Leverage(0.5))})
    with pytest.raises(FqtError, match=f"layer '0' keeps a part of grad_output's rows in {role}") as error:
        fqt.diagnose(make(recipe=recipe), loss, batches(2))
    assert "quantization_variance" in str(error.value)
    assert quantization_variance(make(recipe=recipe), loss, batches(2), draws=2).total.value > 0


ONE_WIDTH = [m.shown[0] for m in METHODS.values() if len(fqt.quantizer(m.shown[0]).grid.widths) == 1]


@pytest.mark.parametrize("name", ONE_WIDTH)
def test_grids_of_one_width_are_measured_at_it(name: str) -> None:
    """The exact variance, the codes that there are, a record and its page; a plan says that there is none."""
    found = fqt.diagnose(make(recipe=fqt.Recipe(grad_input=name, grad_weight="psq4")), loss, batches(2))
    q = fqt.quantizer(name)
    for operand in found.operands:
        widths = [q.bits] if operand.role == "grad_input" else [*WIDTHS]
        assert list(operand.variance) == list(operand.bound) == widths
        assert sum(operand.histogram) == math.prod(operand.shape)
        codes = len(operand.quantizer.grid.levels(operand.quantizer.scale.mode).numbers)
        assert len(operand.histogram) == (codes if codes <= 256 else -(-codes // -(-codes // 256)))
    assert found.table is not None
    assert list(found.table.operands["3"]["grad_input"]) == [q.bits]
    record = json.loads(json.dumps(diagnosis_record(found)))
    assert diagnosis_from(record).operands == found.operands
    assert diagnosis_section("it", record).charts
    with pytest.raises(FqtError, match="a grid of one width"):
        fqt.plan(found)


def test_a_plan_leaves_layers_of_one_width_as_they_are() -> None:
    rules = (fqt.Rule("3", fqt.Recipe(grad_input="mxfp4")),)
    found = fqt.diagnose(make(recipe=fqt.Recipe(grad_input="psq4", rules=rules)), loss, batches(3))
    made = fqt.plan(found, mean_width=5)
    assert made.widths["3"] == 4
    assert made.mean_width <= 5
    assert made.widths["5"] > 5
    assert set(made.uniform) == {*WIDTHS}


@pytest.mark.parametrize("name", ["psq4", "ptq3d", "bhq4", "shq4d", "psq4x"])
def test_operand_variances_are_the_quantizers_own(name: str) -> None:
    model, data, expected = make(recipe=name), batches(2), {}
    found = fqt.diagnose(model, loss, data, table=0, seed=3)

    def look(layer: str, operand: fqt.nn.GradientOperand) -> None:
        q, args = operand.quantizer, (operand.gradient, operand.seed)
        values = [q.variance(*args, axis=operand.rows), operand.gradient.double().square().sum()]
        expected.setdefault((layer, operand.role), []).append(torch.stack(values))

    for b, batch in enumerate(data):
        torch.manual_seed(derive_seed(3, b, 0))
        with observe(model, look):
            loss(model, batch).backward()
    assert len(found.operands) == 5  # the first layer's grad_input is not computed
    for operand in found.operands:
        variance, energy = torch.stack(expected[operand.layer, operand.role]).mean(0).tolist()
        assert operand.variance[operand.bits].value == pytest.approx(variance, rel=1e-6)
        assert operand.energy.value == pytest.approx(energy, rel=1e-6)
        assert list(operand.variance) == list(operand.bound) == [2, 3, 4, 5, 6, 7, 8]
        assert all(operand.bound[b] >= operand.variance[b].value * (1 - 1e-9) for b in operand.bound)
        assert operand.variance[2].value > operand.variance[8].value
        assert sum(operand.histogram) == math.prod(operand.shape)
        assert operand.empty == sum(c == 0 for c in operand.histogram) / len(operand.histogram)
        assert 1 <= operand.range_ratio <= operand.shape[0]


def test_a_folded_step_is_divided_out() -> None:
    """The variance reported is that of the unfolded operand: sampled, |z| < 5 over 200 draws."""
    recipe = fqt.Recipe(weight="psq8@channel", grad_input="psq3d", grad_weight="ptq8", fold="always")
    torch.manual_seed(0)
    model = mlp()
    with torch.no_grad():
        model[3].weight *= torch.logspace(-2, 2, 8)[:, None]
    model, data, seen = fqt.quantize_(model, recipe), batches(2), {}
    found = fqt.diagnose(model, loss, data, table=0)
    operand = next(o for o in found.operands if (o.layer, o.role) == ("3", "grad_input"))
    assert operand.limit is None
    samples = []
    for b, batch in enumerate(data):
        torch.manual_seed(derive_seed(0, b, 0))
        with observe(model, lambda name, o: seen.update({(name, o.role): o})):
            loss(model, batch).backward()
        o = seen["3", "grad_input"]
        errors = [
            ((o.quantizer.quantize(o.gradient, s, axis=o.rows).dequantize() - o.gradient) / o.folded)
            .double()
            .square()
            .sum()
            for s in range(200)
        ]
        samples.append(torch.stack(errors))
    mean = torch.stack(samples).mean(0)
    z = (mean.mean() - operand.variance[3].value) / (mean.std() / 200**0.5)
    assert abs(float(z)) < 5


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_nuclear_norm_in_float32(scale: float) -> None:
    torch.manual_seed(0)
    full = torch.randn(20, 300) * torch.logspace(-5, 0, 20)[:, None]
    single = torch.randn(20, 1) @ torch.randn(1, 300)
    for x, tolerance in ((full, 1e-5), (full + 100.0, 1e-3), (single, 1e-2)):
        exact = torch.linalg.svdvals((x.double() - x.double().mean(1, keepdim=True)) * scale).sum()
        assert nuclear_norm(x * scale) == pytest.approx(float(exact), rel=tolerance)
    assert nuclear_norm(torch.zeros(3, 5)) == 0
    assert math.isnan(nuclear_norm(torch.full((3, 5), torch.inf)))


def test_nuclear_norm_and_the_limit_on_bounds() -> None:
    x = torch.randn(12, 40, dtype=torch.float64) * torch.logspace(0, -3, 12)[:, None]
    centred = x - x.mean(1, keepdim=True)
    exact = float(torch.linalg.matrix_norm(centred, "nuc"))
    assert nuclear_norm(x) == pytest.approx(exact, rel=1e-7)
    assert nuclear_norm(x.T.contiguous()) == pytest.approx(
        float(torch.linalg.matrix_norm(x.T - x.T.mean(1, keepdim=True), "nuc")), rel=1e-7
    )
    found = fqt.diagnose(make(recipe="shq4"), loss, batches(2, n=32), table=0)
    operand = next(o for o in found.operands if o.role == "grad_input")
    assert operand.limit is not None
    assert all(0 < operand.limit[b] < operand.bound[b] for b in operand.bound)
    dithered = fqt.diagnose(make(recipe="shq4d"), loss, batches(2, n=32), table=0).operands[0]
    assert dithered.limit is not None
    assert dithered.limit[8] == pytest.approx(operand.limit[8] / 3 * (255 / 254) ** 2, rel=0.2)


@pytest.mark.parametrize("table", [0, 1])
def test_layers_that_the_loss_does_not_reach(table: int) -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)})
    fqt.quantize_(model["idle"], "shq4")
    used = lambda m, batch: nn.functional.cross_entropy(m["used"](batch[0]), batch[1])
    two = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(2)]
    with pytest.raises(FqtError, match="takes part in the loss"):
        fqt.diagnose(model, used, two, table=table)


@pytest.mark.parametrize("recipe", ["psq4", "psq4d", "psq4x"])
def test_the_limit_by_value(recipe: str) -> None:
    """Of the first batch's matrix, scaled to the mean energy; whichever rounding a batch takes."""
    model, three = make(recipe=recipe), batches(3, n=32)
    found = fqt.diagnose(model, loss, three, table=0)
    norms, energies = [], []

    def take(name: str, operand: GradientOperand) -> None:
        if operand.role == "grad_input" and not norms:  # the last layer's comes first
            x = operand.gradient.double()
            norms.append(float(torch.linalg.matrix_norm(x - x.mean(1, keepdim=True), "nuc")) ** 2 / len(x))
            energies.append(float(x.square().sum()))

    with observe(model, take):
        loss(model, three[0]).backward()
    operand = next(o for o in found.operands if o.role == "grad_input")
    assert operand.limit is not None
    for b in WIDTHS:
        either = {"": norms[0] / (2**b - 1) ** 2, "d": norms[0] / (3 * (2**b - 2) ** 2)}
        one = min(either.values()) if recipe[4:] == "x" else either[recipe[4:]]
        assert operand.limit[b] == pytest.approx(one / energies[0] * operand.energy.value, rel=1e-3)


def test_codes_are_those_of_the_product() -> None:
    found = fqt.diagnose(make(recipe="ptq2"), loss, batches(2, n=16), table=0)
    for operand in found.operands:
        assert len(operand.histogram) == 2**operand.bits
        assert operand.histogram[0] > 0
        assert operand.histogram[-1] > 0  # the ends of the range are values of the tensor


def test_layers_in_more_noise_than_gradient_are_flagged() -> None:
    quiet = fqt.diagnose(make(recipe="psq8"), loss, batches(3), table=0)
    assert quiet.drowned == ()
    assert not quiet.total.drowned
    loud = fqt.Recipe(grad_input="ptq2", grad_weight="ptq2")
    model = make(recipe=loud)
    data = [(x * torch.logspace(-3, 3, 16)[:, None], y) for x, y in batches(3)]
    noisy = fqt.diagnose(model, loss, data, table=0)
    assert any(3 * n.quantization.value > n.energy.value for n in noisy.layers.values())
    assert set(noisy.drowned) == {k for k, n in noisy.layers.items() if 3 * n.quantization.value > n.energy.value}


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails: bool) -> None:
    model, data = make(), batches(3)
    loss(model, data[0]).backward()
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    recipes = [m.fqt_recipe for m in model.modules() if hasattr(m, "fqt_recipe")]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    if fails:
        data[2] = (data[2][0] * math.nan, data[2][1])
        with pytest.raises(FqtError, match="the loss is nan"):
            fqt.diagnose(model, loss, data)
    else:
        fqt.diagnose(model, loss, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values, strict=True))
    assert [m.fqt_recipe for m in model.modules() if hasattr(m, "fqt_recipe")] == recipes
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_bad_input_is_refused() -> None:
    model, data = make(), batches(3)
    cases = [
        (mlp(), data, {}, "no converted layer"),
        (make(recipe="qat"), data, {}, "no layer quantizes its gradient"),
        (make().eval(), data, {}, "'?0'? is in eval mode|0 is in eval mode"),
        (make().requires_grad_(False), data, {}, "no parameter that requires a gradient"),
        (model, data[:1], {}, "at least 2 batches, got 1"),
        (model, data, {"draws": 1}, "at least 2 draws"),
        (model, data, {"table": -1}, "number of draws"),
        (model, [*data, batches(1, n=9)[0]], {}, "9, 16 samples"),
    ]
    for bad, given, options, message in cases:
        with pytest.raises(FqtError, match=message):
            fqt.diagnose(bad, loss, given, **options)
    for bad_loss, message in [
        (lambda m, b: m(b[0]), "must return a scalar"),
        (lambda m, b: loss(m, b) * math.inf, "the loss is"),
        (lambda m, b: torch.tensor(1.0), "depends on no parameter"),
        (lambda m, b: 1.0, "must return a scalar, got float"),
    ]:
        with pytest.raises(FqtError, match=message):
            fqt.diagnose(model, bad_loss, data)


class Jitter(nn.Module):
    """Noise of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand(1) if self.training else x


def test_other_noise_is_refused_and_eval_mode_of_its_module_helps() -> None:
    torch.manual_seed(0)
    model = fqt.quantize_(nn.Sequential(nn.Linear(6, 8), Jitter(), nn.Linear(8, 3)), "psq4")
    with pytest.raises(FqtError, match="random even without gradient quantizers"):
        fqt.diagnose(model, loss, batches(3))
    model[1].eval()
    assert fqt.diagnose(model, loss, batches(3)).total.rho.value > 0


class Dropping(nn.Module):
    """Dropout by modules and by functions, in attentions that are converted and not, and in a checkpoint."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.inner = p, nn.Linear(8, 8)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention, self.plain = (nn.MultiheadAttention(8, 2, p, batch_first=True) for _ in range(2))
        self.drop, self.alpha = nn.Dropout(p), nn.AlphaDropout(p)

    def again(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.dropout(x, self.p, self.training))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.alpha(self.drop(F.gelu(self.first(x))))[None]
        x = x + checkpoint(self.again, x, use_reentrant=False)
        p = self.p if self.training else 0.0
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=p)[:, 0]
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], None, p)[:, 0]
        x = x + self.attention(x, x, x, need_weights=False)[0] + self.plain(x, x, x)[0]
        return self.last(torch.dropout(x, p, self.training))[0]


def masked(p: float) -> nn.Module:
    """Between its products only masks are kept, which draw nothing."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 3))
    return fqt.compress_(fqt.quantize_(net, "psq4"))


def dropping(p: float) -> nn.Module:
    return fqt.quantize_(Dropping(p), "psq4", filter_fn=lambda _, name: name != "plain")


@pytest.mark.parametrize("net", [dropping, masked])
def test_dropout_is_off(net: Callable[[float], nn.Module]) -> None:
    """Wherever it is called: the figures are those of the network without it; and afterwards it is on again."""
    found = []
    for p in (0.0, 0.5):
        torch.manual_seed(0)
        model = net(p)
        found.append(fqt.diagnose(model, loss, batches(3)).total)
        slow = quantization_variance(model, loss, batches(3), 2).total
        assert slow.value == pytest.approx(found[-1].quantization.value, rel=1e-5)
    for figure in ("sampling", "quantization", "energy"):
        without, off = (getattr(each, figure).value for each in found)
        assert off == pytest.approx(without, rel=1e-6)
    assert not torch.equal(*(model(batches(1)[0][0]) for _ in range(2)))


def test_reentrant_checkpoints_are_refused_in_one_line() -> None:
    class Again(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(nn.Linear.forward, self, x.requires_grad_(), use_reentrant=True)

    model = nn.Sequential(fqt.quantize_(nn.Linear(6, 8), "psq4"), Again(8, 3))
    with pytest.raises(FqtError, match="pass use_reentrant=False") as error:
        fqt.diagnose(model, loss, batches(3))
    assert "\n" not in str(error.value)


def test_the_noise_of_kept_codes_is_measured_by_both_estimators() -> None:
    torch.manual_seed(0)
    model = fqt.compress_(fqt.quantize_(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), "psq8"), 2)
    found = fqt.diagnose(model, loss, batches(3), table=0).total
    assert found.kept.value > 0
    slow = quantization_variance(model, loss, batches(3), 2).total
    assert slow.value == pytest.approx(found.quantization.value, rel=1e-5)


def test_a_batch_of_one_sample_is_measured() -> None:
    torch.manual_seed(0)
    model = fqt.quantize_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "shq4")
    found = fqt.diagnose(model, loss, batches(4, n=1), table=1)
    assert found.total.sampling.value > 0
    assert all(o.shape[0] == 1 for o in found.operands if o.role == "grad_input")


def test_a_frozen_parameter_has_no_column_but_its_layer_still_adds_noise() -> None:
    model = make()
    model[3].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    found = fqt.diagnose(model, loss, batches(3), table=1)
    assert "3" not in found.layers
    assert [o.role for o in found.operands if o.layer == "3"] == ["grad_input"]
    assert found.table is not None
    assert "3" not in found.table.targets
    assert found.table.effect["3"]["grad_input"].value > 0
    assert found.table.effect["3"]["grad_weight"].value == 0


def test_a_layer_used_twice_reports_sums_and_has_no_place_in_the_table() -> None:
    model, data = make(Twice), batches(2)
    found = fqt.diagnose(model, loss, data, table=0)
    counts = {(o.layer, o.role): sum(o.histogram) for o in found.operands}
    # its first use needs no grad_input
    assert counts["shared", "grad_weight"] == 2 * counts["between", "grad_weight"]
    assert counts["shared", "grad_input"] == counts["between", "grad_input"]
    with pytest.raises(FqtError, match="'shared' is used again after others"):
        fqt.diagnose(model, loss, data, table=1)
    assert fqt.diagnose(make(InARow), loss, data, table=1).table is not None


def test_attention_is_one_layer() -> None:
    found = fqt.diagnose(make(Attention), loss, batches(2, shape=(5, 6)), table=1)
    assert {o.layer for o in found.operands} == {"embed", "attention", "head"}
    assert found.table is not None
    assert found.table.sources == ("head", "attention", "embed")


def test_multiplications_are_those_of_the_product() -> None:
    x = torch.empty(4, 8, 5, 5)
    assert multiplications(nn.Conv2d(6, 8, 3), x) == 4 * 8 * 25 * 6 * 9
    assert multiplications(nn.Conv2d(6, 8, 3, groups=2), x) == 4 * 8 * 25 * 3 * 9
    assert multiplications(nn.Linear(6, 8), torch.empty(4, 7, 8)) == 4 * 7 * 8 * 6
    # 2 × 2 positions, each input channel meets 8 · 9 weights
    assert multiplications(nn.ConvTranspose2d(6, 8, 2, stride=2), torch.empty(4, 8, 4, 4)) == 4 * 6 * 4 * 8 * 4
    assert multiplications(nn.MultiheadAttention(8, 2), torch.empty(4, 7, 24)) == 4 * 7 * 24 * 8


MEMORY = """
import re, torch, fqt
from pathlib import Path
from torch import nn
# Not getrusage: a child's begins at what its parent had when it forked.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))  # 64 MiB of gradient
model = fqt.quantize_(model, "psq4")
data = [torch.randn(4, 1024) for _ in range(2)]
loss = lambda m, b: m(b).square().mean()
torch.autograd.grad(loss(model, data[0]), model[0].weight)  # what the backward itself needs
before = peak()
fqt.diagnose(model, loss, data, table=0)
print((peak() - before) / 1024 / (16 * 4))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's own account of memory")
def test_it_holds_the_gradient_less_than_twice() -> None:
    """Peak memory beyond a backward's own, in gradients: the mean, and one layer's figures at a time."""
    # glibc: what is freed goes back at once; and no blocks of memory that kernels keep for their next results.
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "FQT_KERNELS": "reference"}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=exact)
    assert 0.5 < float(done.stdout) < 1.7


def test_it_prints_as_a_table() -> None:
    lines = str(fqt.diagnose(make(), loss, batches(2), table=0)).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "1", "3", "5", "(whole"]


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        ([torch.zeros(2, 4)], r"loss_fn is a list, and no function: loss_fn\(model, batch\) gives the loss"),
        (nn.CrossEntropyLoss(), "loss_fn is CrossEntropyLoss, which knows no model"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, says):
    """Arguments that were swapped, and a loss of torch's, wherever one is taken."""
    model = fqt.quantize_(nn.Linear(4, 3), "psq8")
    with pytest.raises(FqtError, match=says):
        fqt.diagnose(model, loss, [torch.zeros(2, 4)] * 2)
    with pytest.raises(FqtError, match=says):
        fqt.diagnose(model, loss, nn.CrossEntropyLoss())  # before anything is asked of the batches
    with pytest.raises(FqtError, match=says):
        fqt.Monitor(model, loss)
    with pytest.raises(FqtError, match=says):
        quantization_variance(model, loss, [torch.zeros(2, 4)] * 2, draws=2)
