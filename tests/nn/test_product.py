"""Products said in full: what a recipe makes of them, what layers compute, and what stays unbiased."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fqt
from fqt import FqtError, Product, Recipe, quantizer
from fqt.kernels.linear_map import DenseMap
from fqt.kernels.philox import as_seed
from fqt.kernels.rotation import Rotation
from fqt.nn import dump_recipe, load_recipe
from fqt.nn.arithmetic import again
from fqt.nn.product import SAVED
from fqt.nn.turning import FORWARD_SIGNS
from fqt.quant import Leverage, LowSequency, Rotated, Sequency

from . import checks
from .cases import both

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by jvp
FORWARD = {"input": "psq8", "weight": "psq8@channel"}
RECIPES = {
    "grad_input rotated": Recipe(**FORWARD, grad_input=Product("psq4", rotate=16), grad_weight="psq4@channel"),
    "all rotated": Recipe(
        output=Product("psq4", "psq4@channel", rotate=8),
        grad_input=Product("psq4", "ptq4", rotate=16),
        grad_weight=Product("psq4", "ptq4", rotate=16),
    ),
    "rows mixed too": Recipe(**FORWARD, grad_input="thq4d", grad_weight=Product("shq4d@channel", rotate=16)),
    "blocks": Recipe(
        input="mxfp4",
        weight="mxfp4",
        grad_input=Product("mxfp4", "mxfp4"),
        grad_weight=Product("mxfp4", "mxfp4"),
    ),
    "rotated blocks": Recipe(grad_weight=Product("nvfp4", "nvfp4", rotate=16)),
    "folded here": Recipe(**FORWARD, grad_input=Product("psq4", fold="always"), grad_weight="psq4@channel"),
    "right alone": Recipe(**FORWARD, grad_input=Product(None, "ptq4"), grad_weight=Product("psq4", "psq4d")),
    "right best": Recipe(**FORWARD, grad_input=Product("psq4", "ptq4x"), grad_weight=Product("psq4", "psq4x")),
    "float forward": Recipe(input=None, weight=None, grad_weight=Product("psq4", "ptq4", rotate=8)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_written_and_read(name: str) -> None:
    recipe = RECIPES[name]
    assert load_recipe(dump_recipe(recipe)) == recipe
    assert Recipe.of_text(recipe.text) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(replace(recipe)) == hash(recipe)
    assert replace(recipe, grad_input=None, grad_weight=None).product("output") == recipe.product("output")


def test_what_a_recipe_makes_of_a_product() -> None:
    psq4 = quantizer("psq4")
    assert Recipe(grad_input=Product("psq4")) == Recipe(grad_input="psq4")
    turned = Recipe(grad_input=Product("psq4", rotate=128), grad_weight=Product("psq4", rotate=64))
    assert turned.grad_input == quantizer("int4rht")  # this product brings its rotation in its quantizer
    assert turned.product("grad_input") == Product(quantizer("int4rht"), SAVED, 128, fold="never")
    assert (
        turned.product("grad_weight").left
        == turned.operand("grad_weight")
        == psq4.with_transform(Rotated(block=64))
    )
    assert turned.with_operand("grad_weight", psq4) == turned
    assert (
        Recipe(grad_weight="int4rht").product("grad_weight").rotate is None
    )  # turned back before it is multiplied
    written = Recipe(output=Product("psq8", "psq8@channel", rotate=32))
    assert written == Recipe(**FORWARD, rotate=32)
    assert written.output is None
    assert written.product("output") == Product(written.input, written.weight, 32, fold="never")
    assert Recipe(fold="always", grad_input=Product("psq4", fold="auto")).product("grad_input").fold == "auto"
    assert Recipe(grad_input=Product(None, "ptq4")).product("grad_input").right.scale.mode == "symmetric"


def test_a_rotation_along_tokens_is_not_the_contraction_of_grad_input() -> None:
    """Rows are channels, as the name says: the weight has nothing to take, and its codes serve."""
    recipe = Recipe(**FORWARD, grad_input=Product("hlq4@channel", keep=Leverage(0.5)))
    assert load_recipe(dump_recipe(recipe)) == Recipe.of_text(recipe.text) == replace(recipe) == recipe
    assert recipe.product("grad_input").rotate is None
    assert Recipe(grad_input="hlq4@channel").product("grad_input").rotate is None
    assert Recipe(grad_input="hlq4@token").product("grad_input").rotate == 16
    assert again("grad_input", DenseMap(), recipe) is None
    assert largest_z(Recipe(**FORWARD, grad_input="hlq4@channel"), "linear") < 5


def test_a_recipe_pickled_before_there_were_products_is_read() -> None:
    recipe = Recipe(grad_input="bhq4")
    state = {k: v for k, v in recipe.__getstate__().items() if k != "rotate"}
    old = Recipe.__new__(Recipe)
    old.__setstate__(state)
    assert old == recipe
    assert old.product("output").rotate is None


def test_a_table_is_a_product() -> None:
    table = {
        "output": {"left": "psq4", "right": "psq4@channel", "rotate": 32},
        "grad_weight": {"left": {"bits": 4}, "right": "ptq4", "rotate": 16, "fold": "always"},
    }
    wanted = Recipe(
        output=Product("psq4", "psq4@channel", rotate=32),
        grad_weight=Product("psq4", "ptq4", rotate=16, fold="always"),
    )
    assert load_recipe(table) == wanted
    over = load_recipe({"base": "ufp4", "output": {"left": "psq8", "right": "psq8"}})
    assert (over.product("output").left, over.rotate) == (Recipe(input="psq8").input, None)
    assert over.grad_input == load_recipe("ufp4").grad_input


SAYS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "rotate": (lambda: Product("psq4", rotate=12), ("12", "power of two")),
    "fold": (lambda: Product("psq4", fold="yes"), ("yes", "always")),
    "rotate of float": (lambda: Recipe(input=None, rotate=32), ("rotate", "both")),
    "nothing to rotate": (lambda: Recipe(grad_input=Product(None, rotate=32)), ("grad_input", "rotate=None")),
    "along rows": (lambda: Recipe(grad_weight=Product("psq4@token", rotate=32)), ("grad_weight", "token")),
    "two blocks": (lambda: Recipe(grad_input=Product("hlq4", rotate=32)), ("16", "32")),
    "right transform": (lambda: Recipe(grad_input=Product("psq4", "shq4")), ("transform", "rotate=128")),
    "right axis": (lambda: Recipe(grad_input=Product("psq4", "psq4@channel")), ("axis",)),
    "right float": (lambda: Recipe(grad_input=Product("psq4", None)), ("saved", "grad_input")),
    "output saved": (lambda: Recipe(output=Product("psq4")), ("output", "Product(left, right, rotate)")),
    "output and input": (
        lambda: Recipe(input="psq4", weight=None, output=Product("psq8", "psq8")),
        ("output says what input and weight are", "say one"),
    ),
    "output and its rotation": (lambda: Recipe(rotate=8, output=Product("psq8", "psq8")), ("rotate is", "say one")),
    "the default, said": (lambda: Recipe(input="ptq8", output=Product("psq8", "psq8")), ("input is", "say one")),
    "output and input in a table": (
        lambda: load_recipe({"base": "luq", "input": "psq4", "output": {"left": "psq8", "right": "psq8"}}),
        ("output says what input is", "say one"),
    ),
    "table without left": (
        lambda: load_recipe({"grad_input": {"right": "ptq4", "rotate": 16}}),
        ("grad_input", "lacks left", "grad_output", "'none'"),
    ),
    "fold without left": (lambda: load_recipe({"grad_weight": {"bits": 4, "fold": "always"}}), ("lacks left",)),
    "output without right": (
        lambda: load_recipe({"output": {"left": "psq8"}}),
        ("output", "lacks right", "weight"),
    ),
    "product of an input": (lambda: Recipe(input=Product("psq4")), ("input", "Quantizer")),
    "word": (lambda: load_recipe({"grad_input": {"left": "psq4", "keeps": 1}}), ("keeps", "rotate")),
}


@pytest.mark.parametrize("name", SAYS)
def test_messages(name: str) -> None:
    make, words = SAYS[name]
    with pytest.raises(FqtError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def problem(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, an input and a gradient of its output whose rows differ in size."""
    torch.manual_seed(2)
    if kind == "linear":
        return (
            nn.Linear(20, 12),
            torch.randn(2, 24, 20, requires_grad=True),
            torch.randn(2, 24, 12) * torch.randn(2, 24, 1).exp(),
        )
    if kind == "grouped":
        return nn.Conv2d(4, 6, 3, groups=2), torch.randn(4, 4, 5, 5, requires_grad=True), torch.randn(4, 6, 3, 3)
    return nn.ConvTranspose2d(4, 6, 2), torch.randn(3, 4, 3, 3, requires_grad=True), torch.randn(3, 6, 4, 4)


