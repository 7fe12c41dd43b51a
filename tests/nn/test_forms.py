"""Classes beyond torch's own layers: those that torch makes, subclasses, GPT-2's Conv1D, and registered ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm, remove_weight_norm

import fqt
from fqt import ConversionError, FqtError, Recipe, Rule
from fqt.nn import forms

from .cases import gradients

COARSE = Recipe(input="ptq3", weight="ptq8", grad_input="psq4", grad_weight="ptq8")


class Named(nn.Linear):
    """A subclass that keeps the forward."""

    def __init__(self, name: str = "") -> None:
        super().__init__(8, 8)
        self.name = name

    def extra_repr(self) -> str:
        return f"{self.name}, {super().extra_repr()}"


class NamedConv(nn.Conv2d):
    """The same for a convolution."""

    def __init__(self) -> None:
        super().__init__(8, 4, 3, padding=1)


class Scaled(nn.Linear):
    """Keeps the forward; its weight is computed."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight_direction = self._parameters.pop("weight")

    @property
    def weight(self) -> Tensor:
        return self.weight_direction / self.weight_direction.norm()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._parameters["weight"] = value


class Conv1D(nn.Module):
    """As in transformers, which need not be installed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / 4)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"

MADE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), (6, 8)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), (6, 8)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Conv1d(8, 8, 1)), (3, 8, 5)),
    "weight_norm of a subclass": (lambda: parametrizations.weight_norm(Named("a")), (6, 8)),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Conv2d(8, 4, 3)), (2, 8, 5, 5)),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), (6, 8)),
    "subclass": (lambda: Named("b"), (6, 8)),
    "subclass of Conv2d": (NamedConv, (2, 8, 5, 5)),
    "property": (Scaled, (6, 8)),
    "Conv1D": (lambda: Conv1D(12, 8), (2, 3, 8)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MADE[name]
    torch.manual_seed(3)
    layer = make()
    layer.eval()  # else a spectral norm moves at every forward pass
    return layer, torch.randn(shape, requires_grad=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MADE)
def test_converted_close_to_float_and_restored_exactly(name: str) -> None:
    """The error of 3 bits in the output, that of 8 bits in all QAT gives, and the float layer's own bits after."""
    layer, x = made(name)
    kind, float_ = type(layer), gradients(layer, x)
    fqt.quantize_(layer, COARSE)
    assert isinstance(layer, kind if kind.__module__ == __name__ else nn.Module)
    assert {p.arithmetic for p in fqt.explain(layer).products} <= {"integer", "simulated"}
    coarse = layer(x)
    assert 0.01 < (coarse - float_[0]).norm() / float_[0].norm() < 0.5
    fqt.quantize_(layer, "qat")
    for mine, truth in zip(gradients(layer, x), float_, strict=True):
        assert mine.shape == truth.shape
        assert (mine - truth).norm() <= 0.05 * truth.norm()
    fqt.restore_(layer)
    assert type(layer) is kind
    assert all(map(torch.equal, gradients(layer, x), float_))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MADE)
def test_it_runs_on_integers_wherever_a_linear_does(name: str) -> None:
    layer, _ = made(name)
    plain = nn.Conv2d(8, 8, 3) if isinstance(layer, nn.modules.conv._ConvNd) else nn.Linear(8, 8)
    rows = [[p.arithmetic for p in fqt.explain(fqt.quantize_(m, "psq8")).products] for m in (layer, plain)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal", "weight_norm of a subclass", "subclass", "Conv1D"])
def test_copies(name: str) -> None:
    layer, x = made(name)
    fqt.quantize_(layer, "psq4")
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    fqt.restore_(twin)
    assert fqt.nn.convert.is_converted(layer)


def test_a_subclass_is_pickled_by_its_own_class() -> None:
    layer, x = made("subclass")
    fqt.quantize_(layer, "psq4")
    twin = pickle.loads(pickle.dumps(layer))
    assert (type(twin), twin.name) == (type(layer), "b")
    assert torch.equal(twin.eval()(x), layer(x))
    assert b"QuantizedNamed" not in pickle.dumps(layer)


def test_layers_of_one_class_share_their_quantized_class() -> None:
    model = fqt.quantize_(nn.Sequential(Named("a"), Named("b")), "psq4")
    assert type(model[0]) is type(model[1])
    assert str(model[0]) == "QuantizedNamed(a, in_features=8, out_features=8, bias=True, recipe=psq4)"


def test_a_parametrization_may_come_and_go_while_converted() -> None:
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    fqt.quantize_(layer, "psq4")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is fqt.nn.layers.QuantizedLinear
    assert type(fqt.restore_(layer)) is nn.Linear
    fqt.quantize_(parametrizations.weight_norm(layer), "psq4")
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    fqt.restore_(layer)
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    parametrize.remove_parametrizations(layer, "bias")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("put", "take"), [(nn.utils.weight_norm, remove_weight_norm), (nn.utils.spectral_norm, remove_spectral_norm)]
)
def test_an_old_style_norm_may_be_taken_off_while_converted(put: Callable, take: Callable) -> None:
    layer = fqt.quantize_(put(nn.Linear(8, 8)), "psq4")
    take(layer)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad.isfinite().all()


