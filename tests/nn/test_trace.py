"""`explain(model, batch)`: what really ran, and what was multiplied in float beside it; nothing is left behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fqt
from fqt import FqtError, Recipe, Rule
from fqt.kernels.integer import machine_obstacle

from .cases import FEW, Case, equal, ids, loss_of, small_batch, small_net

THREE = ("output", "grad_input", "grad_weight")


def ran(explained: Any, layer: str) -> dict[str, tuple[str, int, int]]:
    return {p.product: (p.arithmetic, p.calls, p.multiplications) for p in explained.products if p.layer == layer}


def converted_arithmetic() -> str:
    return "simulated" if machine_obstacle("cpu") else "integer"


def test_every_product_of_a_net_with_its_multiplications() -> None:
    explained = fqt.explain(fqt.quantize_(small_net(), "psq4"), small_batch()[0])
    on = converted_arithmetic()
    sizes = {"0": 8 * 36 * 4 * 18, "3": 8 * 4 * 4 * 36, "6": 8 * 16 * 3}
    for layer, size in sizes.items():
        expected = {product: (on, 1, size) for product in THREE}
        if layer == "0":  # the batch asks for no gradient
            expected["grad_input"] = ("not run", 0, 0)
        assert ran(explained, layer) == expected
    assert explained.totals == {on: 1.0}
    assert (explained.never_ran, explained.repeated) == ((), ())
    assert all(note.startswith("slower on integers here") for note in explained.notes)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_a_float_layer_multiplies_as_often_as_its_quantized_form(case: Case) -> None:
    """In float the count is torch's own."""
    x = case.input(torch.float32).requires_grad_()
    plain = fqt.explain(case.layer(torch.float32), x)
    quantized = fqt.explain(fqt.quantize_(case.layer(torch.float32), "psq4"), x)
    one = ran(quantized, "(model)")
    assert {name: size for name, (_, _, size) in one.items()} == dict.fromkeys(THREE, one["output"][2])
    forward, backward = ran(plain, "(model)").values()
    assert (forward[2], backward[2]) == (one["output"][2], 2 * one["output"][2])
    assert plain.totals == {"float": 1.0}


@pytest.mark.parametrize("kind", ["convolutions", "encoder"])
def test_all_multiplications_of_a_float_network_are_those_that_torch_counts(kind: str) -> None:
    model: nn.Module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(2, 5, 8)
    if kind == "convolutions":
        model, (x, _) = small_net(), small_batch()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    explained = fqt.explain(model, x)
    assert 2 * sum(p.multiplications for p in explained.products) == counter.get_total_flops()


def test_it_agrees_with_what_conversion_says_where_nothing_is_in_between() -> None:
    model = fqt.quantize_(nn.Sequential(nn.ConvTranspose1d(3, 2, 3), nn.Conv1d(2, 4, 2)), "psq4")
    x = torch.randn(2, 3, 9, requires_grad=True)
    said = [(p.layer, p.product, p.arithmetic, p.operands, p.why) for p in fqt.explain(model).products]
    shown = [(p.layer, p.product, p.arithmetic, p.operands, p.why) for p in fqt.explain(model, x).products]
    assert shown == said


def test_batches_as_the_forward_takes_them() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"left": self.a(x), "right": self.b(y)}

    model, x, y = fqt.quantize_(Two(), "qat"), torch.randn(4, 3), torch.randn(5, 3)
    for batch in ((x, y), [x, y], {"y": y, "x": x}):
        explained = fqt.explain(model, batch)
        assert ran(explained, "a")["grad_weight"][:2] == ("float", 1)
        assert ran(explained, "b")["output"][2] == 30
    left = fqt.explain(model, (x, y), lambda model, batch: model(*batch)["left"].sum())
    assert ran(left, "b")["grad_weight"] == ("not run", 0, 0)
    with pytest.raises(FqtError, match="loss_fn"):
        fqt.explain(model, (x, y), lambda model, batch: model(*batch))


@pytest.mark.parametrize(
    "batch", [(torch.ones(3, 4), torch.zeros(3)), [torch.ones(3, 4)] * 3, {"images": torch.ones(3, 4)}, ()]
)
def test_a_batch_with_targets_and_without_loss_fn_is_refused(batch: Any) -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 2)), "psq4")
    for wrapped in (model, AveragedModel(model)):
        with pytest.raises(FqtError, match=r"does not take this batch .*loss_fn"):
            fqt.explain(wrapped, batch)


