"""torch.compile: one op per layer and direction, no graph break, the eager layer's values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import fqt
from fqt import Recipe
from fqt.kernels.linear_map import ConvMap
from fqt.nn import compiled, layers, masks

from .cases import FORMATS, LAYERS, Case, converted, gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RECIPES: list[Recipe | str] = ["default", "shq4d", "qat", Recipe(input=None, grad_input="psq4", grad_weight="ptq8")]
CASES = [c for c in LAYERS if c.name in ("linear", "linear_tokens", "conv1d", "conv2d_mixed", "same_even")]
CASES += [c for c in LAYERS if c.name in ("conv2d_groups", "transposed2d", "conv3d", "circular", "linear_4d")]


def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers call the ops that a compiled graph holds."""
    monkeypatch.setattr(layers, "linear_products", compiled.layer)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_ops_are_the_layer(case: Case, recipe: Recipe | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seed, bit for bit, in training and in eval mode."""
    layer, x = converted(case, recipe, torch.float32), case.input(torch.float32)
    for mode in (True, False):
        layer.train(mode)
        torch.manual_seed(3)
        wanted = gradients(layer, x)
        with monkeypatch.context() as context:
            as_compiled(context)
            torch.manual_seed(3)
            found = gradients(layer, x)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case: Case, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, shapes and strides of fake results, autograd registration, of both ops."""
    layer, x = converted(case, "default", torch.float32), case.input(torch.float32)
    if last and x.ndim not in FORMATS:
        pytest.skip("no such format")
    x = x.contiguous(memory_format=FORMATS[x.ndim]) if last else x
    made: list[tuple] = []
    monkeypatch.setattr(layers, "linear_products", lambda *a: made.append(a) or a[0].new_zeros(1))
    layer(x.requires_grad_())
    input, weight, bias, call = made[0]
    rest = compiled.arguments(call)
    arguments = (input.detach(), weight.detach(), None if bias is None else bias.detach(), True, *rest)
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fqt.layer.default, arguments, test_utils=kinds)
    output, *saved = torch.ops.fqt.layer(*arguments)
    dtypes, needs = [x.dtype] * 3, [True, True, bias is not None]
    back = (torch.randn_like(output), None, arguments[1], *saved, list(input.shape), list(weight.shape))
    torch.library.opcheck(
        torch.ops.fqt.layer_backward.default, (*back, *dtypes, *needs, *rest), test_utils=kinds[:2]
    )


def test_maps_survive_as_numbers() -> None:
    maps = [layers.linear_map(c.layer(torch.float32)) for c in LAYERS]
    maps.append(ConvMap((2, 1), (0, 3), (1, 2), 4, True, (1, 0)))
    for map in maps:
        assert compiled._map(compiled.numbers(map)) == map


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), (10, 16)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)), (4, 3, 9, 9)),
}


@pytest.mark.parametrize("name", NETS)
def test_no_graph_break_and_the_eager_gradient(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, x = fqt.quantize_(make(), "qat"), torch.randn(shape)  # exact gradients, to be compared closely

    def run(module: nn.Module) -> list[Tensor]:
        model.zero_grad()
        output = module(x)
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]

    torch._dynamo.reset()
    for mine, truth in zip(run(torch.compile(model, fullgraph=True)), run(model), strict=True):
        assert (
            mine - truth
        ).norm() <= 1e-3 * truth.norm()  # a code may flip where fused arithmetic rounds otherwise


def test_compiled_noise_is_fresh_and_unbiased() -> None:
    """The mean of 200 gradients, per entry within 6 standard errors: false alarms below 1e-6 for 24 entries."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4, bias=False), torch.randn(12, 6)
    up = torch.randn(12, 4) * torch.logspace(-1, 1, 12)[:, None]
    exact = gradients(fqt.quantize_(layer, "qat"), x, upstream=up)[2]
    module = torch.compile(fqt.quantize_(layer, Recipe(grad_input="psq4", grad_weight="ptq4")), fullgraph=True)
    drawn = []
    for _ in range(200):
        layer.zero_grad()
        module(x).backward(up)
        assert layer.weight.grad is not None
        drawn.append(layer.weight.grad.clone())
    sample = torch.stack(drawn).double()
    assert (sample.std(0) > 0).all()
    assert ((sample.mean(0) - exact).abs() <= 6 * sample.std(0) / 200**0.5 + 1e-5).all()


class Residual(nn.Module):
    """Sums of two things of which only one is kept, each read by a convolution through a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))
        self.last = nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(norm(convolution(x)) + x)
        return self.last(x)


class Nothing(CustomGraphPass):
    """A user's own pass."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return "nothing"


@pytest.mark.parametrize("autocast", [False, True])
def test_inductor_options_keep_masks_as_int8(autocast: bool) -> None:
    """Beside any pass of the user's; without them, booleans. No byte more is kept, and gradients are the same."""
    torch.manual_seed(0)
    model, x = fqt.quantize_(Residual(), "qat"), torch.randn(3, 4, 6, 5, requires_grad=True)
    x.data[0, 0, 0, 0] = torch.nan  # whose ReLU lets gradients through

    def run(module: nn.Module) -> tuple[set[torch.dtype], int, list[Tensor]]:
        kept: list[Tensor] = []
        model.zero_grad()
        x.grad = None
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with hooks, torch.autocast("cpu", enabled=autocast):
            output = module(x)
        output.float().square().sum().backward()
        grads = [t.grad.clone() for t in (x, *model.parameters())]  # type: ignore[union-attr]
        return {t.dtype for t in kept}, sum(t.nbytes for t in kept), grads

    def compiled_with(options: dict[str, object] | None) -> tuple[set[torch.dtype], int, list[Tensor]]:
        torch._dynamo.reset()
        return run(torch.compile(model, fullgraph=True, options=options))

    plain_kinds, plain_bytes, plain_grads = compiled_with(None)
    assert torch.bool in plain_kinds
    found = []
    for there in (None, Nothing(), [Nothing()]):
        with inductor_config.patch(joint_custom_post_pass=there):
            options = fqt.inductor_options()
            found.append(compiled_with(options))
            assert inductor_config.joint_custom_post_pass is there
        passes = options["joint_custom_post_pass"]
        passes = passes if isinstance(passes, list) else [passes]
        assert [type(p) for p in passes] == [*[Nothing] * (there is not None), type(masks._pass())]
    for kinds, size, grads in found:
        assert torch.int8 in kinds
        assert torch.bool not in kinds
        assert size <= plain_bytes
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(grads, plain_grads, strict=True))