class Standardized(nn.Conv2d):
    """Computes its weight in its forward."""

    def standardized(self) -> Tensor:
        flat = self.weight.flatten(1)
        return ((flat - flat.mean(1, True)) / flat.std(1, keepdim=True)).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)


class Gated(nn.Module):
    """Two products of one input, with weights of names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = (nn.Parameter(torch.randn(6, 8) / 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up) * torch.sigmoid(F.linear(x, self.gate))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations last as long as the test."""
    monkeypatch.setattr(forms, "QUANTIZED", dict(forms.QUANTIZED))


def standardized_forward(self: Standardized, x: Tensor) -> Tensor:
    return fqt.convolution(self, x, self.standardized(), self.bias)


def gated_forward(self: Gated, x: Tensor) -> Tensor:
    return fqt.linear(self, x, self.up) * torch.sigmoid(fqt.linear(self, x, self.gate))


class Direct(nn.Conv2d):
    """Pads its input, computes its weight and calls torch's function."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm()
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias=self.bias, stride=self.stride, groups=self.groups)


class Through(nn.Linear):
    """Calls the forward of torch's own layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


REGISTERED: dict[str, tuple[Callable[[], nn.Module], Callable, tuple[int, ...]]] = {
    "convolution": (lambda: Standardized(8, 4, 3, padding=1), standardized_forward, (2, 8, 5, 5)),
    "padded": (
        lambda: Standardized(8, 4, 3, padding=1, padding_mode="reflect"),
        standardized_forward,
        (2, 8, 5, 5),
    ),
    "own": (Gated, gated_forward, (6, 8)),
    "redirected": (Gated, fqt.own_forward, (6, 8)),
    "redirected convolution": (lambda: Standardized(8, 4, 3, padding="same"), fqt.own_forward, (2, 8, 5, 5)),
    "redirected function": (lambda: Direct(8, 4, 3, stride=2), fqt.own_forward, (2, 8, 5, 5)),
    "redirected super": (lambda: Through(8, 4), fqt.own_forward, (6, 8)),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_by_its_forward(name: str, registry: None) -> None:
    make, forward, shape = REGISTERED[name]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    kind, truth = type(layer), gradients(layer, x)
    model = nn.Sequential(layer, nn.Linear(5, 5))
    fqt.quantize_(model, "qat")
    assert type(layer) is kind
    (row,) = [p for p in fqt.explain(model).products if p.layer == "0"]
    assert row.arithmetic == "float"
    assert kind.__name__ in row.why
    fqt.restore_(model)
    assert fqt.register(kind)(forward) is forward
    fqt.quantize_(model, "qat")
    assert next(p.arithmetic for p in fqt.explain(model).products if p.layer == "0") == "integer"
    mine = gradients(layer, x)
    assert not torch.equal(mine[0], truth[0])
    for a, b in zip(mine, truth, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), layer(x))
    fqt.restore_(model)
    assert type(layer) is kind
    assert all(map(torch.equal, gradients(layer, x), truth))
    assert all(map(torch.equal, [forward(layer, x)], truth))  # whoever keeps it gets the float layer


def test_registered_noise_is_unbiased(registry: None) -> None:
    """Mean of 100 gradients of the weight below the standardization against the exact one: z-tests of 4 directions.

    Each at 5 standard errors, estimated from the 100: 4e-5 in all (t of 99 degrees).
    """
    fqt.register(Standardized, standardized_forward)
    layer, x = Standardized(3, 4, 3).double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    up = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    exact = gradients(fqt.quantize_(layer, "qat"), x, upstream=up)[2]
    fqt.quantize_(layer, Recipe(grad_input="psq4", grad_weight="ptq4"))
    draws = torch.stack([gradients(layer, x, upstream=up)[2] for _ in range(100)]).flatten(1)
    directions = torch.randn(draws.shape[1], 4, dtype=torch.float64)
    found = (draws - exact.flatten()) @ directions
    assert (found.std(0) > 0).all()
    assert (found.mean(0).abs() < 5 * found.std(0) / 10).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_and_compiled(name: str, registry: None) -> None:
    """One graph, and the eager layer's values up to the rounding of what is float in it."""
    make, forward, shape = REGISTERED[name]
    layer, x = make(), torch.randn(shape)
    fqt.register(type(layer), forward)
    fqt.quantize_(layer, "psq4")
    found = []
    for model in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        layer.zero_grad()
        out = model(x)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in layer.parameters())])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))


def test_registered_by_a_class_and_a_subclass_of_it(registry: None) -> None:
    class QuantizedGated(Gated):
        forward = gated_forward

    class Special(Gated):
        pass

    fqt.register(Gated, QuantizedGated)
    model = fqt.quantize_(nn.Sequential(Gated(), Special()), "psq4")
    assert type(model[0]) is QuantizedGated
    assert isinstance(model[1], QuantizedGated)
    assert isinstance(model[1], Special)
    fqt.restore_(model)
    assert [type(m) for m in model] == [Gated, Special]


