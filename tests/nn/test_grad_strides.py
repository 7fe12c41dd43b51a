"""`.grad` lies as its parameter does, down to the strides of sizes of 1, which DDP compares."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fqt

from .cases import FORMATS, LAYERS, Case, _case, ids

ONES = tuple(  # sizes of 1 in every axis of a weight
    _case(f"{kind.__name__}_{i}x{o}_{k}_groups{groups}", kind, (i, o, k), (3, i, *[4] * dims), groups=groups)
    for dims, kinds in enumerate(
        ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)), start=1
    )
    for kind in kinds
    for i, o, k, groups in ((8, 4, 1, 1), (1, 8, 3, 1), (8, 1, 1, 1), (8, 8, 1, 8), (8, 4, 1, 2))
)


@pytest.mark.parametrize("recipe", ["default", "qat", "thq4d"])
@pytest.mark.parametrize("case", [*LAYERS, *ONES], ids=ids)
def test_gradients_lie_as_parameters_do(case: Case, recipe: str) -> None:
    x = case.input(torch.float32)
    format = FORMATS.get(x.ndim, torch.contiguous_format)
    for input_format in (torch.contiguous_format, format):
        for weight_format in (torch.contiguous_format, format):
            layer = fqt.quantize_(case.layer(torch.float32).to(memory_format=weight_format), recipe)
            layer(x.contiguous(memory_format=input_format)).square().sum().backward()
            for name, p in layer.named_parameters():
                assert p.grad is not None
                assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("case", [c for c in ONES if c.make is nn.Conv2d], ids=ids)
def test_in_a_compiled_model_too(case: Case) -> None:
    layer = fqt.quantize_(case.layer(torch.float32), "default")
    torch.compile(layer, backend="aot_eager")(case.input(torch.float32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in layer.parameters())


def test_distributed_training_says_nothing() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
        model = DistributedDataParallel(fqt.quantize_(net, "psq8"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                model(torch.randn(2, 8, 4, 4)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