def test_a_type_error_of_the_models_own_is_raised_as_it_is() -> None:
    class Faulty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return len(7)

    with pytest.raises(TypeError, match="has no len"):
        fqt.explain(Faulty(), torch.ones(2))
    with pytest.raises(FqtError, match=r"loss_fn is a Tensor, and no function"):
        fqt.explain(nn.Linear(4, 2), torch.ones(3, 4), torch.zeros(3))
    with pytest.raises(FqtError, match=r"loss_fn is MSELoss, which knows no model: loss_fn\(model, batch\)"):
        fqt.explain(nn.Linear(4, 2), torch.ones(3, 4), nn.MSELoss())


def test_an_output_with_a_loss_is_differentiated_by_it() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.a(x).mean(), "other": self.b(x)}

    explained = fqt.explain(fqt.quantize_(WithLoss(), "psq4"), torch.randn(4, 3))
    assert ran(explained, "a")["grad_weight"][1] == 1
    assert ran(explained, "b")["grad_weight"][1] == 0


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(id(t), t._version, t.detach().clone()) for t in tensors],
        [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [(type(m), m.training, sorted(vars(m)), list(m._buffers)) for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Restless(nn.Module):
    """Draws from every generator, changes its own mode, and registers a buffer as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.fails = small_net(), False

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        self.register_buffer("cache", torch.rand(3))
        self.net[2].eval()
        out = F.dropout(self.net(x), 0.5)
        if self.fails:
            raise RuntimeError("out of order")
        return out


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left(fails: bool) -> None:
    model = fqt.quantize_(Restless(), "psq4")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    stepped: list[Tensor] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(stepped.append)
    before, model.fails = state(model.net), fails
    hooks = len(nn.modules.module._global_forward_hooks)
    if fails:
        with pytest.raises(RuntimeError, match="out of order"):
            fqt.explain(model, small_batch()[0])
    else:
        fqt.explain(model, small_batch()[0])
    after = state(model.net)
    for i, (_, _, value) in enumerate(after[0]):  # running statistics were written, and written back
        assert torch.equal(value, before[0][i][2])
    assert [v[0] for v in after[0]] == [v[0] for v in before[0]]
    assert same(after[1:], before[1:])
    assert "cache" not in model._buffers
    assert not stepped
    assert len(nn.modules.module._global_forward_hooks) == hooks


def test_training_goes_on_as_if_nothing_had_been_asked() -> None:
    found = []
    for asked in (False, True):
        torch.manual_seed(11)
        model, batch = fqt.quantize_(small_net(), "bhq4"), small_batch()
        if asked:
            fqt.explain(model, batch, loss_of)
        loss_of(model, batch).backward()
        found.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert equal(*found)


def test_a_pending_graph_is_not_disturbed() -> None:
    model = fqt.quantize_(small_net().eval(), "psq4")
    loss = loss_of(model, small_batch())
    fqt.explain(model, small_batch()[0])
    loss.backward()


def test_eval_mode_is_said() -> None:
    explained = fqt.explain(fqt.quantize_(nn.Linear(4, 4), "psq4").eval(), torch.randn(3, 4))
    (row,) = [p for p in explained.products if p.product == "grad_weight"]
    assert (row.arithmetic, row.operands) == ("float", "float × ptq8n")
    assert "eval mode" in row.why
    assert any("eval mode" in note for note in explained.notes)


def test_a_wrapped_forward_that_still_calls_the_layers_own() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "psq4")
    old = model[1].forward
    model[1].forward = lambda x: old(x)
    explained = fqt.explain(model, torch.randn(3, 4))
    assert ran(explained, "1") == {product: (converted_arithmetic(), 1, 48) for product in THREE}


def test_a_replaced_forward_that_does_not() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "psq4")
    model[1].forward = lambda x: 2 * x
    explained = fqt.explain(model, torch.randn(3, 4))
    assert explained.never_ran == ("1",)
    assert "another one was put in its place" in str(explained)


class Borrowed(nn.Module):
    """Its layers' weights go to somebody else; one layer is never called, one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.idle, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.embedding = nn.Embedding(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = F.linear(x, self.lent.weight, self.lent.bias)
        x = self.twice(torch.tanh(self.twice(x)))
        return x @ self.embedding.weight.T


def test_weights_lent_idle_layers_and_repeated_ones() -> None:
    model = fqt.quantize_(Borrowed(), "psq4")
    explained = fqt.explain(model, torch.tensor([0, 3, 5]))
    assert explained.never_ran == ("lent", "idle")
    assert explained.repeated == (("twice", 2),)
    assert ran(explained, "twice")["output"] == (converted_arithmetic(), 2, 96)
    (lent,) = [p for p in explained.products if p.layer == "lent"]
    assert "multiplied in float" in lent.why
    floats = {(p.operands, p.product): p for p in explained.products if p.arithmetic == "float"}
    assert {operands for operands, _ in floats} == {"float × lent.weight", "float × embedding.weight"}
    assert "lent was handed to" in floats["float × lent.weight", "matmul, forward"].why
    assert floats["float × embedding.weight", "matmul, forward"].multiplications == 3 * 4 * 6
    assert floats["float × embedding.weight", "matmul, backward"].multiplications == 2 * 3 * 4 * 6
    assert explained.totals["float"] == pytest.approx(3 * (48 + 72) / (3 * (48 + 72) + 6 * 48))


OPERATIONS: dict[str, tuple[Any, int]] = {
    "matmul": (lambda x: x[0] @ x[1], 8 * 8 * 8),
    "vector": (lambda x: x[0] @ x[1, 0], 8 * 8),
    "bmm": (lambda x: torch.bmm(x, x), 2 * 8 * 8 * 8),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), 2 * 8 * 8 * 8),
    "conv": (lambda x: F.conv1d(x, x[:, :, :3]), 2 * 2 * 8 * 3 * 6),
    "sparse": (lambda x: torch.sparse.mm(torch.eye(8).to_sparse(), x[0]), 8 * 8),
    "attention": (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), 2 * 2 * 8 * 8 * 8),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_float_products_of_every_kind_are_found(name: str) -> None:
    function, multiplications = OPERATIONS[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential()
            self.inner.forward = function  # type: ignore[method-assign]
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.layer(x))

    explained = fqt.explain(fqt.quantize_(Model(), "psq4"), torch.randn(2, 8, 8))
    forward, *rest = [p for p in explained.products if p.layer == "inner"]
    assert (forward.arithmetic, forward.multiplications) == ("float", multiplications)
    assert [p.product.endswith("backward") for p in rest] == [True]
    assert all(p.arithmetic != "float" for p in explained.products if p.layer == "layer")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_float_and_counted(kind: type[nn.Module]) -> None:
    layer = kind(3, 4)
    explained = fqt.explain(layer, torch.randn(5, 2, 3))
    forward = sum(p.multiplications for p in explained.products if p.product.endswith("forward"))
    assert forward == 5 * 2 * sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    assert all(kind.__name__ in p.why for p in explained.products)


