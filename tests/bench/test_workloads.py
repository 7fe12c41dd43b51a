"""The registry, the counts of multiply–accumulates, and that everyone starts from the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fqt.bench.cases import CASES, MEASURES, select
from fqt.bench.contestants import Runner, contestants
from fqt.bench.products import BlockedProduct
from fqt.bench.workloads import Layer, Product, Quantize, Step, build, count_macs, images
from fqt.errors import FqtError
from fqt.nn import load_recipe

from .conftest import BLOCKS, IMAGES, LINEAR


def test_the_registry_is_consistent():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        for recipe in case.recipes:
            if isinstance(case.workload, Product):
                BlockedProduct(Product(input=(2, 32), columns=3, block=32), recipe)
            else:
                load_recipe(recipe)
        for floor in case.floors:
            assert floor.measure in MEASURES
            assert set(floor.recipes) <= set(case.recipes)
        asked = [(f.measure, r) for f in case.floors for r in f.recipes]
        assert len(set(asked)) == len(asked)  # one floor each


def test_selection():
    assert [c.name for c in select(["resnet18", "conv-64"])] == ["conv-64", "resnet18"]  # the table's order
    assert [c.name for c in select([])] == [c.name for c in CASES if c.default and c.device == "cpu"]
    with pytest.raises(FqtError, match="unknown case 'conv-7'; known: linear-1024, "):
        select(["conv-7", "conv-64"])


def brute_force_conv(x: tuple[int, ...], conv: nn.Conv2d) -> int:
    """Multiply–accumulates of an output, one by one; taps on padding count."""
    (n, _, h, w), (kh, kw) = x, conv.kernel_size
    sizes = zip((h, w), conv.padding, (kh, kw), conv.stride, conv.dilation, strict=True)
    out = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, k, t, d in sizes]
    count = 0
    for _ in itertools.product(range(n), range(conv.out_channels), *map(range, out)):
        for _ in itertools.product(range(conv.in_channels // conv.groups), range(kh), range(kw)):
            count += 1
    return count


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
        (lambda: nn.Conv2d(4, 6, (3, 1), bias=False, dilation=(2, 1)), (1, 4, 7, 5)),
        (lambda: nn.Conv2d(4, 6, (3, 1), stride=2, groups=2, bias=False), (3, 4, 7, 5)),
    ],
)
def test_macs_of_a_convolution(conv, shape):
    assert count_macs(Layer(model=conv, input=shape)) == 3 * brute_force_conv(shape, conv())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_macs_of_a_linear_layer(shape, bias):
    products = 3 * 6 * 5 * 4
    assert count_macs(Layer(model=lambda: nn.Linear(5, 4, bias=bias), input=shape)) == products


COUNTED = [
    c
    for c in CASES
    # Of a grouped convolution torch counts grad_weight `groups` times.
    if not isinstance(c.workload, Quantize | Product) and c.name not in ("mobilenet", "convnext")
]


@pytest.mark.parametrize("case", COUNTED, ids=lambda c: c.name)
def test_macs_against_torchs_counter(case):
    """An independent count over a whole pass; products of activations are `bmm` there."""
    weights = {getattr(torch.ops.aten, op) for op in ("mm", "addmm", "convolution", "convolution_backward")}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(case.workload.input, requires_grad=isinstance(case.workload, Layer))
        case.workload.model()(x).sum().backward()
    flops = counter.get_flop_counts()["Global"].items()
    assert count_macs(case.workload) == sum(count for op, count in flops if op in weights) // 2


def test_macs_of_steps():
    # Four matrices of 12 width² in all; the norm before them asks for every grad_input.
    assert count_macs(BLOCKS.workload) == 3 * 12 * 32**2 * 4 * 16
    # The first convolution's grad_input is not asked for.
    n = 8
    convs = [(3, 16, 16 * 16), (16, 32, 8 * 8), (32, 32, 8 * 8)]
    first, *rest = [n * 9 * a * b * places for a, b, places in convs]
    assert count_macs(IMAGES.workload) == 2 * first + 3 * sum(rest) + 3 * n * 128 * 10


def test_macs_of_the_real_cases():
    counts = {c.name: count_macs(c.workload) for c in CASES if not isinstance(c.workload, Quantize | Product)}
    assert counts["linear-1024"] == 3 * 4096 * 1024**2
    assert counts["conv-64"] == 3 * 128 * 32 * 32 * 9 * 64**2
    assert counts["transformer"] == counts["transformer-torch"] == 4 * 3 * 12 * 768**2 * 2048
    stem, head = 2 * 128 * 32**2 * 27 * 64, 3 * 128 * 512 * 10
    stages = [(64, 64, 32), (64, 128, 16), (128, 256, 8), (256, 512, 4)]
    body = sum(3 * 128 * side**2 * (9 * a * b + 3 * 9 * b * b + (a * b if a != b else 0)) for a, b, side in stages)
    assert counts["resnet18"] == stem + body + head


def test_everyone_starts_from_the_same():
    before = torch.get_rng_state()
    first, second = build(BLOCKS.workload), build(BLOCKS.workload)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    plain = Runner(contestants([])[0], LINEAR.workload)
    ours = Runner(contestants(["psq8"])[-3], LINEAR.workload)
    assert torch.equal(plain.input, ours.input)
    plain.backward(), ours.backward()
    assert torch.equal(plain.above, ours.above)


def test_dtypes_are_those_of_the_setting():
    by_name = {c.name: c for c in contestants(["psq8"])}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("psq8 bf16", torch.bfloat16)):
        runner = Runner(by_name[name], LINEAR.workload)
        found = runner.outcome()
        assert {runner.input.dtype, runner.above.dtype, found["output"].dtype, found["grad_input"].dtype} == {dtype}
        assert found["grad weight"].dtype == torch.float32
    step = Runner(by_name["bf16"], IMAGES.workload)
    assert isinstance(step.workload, Step)
    assert step.input.dtype == torch.float32  # a step's batch is data


def test_an_outcome_leaves_the_weights_and_a_step_moves_them():
    runner = Runner(contestants([])[0], IMAGES.workload)
    before = [p.detach().clone() for p in runner.plain.parameters()]
    runner.outcome()
    assert all(torch.equal(a, b) for a, b in zip(before, runner.plain.parameters(), strict=True))
    runner()
    assert not any(torch.equal(a, b) for a, b in zip(before, runner.plain.parameters(), strict=True) if a.ndim > 1)


def test_what_is_frozen_has_no_gradient_to_verify():
    def frozen():
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 10))
        model[1].weight.requires_grad_(False)
        return model

    found = Runner(contestants(())[0], images(frozen, samples=2, side=2)).outcome()
    assert set(found) == {"output", "grad 1.bias", "grad 2.weight", "grad 2.bias"}