def test_refused_registrations(registry: None) -> None:
    for kind, form, word in (
        (torch.zeros(2), gated_forward, "subclass of torch.nn.Module"),
        (nn.Linear, gated_forward, "overwrite"),
        (fqt.nn.layers.QuantizedLinear, gated_forward, "quantized form itself"),
        (Gated, nn.Linear, "subclass of it"),
        (Gated, Gated, "subclass of it"),
        (Gated, 3, "forward function"),
    ):
        with pytest.raises(FqtError, match=word):
            fqt.register(kind, form)
    assert Gated not in forms.QUANTIZED
    fqt.register(Gated, gated_forward)
    with pytest.raises(FqtError, match="overwrite"):
        fqt.register(Gated, gated_forward)
    fqt.register(Gated, lambda self, x: x, overwrite=True)
    x = torch.randn(2, 8)
    assert fqt.quantize_(nn.Sequential(Gated()), "psq4")[0](x) is x


def test_unpickled_where_it_is_not_registered(registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fqt.register(Gated, gated_forward)
    saved = pickle.dumps(fqt.quantize_(Gated(), "psq4"))
    monkeypatch.delitem(forms.QUANTIZED, Gated)
    with pytest.raises(FqtError, match="register its quantized form"):
        pickle.loads(saved)


def test_diagnose_counts_what_registered_and_transposed_layers_multiply(registry: None) -> None:
    fqt.register(Gated, gated_forward)
    model = nn.Sequential(nn.Linear(4, 4), Conv1D(8, 4), nn.Tanh(), Gated())
    fqt.quantize_(model, "psq4")
    batches = [torch.randn(5, 4) for _ in range(2)]
    found = fqt.diagnose(model, lambda m, x: m(x).square().mean(), batches)
    assert found.table.weight == {"3": 2 * 5 * 6 * 8, "1": 5 * 8 * 4}


class Replaced(nn.Conv2d):
    """Keeps forward, but not what forward calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return input


class Experts(nn.Module):
    """Fused experts, as mixture-of-experts models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(4, 6, 3))


def test_what_is_left_float_says_so() -> None:
    model = nn.ModuleDict({"replaced": Replaced(3, 3, 1), "experts": Experts(), "plain": nn.Linear(3, 3)})
    fqt.quantize_(model, "psq4")
    why = {p.layer: p.why for p in fqt.explain(model).products if p.arithmetic == "float"}
    assert "_conv_forward" in why["replaced"]
    assert "fqt.register" in why["replaced"]
    assert "fused expert weights" in why["experts"]
    assert "gate_up_proj (4, 6, 3)" in why["experts"]


def test_filter_fn() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 64), "act": nn.ReLU(), "lstm": nn.LSTM(2, 2)})
    asked: list[tuple[nn.Module, str]] = []

    def wide(module: nn.Module, name: str) -> bool:
        asked.append((module, name))
        return module.out_features > 3

    fqt.quantize_(model, "psq4", filter_fn=wide)
    assert asked == [(model["a"], "a"), (model["b"], "b")]
    assert [hasattr(model[n], "fqt_recipe") for n in ("a", "b")] == [False, True]
    fqt.quantize_(model, Recipe(rules=[Rule("a", "bhq4")]), filter_fn=lambda m, n: n == "b")  # it has the last word
    assert type(model["a"]) is nn.Linear
    assert model["b"].fqt_recipe.grad_input is None
    with pytest.raises(ConversionError, match="filter_fn"):
        fqt.quantize_(nn.Linear(2, 2), "psq4", filter_fn=lambda m, n: False)


def test_a_filter_that_fails_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(AttributeError):
        fqt.quantize_(model, "psq4", filter_fn=lambda m, n: n == "0" or m.nothing)
    assert type(model[0]) is nn.Linear


class Stubborn(nn.Linear):
    """Refuses every other class."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "__class__":
            raise TypeError("I stay what I am")
        super().__setattr__(name, value)


def state(model: nn.Module) -> list:
    return [(type(m), dict(vars(m))) for m in model.modules()]


def test_all_or_nothing() -> None:
    """The last of several layers cannot be changed: all keep their classes, attributes and patches."""
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 4), Stubborn(4, 4))
    old = model[1].forward
    model[1].forward = lambda x: old(x)
    before = state(model)
    with pytest.raises(ConversionError, match="nothing was changed: TypeError: I stay"):
        fqt.quantize_(model, "psq4")
    assert state(model) == before
    fqt.quantize_(model, "psq4", filter_fn=lambda m, _: not isinstance(m, Stubborn))
    before = state(model)
    with pytest.raises(ConversionError, match="nothing was changed"):
        fqt.quantize_(model, "bhq4")
    assert state(model) == before
    model[2].__dict__["forward"] = None  # is put back too
    model.append(fqt.quantize_(nn.Linear(2, 2), "psq4"))
    object.__setattr__(model[3], "__class__", type("Odd", (Stubborn, type(model[3])), {}))
    before = state(model)
    with pytest.raises(ConversionError, match="nothing was changed"):
        fqt.restore_(model)
    assert state(model) == before