def test_attention_shows_its_two_products_of_activations() -> None:
    model = fqt.quantize_(nn.MultiheadAttention(4, 2, batch_first=True), "psq4")
    x = torch.randn(2, 3, 4)
    explained = fqt.explain(model, (x, x, x))
    assert ran(explained, "(model)")["output"] == (converted_arithmetic(), 2, 6 * 4 * (12 + 4))
    assert ran(explained, "(model)")["bmm, forward"] == ("float", 2, 2 * 2 * 2 * 3 * 3 * 2)


def test_layers_added_after_conversion_are_listed_as_float() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 4)), "psq4")
    model.append(nn.Linear(4, 2))
    assert [p.arithmetic for p in fqt.explain(model).products if p.layer == "1"] == ["float"]
    explained = fqt.explain(model, torch.randn(3, 4))
    assert {p.arithmetic for p in explained.products if p.layer == "1"} == {"float"}
    assert 0 < explained.totals["float"] < 1


def test_left_out_by_a_rule() -> None:
    recipe = Recipe(grad_input="psq4", grad_weight="ptq8", rules=[Rule("6", "none")])
    explained = fqt.explain(fqt.quantize_(small_net(), recipe), small_batch(), loss_of)
    assert {p.arithmetic for p in explained.products if p.layer == "6"} == {"float"}