def gradients(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(layer(x), (x, layer.weight), upstream)


def largest_z(recipe: Recipe, kind: str, draws: int = 200) -> float:
    """Of the layer's gradient against the QAT gradient, over all entries."""
    layer, x, upstream = problem(kind)
    exact = gradients(fqt.quantize_(layer, checks.qat_of(recipe)), x, upstream)
    fqt.quantize_(layer, recipe)
    found = [gradients(layer, x, upstream) for _ in range(draws)]
    largest = 0.0
    for kept, truth in zip(zip(*found, strict=True), exact, strict=True):
        sample = torch.stack(kept).double()
        error = sample.std(0) / draws**0.5 + 1e-6 * truth.abs().max()
        largest = max(largest, float(((sample.mean(0) - truth) / error).abs().max()))
    return largest


@pytest.mark.parametrize("kind", ["linear", "grouped", "transposed"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_is_unbiased(name: str, kind: str) -> None:
    """200 draws; the largest of at most 1,200 z-scores stays below 5: a false alarm in 1e-3 per case."""
    assert largest_z(RECIPES[name], kind) < 5


@pytest.mark.parametrize("right", [SAVED, "ptq4"])
def test_a_float_input_under_a_rotation_and_tokens_that_are_kept_by_sequency(right: str) -> None:
    """Quantized again both operands of the product are turned; left float, grad_output is turned back first."""
    product = Product("psq4", right, rotate=8, keep=Sequency(6, 8))
    assert largest_z(Recipe(input=None, weight=None, grad_weight=product), "linear") < 5


@pytest.mark.parametrize("left", [None, "psq4"])
@pytest.mark.parametrize("saved", [None, "psq8"])
def test_an_operand_is_what_explain_says_whatever_rows_are_kept(left: str | None, saved: str | None) -> None:
    """A float input stays float in the Walsh domain, and one that has codes does not: both to the last bit."""
    layer, x, upstream = problem("linear")
    low = LowSequency(4, 8)
    recipe = Recipe(input=saved, weight=None, grad_weight=Product(left, keep=low))
    row = fqt.explain(fqt.quantize_(layer, recipe)).products[2]
    assert ("quantized again to 8 bits" in row.why) == (again("grad_weight", DenseMap(), recipe) is not None)
    assert (again("grad_weight", DenseMap(), recipe) is not None) == (saved is not None)
    assert (row.arithmetic == "float") == (None in (left, saved))
    truth = low.turned(upstream).flatten(0, 1).T @ low.turned(x).flatten(0, 1)
    found = gradients(layer, x, upstream)[1]
    assert torch.equal(found, truth) == (left is None and saved is None)


def test_blocks_of_neighbouring_tokens_do_not_cross_samples_under_a_rotation() -> None:
    """Samples of 6 tokens, kept in blocks of 4 by the two lowest rows: the mean is that of each sample's own."""
    torch.manual_seed(3)
    layer, x, upstream = nn.Linear(9, 5), torch.randn(3, 6, 9), torch.randn(3, 6, 5)
    low = LowSequency(2, 4)
    recipe = Recipe(input=None, weight=None, grad_weight=Product("psq8", rotate=8, keep=low))
    fqt.quantize_(layer, recipe)
    found = [torch.autograd.grad(layer(x), layer.weight, upstream)[0].double() for _ in range(200)]
    sample, wanted = torch.stack(found), low.turned(upstream).flatten(0, 1).T @ low.turned(x).flatten(0, 1)
    error = sample.std(0) / 200**0.5
    assert float(((sample.mean(0) - wanted) / error).abs().max()) < 5


def test_a_right_operand_to_nearest_is_biased() -> None:
    """What the test above would see; the quantizer says so by its name."""
    assert largest_z(Recipe(**FORWARD, grad_weight=Product("psq8", "ptq3n")), "linear") > 8


@pytest.mark.parametrize("name", RECIPES)
def test_integers_are_the_values_of_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, upstream = problem("linear")
    fqt.quantize_(layer, RECIPES[name])

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return layer(x), *gradients(layer, x, upstream)

    found = run()
    checks.simulate(monkeypatch)
    for a, b in zip(found, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6 * float(b.detach().abs().max()))


def test_explain_says_what_runs_on_integers() -> None:
    rows = fqt.explain(fqt.quantize_(nn.Linear(64, 64), RECIPES["all rotated"])).products
    # Rows of four bits whose features are rotated in blocks of 16 have a name.
    assert [row.operands for row in rows] == ["psq4n × psq4n@channel", "hlq4 × ptq4", "hlq4 × ptq4"]
    assert "features rotated in blocks of 8" in rows[0].why
    turned = fqt.explain(fqt.quantize_(nn.Linear(64, 64), "thq4")).products
    assert "weight turned too, and quantized again to 8 bits" in turned[1].why
    assert all(row.why.startswith("both operands are integer codes") for row in rows)
    conv = fqt.explain(fqt.quantize_(nn.Conv2d(16, 16, 3), RECIPES["all rotated"])).products
    assert [row.arithmetic for row in conv] == ["integer", "integer", "simulated"]
    assert "other positions" in conv[2].why


def test_the_forward_pass_multiplies_rotated_features_with_fixed_signs() -> None:
    """Bit for bit what the layer without rotation makes of features that were rotated before."""
    layer, x, _ = problem("linear")
    plain = nn.Linear(20, 12)
    rotation = Rotation.draw(as_seed(FORWARD_SIGNS, x.device), 20, 8, torch.float32)
    with torch.no_grad():
        plain.bias.copy_(layer.bias)
        plain.weight.copy_(rotation.columns(layer.weight))
        turned = rotation.columns(x.flatten(0, 1)).view_as(x)
    fqt.quantize_(plain, Recipe(**FORWARD))
    fqt.quantize_(layer, Recipe(**FORWARD, rotate=8))
    assert torch.equal(layer(x), plain(turned))


@pytest.mark.parametrize("kind", ["linear", "grouped", "transposed"])
def test_a_rotated_forward_pass_is_exact_in_eval_mode_under_every_transform(kind: str) -> None:
    layer, x, upstream = problem(kind)
    fqt.quantize_(layer, Recipe(**FORWARD, rotate=8, grad_input="psq4")).eval()
    wanted = gradients(layer, x, upstream)
    state = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, state, (x,)) * upstream).sum()

    by_state, by_x = torch.func.grad(loss, argnums=(0, 1))(state, x.detach())
    torch.testing.assert_close((by_x, by_state["weight"]), wanted)
    # straight through: what the layer is linear in are the values that it multiplies
    tangent = torch.randn_like(x)
    output = torch.func.jvp(lambda x: layer(x), (x.detach(),), (tangent,))[1]
    torch.testing.assert_close((output * upstream).sum(), (tangent * wanted[0]).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("role", ["grad_input", "grad_weight"])
def test_a_products_own_fold_is_what_folds(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said for one product, "always" also holds where it is simulated; the recipe's "auto" would ask the cost."""
    product = {"left": "psq8", "right": "saved", "fold": "always"}
    recipe = load_recipe({"input": "psq8n", "weight": "psq8n", role: product, "fold": "auto"})
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    for integer, simulated in both(fqt.quantize_(layer, recipe), x, monkeypatch):
        torch.testing.assert_close(integer, simulated, rtol=1e-4, atol=1e-5)
