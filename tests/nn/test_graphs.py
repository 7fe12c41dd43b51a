"""Graphs outlive their process: what they hold means the same everywhere. And tools that see a model as a graph."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fqt
from fqt import FqtError, Recipe, Rule
from fqt.kernels.linear_map import DenseMap
from fqt.nn import compiled, dump_recipe, function, load_recipe, observe
from fqt.quant import ScaledHadamard

from .cases import FORWARD, gradients

RECIPES = ["none", "qat", "default", "bhq3", "shq4d", "thq4d", "psq2x", *FORWARD.values()]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


X = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def texts(graph: fx.Graph) -> set[str]:
    """The recipes in a graph."""
    nodes = [node for node in graph.nodes if "fqt.layer" in str(node.target)]
    assert nodes
    return {a for node in nodes for a in node.args if isinstance(a, str)}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_text_is_the_recipe_without_rules(recipe: Recipe | str) -> None:
    recipe = load_recipe(recipe)
    assert Recipe.of_text(recipe.text) == recipe
    assert replace(recipe, rules=(Rule("a", "qat"),)).text == recipe.text
    assert json.loads(recipe.text) == dump_recipe(recipe)


def test_a_transform_without_a_word_stays_eager() -> None:
    class Own(ScaledHadamard):
        pass

    recipe = Recipe(grad_input=fqt.Quantizer(transform=Own(), scale=fqt.quantizer("shq4").scale))
    assert not recipe.text
    layer = fqt.quantize_(nn.Linear(4, 4), recipe)
    gradients(layer, torch.randn(6, 4))
    with pytest.raises(FqtError, match="transform"):
        make_fx(layer)(torch.randn(6, 4))


def test_what_a_compiler_caches_changes_with_the_recipe() -> None:
    seen: list[fx.Graph] = []

    def backend(module: fx.GraphModule, _: object) -> object:
        seen.append(module.graph)
        return module.forward

    for words in ({"input": "ptq8"}, {"input": "psq8@token"}):
        torch._dynamo.reset()
        torch.compile(fqt.quantize_(nn.Linear(4, 3), words), backend=backend)(torch.randn(2, 4))
        assert texts(seen[-1]) == {load_recipe(words).text}
    assert texts(seen[0]) != texts(seen[1])


READER = """
import sys, torch, fqt
before = [fqt.Recipe(grad_input=f"psq{bits}", grad_weight="ptq3") for bits in range(2, 9)]
program, traced = torch.export.load(sys.argv[1]).module(), torch.jit.load(sys.argv[2])
found = []
for run in (program, traced):
    torch.manual_seed(7)
    x = torch.load(sys.argv[3]).requires_grad_()
    y = run(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    found.append((y.detach(), grad))
torch.save(found, sys.argv[4])
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_program_loaded_elsewhere_computes_the_same(tmp_path: Path) -> None:
    """Exported or traced in training mode, loaded where other recipes were made before: the same noise, too."""
    model = fqt.quantize_(net(), "psq4")
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "program.pt2")
    torch.jit.save(torch.jit.trace(model, X, check_trace=False), tmp_path / "traced.pt")
    torch.save(X, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("program.pt2", "traced.pt", "x.pt", "found.pt")]
    done = subprocess.run([sys.executable, "-c", READER, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(7)
    x = X.clone().requires_grad_()
    y = model(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    for output, found in torch.load(tmp_path / "found.pt"):
        assert torch.equal(output, y.detach())
        assert torch.equal(found, grad)


def test_noise_is_of_the_rank_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = fqt.quantize_(nn.Linear(6, 4), "psq4"), torch.randn(5, 6)
    graph = torch.export.export(layer, (x,)).module()

    def drawn(module: nn.Module, rank: int) -> Tensor:
        monkeypatch.setattr("fqt.nn.call._rank", lambda: rank)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        return torch.autograd.grad(module(leaf).square().sum(), leaf)[0]

    assert torch.equal(drawn(graph, 1), drawn(layer, 1))
    assert not torch.equal(drawn(graph, 1), drawn(graph, 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recipe", ["default", Recipe(input=None)], ids=str)
def test_a_trace_is_for_both_modes_of_autograd(recipe: Recipe | str) -> None:
    """Traced without gradients and trained, or the other way round."""
    model = fqt.quantize_(net(), recipe).eval()
    wanted = gradients(model, X)
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            traced = torch.jit.trace(model, X)
        with torch.no_grad():
            assert torch.equal(traced(X[:2]), model(X[:2]))
        assert all(torch.equal(a, b) for a, b in zip(gradients(traced, X), wanted, strict=True))


def test_an_op_differentiates_what_was_not_made_for_it() -> None:
    layer, x = fqt.quantize_(nn.Linear(6, 4), "default").eval(), torch.randn(5, 6)
    wanted = gradients(layer, x, upstream=torch.ones(5, 4))
    layer.zero_grad()
    call = function.Call(DenseMap(), layer.fqt_recipe, None, x.dtype)
    torch.ops.fqt.layer(x, layer.weight, layer.bias, False, *compiled.arguments(call))[0].sum().backward()
    assert torch.equal(layer.weight.grad, wanted[2])  # type: ignore[arg-type]


def test_aot_inductor_gets_no_empty_list() -> None:
    assert compiled.numbers(DenseMap()) is None


class Pipeline(nn.Module):
    """Layers by path, one of them an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.attention(x, x, x)[0])


def test_fx_sees_the_graph_of_the_float_model() -> None:
    """The same nodes, and an extractor that ends at an inner layer."""
    model, x = Pipeline().eval(), torch.randn(2, 3, 4)
    wanted = [str(n) for n in fx.symbolic_trace(model).graph.nodes]
    fqt.quantize_(model)
    traced = fx.symbolic_trace(model)
    assert [str(n) for n in traced.graph.nodes] == wanted
    assert torch.equal(traced(x), model(x))
    extractor = fx.symbolic_trace(model)
    inner = next(n for n in extractor.graph.nodes if n.target == "stem.1")
    (end,) = (n for n in extractor.graph.nodes if n.op == "output")
    end.args = (inner,)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    assert torch.equal(extractor(x), model.stem(x))
    fqt.restore_(model)
    assert "__module__" not in model.head.__dict__
    assert [str(n) for n in fx.symbolic_trace(model).graph.nodes] == wanted


def test_a_converted_model_survives_pickle_with_its_leaves() -> None:
    buffer = io.BytesIO()
    torch.save(fqt.quantize_(Pipeline()), buffer)
    buffer.seek(0)
    model = torch.load(buffer, weights_only=False)
    assert any(n.target == "head" for n in fx.symbolic_trace(model).graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FqtError, match=r"ONNX.*fqt\.restore_"):
        torch.onnx.export(fqt.quantize_(net()), (X,), tmp_path / "model.onnx", dynamo=False)


def test_fake_and_meta_tensors_have_the_shapes() -> None:
    with torch._subclasses.FakeTensorMode():
        model = fqt.quantize_(net())
        model(torch.empty(5, 2, 4, 4)).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())  # type: ignore[union-attr]
    model = fqt.quantize_(net()).to("meta")
    output = model(X.to("meta"))
    assert (output.device.type, output.shape) == ("meta", (5, 3))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # asked for by Dynamo
def test_an_observed_layer_is_seen_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = fqt.quantize_(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    module, x = torch.compile(model, backend="aot_eager"), torch.randn(5, 4)
    seen: list[tuple[str, str]] = []

    def run() -> int:
        module(x).sum().backward()
        return len(seen)

    assert run() == 0
    with observe(model, lambda name, operand: seen.append((name, operand.role))):
        assert run() == 3
    assert set(seen) == {("2", "grad_input"), ("2", "grad_weight"), ("0", "grad_weight")}
    assert run() == 3


def test_tracing_changes_no_configuration() -> None:
    import torch._inductor.config as config

    before = config.get_config_copy()
    torch._dynamo.reset()
    torch.compile(fqt.quantize_(net()), backend="aot_eager")(X)
    assert config.get_config_copy() == before