def test_checkpointed_activations() -> None:
    """What is computed again is attributed to the layer that computes it, also inside the backward pass."""

    class Model(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.a, self.b, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant

        def forward(self, x: Tensor) -> Tensor:
            inner = lambda x: torch.tanh(self.b(torch.tanh(self.a(x))))
            return checkpoint(inner, x, use_reentrant=self.reentrant)

    model = fqt.quantize_(Model(False), Recipe(grad_input="psq4", grad_weight="psq4", rules=[Rule("b", "none")]))
    explained = fqt.explain(model, torch.randn(3, 4, requires_grad=True))
    assert ran(explained, "a")["output"][1] == 2
    assert ran(explained, "b") == {"matmul, forward": ("float", 2, 96), "matmul, backward": ("float", 2, 96)}
    with pytest.raises(FqtError, match="use_reentrant=False"):
        fqt.explain(Model(True), torch.randn(3, 4, requires_grad=True))


def test_frozen_models_and_no_gradient() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "psq4").requires_grad_(False)
    explained = fqt.explain(model, torch.randn(3, 4))
    assert any("no backward pass" in note for note in explained.notes)
    assert ran(explained, "0")["grad_input"][0] == "not run"
    model[1].requires_grad_(True)
    explained = fqt.explain(model, torch.randn(3, 4))
    assert [ran(explained, layer)["grad_weight"][1] for layer in "01"] == [0, 1]


def test_float64_ran_simulated() -> None:
    model = fqt.quantize_(nn.Linear(4, 4), "psq4")
    model.double()
    assert {p[0] for p in ran(fqt.explain(model, torch.randn(3, 4).double()), "(model)").values()} == {
        "simulated",
        "not run",
    }


def test_a_gradient_penalty_belongs_to_what_it_differentiates() -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.layer = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            (grad,) = torch.autograd.grad(torch.tanh(self.inner(x)).sum(), x, create_graph=True)
            return grad.square().sum() + self.layer(x.detach()).sum()

    explained = fqt.explain(fqt.quantize_(Penalized(), Recipe(rules=[Rule("inner", "none")])), torch.randn(3, 4))
    # Through x · wᵀ twice: its own backward pass, and the backward pass of that.
    assert ran(explained, "inner") == {"matmul, forward": ("float", 1, 48), "matmul, backward": ("float", 5, 240)}
    assert {p.layer for p in explained.products} == {"inner", "layer"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).values()

    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    expected = {f"matmul, {direction}": ("float", 1, 5 * 4 * 6) for direction in ("forward", "backward")}
    assert ran(fqt.explain(Ragged(), x), "layer") == expected


def test_a_lent_weight_is_known_under_autocast() -> None:
    model = fqt.quantize_(Borrowed(), "psq4")

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(tokens).float().sum()

    explained = fqt.explain(model, torch.tensor([0, 3, 5]), loss)
    floats = {p.operands: p.why for p in explained.products if p.arithmetic == "float"}
    assert set(floats) == {"float × lent.weight", "float × embedding.weight"}
    assert "lent was handed to" in floats["float × lent.weight"]


def test_a_product_of_no_parameter_says_so() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ x.T

    rows = fqt.explain(fqt.quantize_(Gram(), "psq4"), torch.randn(3, 4)).products
    assert {p.why for p in rows if p.arithmetic == "float"} == {"neither operand is a parameter of the model"}


def test_autocast_and_inference_mode_inside() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                self.teacher(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.student(x).float()

    explained = fqt.explain(fqt.quantize_(Model(), Recipe(rules=[Rule("teacher", "none")])), torch.randn(3, 4))
    assert ran(explained, "teacher") == {"matmul, forward": ("float", 1, 48)}
    assert ran(explained, "student")["output"] == (converted_arithmetic(), 1, 48)


def test_a_compiled_model_is_run_uncompiled() -> None:
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "psq4")
    compiled = torch.compile(model, backend="eager")
    explained = fqt.explain(compiled, torch.randn(3, 4))
    on = converted_arithmetic()
    assert [ran(explained, i)["grad_weight"] for i in "01"] == [(on, 1, 48)] * 2


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_refused_since_one_batch_would_make_them() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(FqtError, match="lazy"):
        fqt.explain(model, torch.randn(2, 4))
    assert type(model[0]) is nn.LazyLinear


def test_it_prints_calls_and_shares() -> None:
    lines = str(fqt.explain(fqt.quantize_(Borrowed(), "psq4"), torch.tensor([0, 3]))).splitlines()
    assert lines[0].split() == ["layer", "product", "arithmetic", "operands", "calls", "share", "why"]
    for start in ("total: ", "never ran", "ran more than once: twice (2 ×)"):
        assert any(line.startswith(start) for line in lines), start
    (total,) = [line for line in lines if line.startswith("total: ")]
    assert "integer" in total or machine_obstacle("cpu")
