"""What is kept between products: exact where it is a mask, unbiased where it is codes, and all of it reversible."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fqt
from fqt.errors import ConversionError, FqtError
from fqt.kernels.packing import PACKED, pack, unpack
from fqt.nn.between.codes import GROUP, WIDTHS, Flags, Numbers

DRAWS = 400


class Calls(nn.Module):
    """A model whose forward is one function."""

    def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList([nn.Parameter(p) for p in parameters])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.tensors)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, x: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """Of the input and all parameters, of one pass."""
    leaves = [x.detach().requires_grad_(), *model.parameters()]
    output = model(leaves[0])
    upstream = drawn(*output.shape, seed=9) if upstream is None else upstream
    for leaf in leaves:
        leaf.grad = None
    output.backward(upstream.to(output.dtype))
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = model(x.detach().clone().requires_grad_())
    del output
    return sum(found.values())


# ---- how it is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1001])
def test_packing_is_undone(bits: int, n: int) -> None:
    numbers = torch.randint(2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = pack(numbers, bits)
    assert packed.numel() == -(-n * bits // 8)
    assert torch.equal(unpack(packed, bits, n), numbers)
    if n > 8 and bits < 8:
        assert int(packed[0]) & (2**bits - 1) == int(numbers[0])


FORMS = {
    "rows": drawn(5, 77),
    "image": drawn(2, 3, 9, 5),
    "channels_last": drawn(2, 3, 9, 5).contiguous(memory_format=torch.channels_last),
    "turned": drawn(4, 5, 6).permute(2, 0, 1),
    "gaps": drawn(8, 40)[:, ::2],
    "one": drawn(1),
    "scalar": drawn(1)[0],
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_numbers_and_flags_come_back(name: str, bits: int) -> None:
    x = FORMS[name]
    kept = Numbers.of(x, bits, torch.tensor(4))
    assert kept.values().shape == kept.variance().shape == x.shape
    assert ((kept.values() - x).abs() <= (12 * kept.variance()).sqrt() * 0.5001 + 1e-6).all()
    assert torch.equal(Flags.of(x > 0).values(), x > 0)
    assert torch.equal(kept.values(), Numbers.of(x, bits, torch.tensor(4)).values())
    if name in ("channels_last", "turned"):
        assert kept.values().stride() == x.stride()


@pytest.mark.parametrize("bits", WIDTHS)
def test_numbers_are_unbiased_and_their_variance_is_known(bits: int) -> None:
    """Means of 400 draws of 1,024 entries: |z| ≤ 6 each, false alarms under 1e-5 in all; the variance to 5 %."""
    x = drawn(8, 128) * torch.logspace(-2, 2, 8)[:, None]
    draws = torch.stack([Numbers.of(x, bits, torch.tensor(s)).values() for s in range(DRAWS)]).double()
    variance = Numbers.of(x, bits, torch.tensor(0)).variance().double()
    z = (draws.mean(0) - x) / (variance / DRAWS).sqrt()
    assert z.abs().max() < 6
    assert abs(float(((draws - x).square().mean(0) / variance).mean()) - 1) < 0.05


def test_a_group_with_nan_is_nan_and_a_constant_one_exact() -> None:
    x = torch.full((3 * GROUP,), 2.5)
    x[0] = torch.nan
    x[2 * GROUP :] = drawn(GROUP)
    values = Numbers.of(x, 2, torch.tensor(1)).values()
    assert values[:GROUP].isnan().all()
    assert (values[GROUP : 2 * GROUP] == 2.5).all()
    assert values[2 * GROUP :].isfinite().all()


# ---- exact operations ----------------------------------------------------------------------------------------

IMAGE = (3, 4, 9, 10)
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu": lambda x: x.relu(),
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "relu_": lambda x: (x * 1).relu_(),
    "relu of a view in place": lambda x: (x * 1)[1:].relu_(),
    "relu6": lambda x: F.relu6(x * 4),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu in place": lambda x: F.leaky_relu(x * 1, 0.2, inplace=True),
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout of all": lambda x: F.dropout(x, 1.0),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d padded": lambda x: F.max_pool2d(x, (3, 2), 2, (1, 0), ceil_mode=True),
    "max_pool2d dilated": lambda x: F.max_pool2d(x, 3, 1, 1, 2),
    "max_pool2d of many": lambda x: F.max_pool2d(x, 5, 1),
    "max_pool2d and where": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", EXACT)
def test_decisions_are_exact(name: str, last: bool, dtype: torch.dtype) -> None:
    """Outputs and gradients bit for bit, in both modes; a NaN and zeros go where torch lets them."""
    x = drawn(*IMAGE).to(dtype)
    x[0, 0, 0, :2] = 0.0
    if name != "relu6":  # where torch's vectors and its scalars differ
        x[0, 1, 0, 0] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    model = Calls(EXACT[name])
    for training in (True, False):
        model.train(training)
        found = []
        for bits in (8, None):
            fqt.compress_(model, bits)
            torch.manual_seed(3)
            found.append([model(x), *gradients(model, x)])
        for mine, torchs in zip(*found, strict=True):
            assert torch.equal(mine.nan_to_num(7), torchs.nan_to_num(7))
        assert found[0][0].stride() == found[1][0].stride()


def test_masks_are_an_eighth_of_a_byte() -> None:
    x = drawn(8, 4, 32, 32)
    for function, most in ((F.relu, 1 / 8), (F.dropout, 1 / 8), (lambda x: F.max_pool2d(x, 3, 2, 1), 1 / 8)):
        assert kept_bytes(fqt.compress_(Calls(function)), x) <= most * x.numel()


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns while it lasts."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple) else (found,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.itemsize)
        return found


@pytest.mark.parametrize("last", [False, True])
def test_pooling_a_batch_makes_nothing_larger_than_the_batch(last: bool) -> None:
    """Places in int64, twice its bytes, were the peak of a step; and a part at a time gives torch's bits."""
    generator = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn((7, 16, 128, 128), generator=generator) for _ in range(3))
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    pool = nn.Sequential(nn.MaxPool2d(3, 1, 1))

    def derivatives() -> tuple[Tensor, ...]:
        above = v.clone().requires_grad_()
        y = pool(x)
        (first,) = torch.autograd.grad(y, x, above, create_graph=True)
        (second,) = torch.autograd.grad(first, above, w)
        return y, first, second

    plain = derivatives()
    fqt.compress_(pool, 2)
    assert all(map(torch.equal, derivatives(), plain))
    with _Largest() as seen:
        pool(x).backward(v)
    assert seen.bytes == x.numel() * x.itemsize


def test_double_backward_of_masks_is_right_and_of_codes_refused() -> None:
    x = drawn(64).requires_grad_()

    def second(model: nn.Module) -> Tensor:
        (first,) = torch.autograd.grad((model(x) * x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    model = Calls(F.relu)
    assert torch.equal(second(fqt.compress_(model)), second(fqt.compress_(model, None)))
    model = fqt.compress_(Calls(F.gelu))
    with pytest.raises(FqtError, match="double backward"):
        second(model)
    assert second(model.eval()).isfinite().all()


# ---- unbiased operations -------------------------------------------------------------------------------------

W, B = drawn(6, seed=1) + 1, drawn(6, seed=2)
UNBIASED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[Tensor, ...]]] = {
    "gelu": (F.gelu, (4, 6), ()),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), (4, 6), ()),
    "silu": (F.silu, (4, 6), ()),
    "mish": (F.mish, (4, 6), ()),
    "hardswish": (F.hardswish, (4, 6), ()),
    "elu": (lambda x: F.elu(x, 0.7), (4, 6), ()),
    "softplus": (lambda x: F.softplus(x, 2.0), (4, 6), ()),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (5, 6), (W, B)),
    "batch_norm of images": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (2, 6, 2, 2), (W, B)),
    "batch_norm plain": (lambda x: F.batch_norm(x, None, None, training=True), (5, 6), ()),
    "batch_norm frozen": (lambda x, w, b: F.batch_norm(x, B, W.square(), w, b, False), (5, 6), (W, B)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), (4, 6), (W, B)),
    "layer_norm plain": (lambda x: F.layer_norm(x, (2, 3)), (4, 2, 3), ()),
    "layer_norm without weight": (lambda x, b: F.layer_norm(x, (2, 3), None, b), (4, 2, 3), (B.view(2, 3),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), (2, 2, 6), (W,)),
    "rms_norm plain": (lambda x: F.rms_norm(x, (6,)), (4, 6), ()),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (2, 6, 4), (W, B)),
    "softmax": (lambda x: F.softmax(x, -1), (4, 6), ()),
    "softmax along rows": (lambda x: torch.softmax(x, 0), (4, 6), ()),
    "log_softmax": (lambda x: x.log_softmax(-1), (4, 6), ()),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, 0, -100, 3])), (4, 6), ()),
    "cross_entropy weighted": (
        lambda x: F.cross_entropy(x, torch.tensor([1, 0, 5, 3]), W.abs(), reduction="sum"),
        (4, 6),
        (),
    ),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, x.roll(1, 2), x.flip(2), is_causal=True),
        (1, 2, 5, 8),
        (),
    ),
}


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", UNBIASED)
def test_gradients_are_unbiased(name: str, bits: int) -> None:
    """Means of 400 against the exact gradient: |z| ≤ 6.5 by entry, false alarms under 1e-6 for 3,000 entries."""
    function, shape, parameters = UNBIASED[name]
    x = drawn(*shape, seed=3)
    torch.manual_seed(5)
    model = Calls(function, *parameters)
    exact, output = gradients(model, x), model(x)
    fqt.compress_(model, bits)
    assert torch.equal(model(x), output)
    drawn_ = [gradients(model, x) for _ in range(DRAWS)]
    for truth, *found in zip(exact, *drawn_, strict=True):
        sample = torch.stack(found).double()
        error = sample.std(0) / math.sqrt(DRAWS)
        assert ((sample.mean(0) - truth).abs() <= 6.5 * error + 2e-6 * truth.abs().max()).all()
    assert any(torch.stack(f).std(0).max() > 0 for f in zip(*drawn_, strict=True))


def test_the_test_sees_a_sum_that_meets_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the term that is taken off, a group norm over 12 entries in 2 bits is caught."""
    from fqt.nn.between import functions

    monkeypatch.setattr(functions, "_off", lambda d_x, *_: d_x)
    with pytest.raises(AssertionError):
        test_gradients_are_unbiased("group_norm", 2)


# ---- models --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Modules and functions, with a product between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.GELU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv1(x))), 2)
        return self.head(self.act(self.conv2(x)).mean((2, 3)))


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), drawn(4, 3, 8, 8)


def test_reversible_and_the_state_dict_stays() -> None:
    model, x = net()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    truth = gradients(model, x)
    assert fqt.compress_(model, 4) is model
    assert list(model.state_dict()) == list(before)
    assert isinstance(model, Net)
    assert repr(model) == repr(Net())
    assert kept_bytes(model, x) < kept_bytes(fqt.compress_(copy.deepcopy(model), None), x)
    fqt.compress_(model, None)
    assert [type(m) for m in model.modules()] == kinds
    assert not any("fqt_bits" in vars(m) for m in model.modules())
    model.load_state_dict(before)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), truth, strict=True))


@pytest.mark.parametrize("first", ["quantize", "compress"])
def test_in_any_order_with_quantize(first: str) -> None:
    model, x = net()
    steps = [lambda: fqt.quantize_(model, "shq8"), lambda: fqt.compress_(model, 2)]
    for step in steps if first == "quantize" else steps[::-1]:
        step()
    sizes = [kept_bytes(model, x)]
    sizes += [kept_bytes(fqt.compress_(model, None), x)]
    fqt.compress_(model, 2)
    fqt.restore_(model)
    assert type(model.head) is nn.Linear
    sizes += [kept_bytes(model, x), kept_bytes(fqt.compress_(model, None), x)]
    assert sizes[0] < min(sizes[1:3]) <= max(sizes[1:3]) < sizes[3]


def test_copies_and_pickles_stay_compressed() -> None:
    model, x = net()
    fqt.compress_(fqt.quantize_(model, "shq8"), 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept_bytes(twin, x) == kept_bytes(model, x)
        fqt.compress_(twin, None)
        assert type(twin) is Net
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert kept_bytes(torch.load(buffer, weights_only=False), x) == kept_bytes(model, x)


def test_eval_and_no_grad() -> None:
    """In eval mode the gradient is exact and nothing is drawn; without gradients nothing changes."""
    model, x = net()
    model.eval()
    truth, output = gradients(model, x), model(x)
    fqt.compress_(model, 2)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), truth, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(model(x), output)
    with torch.inference_mode():
        assert torch.equal(model(x), output)


def test_the_seed_decides() -> None:
    model, x = net()
    fqt.compress_(model, 2)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(gradients(model, x)[1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class Checkpointed(nn.Module):
    """A block recomputed as a module or as a function, with dropout after it drawing from the same generator."""

    def __init__(self, as_function: bool, reentrant: bool | None) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.5))
        self.as_function, self.reentrant = as_function, reentrant

    def forward(self, x: Tensor) -> Tensor:
        part = (lambda x: F.dropout(F.gelu(self.block(x)), 0.5)) if self.as_function else self.block
        x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return F.silu(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("as_function", [True, False])
def test_checkpoints(as_function: bool, reentrant: bool) -> None:
    """Masks of both passes agree: a gradient is zero where the output is; a module's gradient is bit for bit."""
    torch.manual_seed(0)
    model, x = fqt.compress_(Checkpointed(as_function, reentrant), 2), drawn(8, 16)
    torch.manual_seed(1)
    found = gradients(model, x)
    if not as_function:
        model.reentrant = None
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), found, strict=True))
    fqt.compress_(model, None)
    model.reentrant = reentrant
    exact: list[Tensor] = []
    for seed in range(2):
        torch.manual_seed(seed)
        exact = gradients(model, x)
    assert len(exact) == len(found)


def test_saved_tensors_may_be_packed_by_others() -> None:
    model, x = net()
    fqt.compress_(model, 4)
    torch.manual_seed(1)
    truth = gradients(model, x)
    torch.manual_seed(1)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast: bool) -> None:
    """One graph; masks exact and codes unbiased, so that the mean of 60 gradients is near the exact one's."""
    torch._dynamo.reset()
    model, x = net()
    model = fqt.quantize_(model, "qat")
    context: Any = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with context:
        exact = gradients(model, x)
        whole = kept_bytes(torch.compile(model, fullgraph=True), x)
    torch._dynamo.reset()
    compiled = torch.compile(fqt.compress_(model, 4), fullgraph=True)
    with context:
        assert kept_bytes(compiled, x) < whole
        found = [gradients(compiled, x) for _ in range(60)]
    for truth, *sample in zip(exact, *found, strict=True):
        each = torch.stack(sample).double()
        noise = each.var(0).sum() / 60
        assert (each.mean(0) - truth).square().sum() <= 9 * noise + (0.06 * truth.norm()) ** 2
    assert torch.stack([f[1] for f in found]).std(0).max() > 0


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_under_autocast_the_forward_is_torchs() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.RMSNorm(32), nn.Softmax(-1)]
    model, x = nn.Sequential(*layers), drawn(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        truth, grads = model(x), gradients(model, x)
        fqt.compress_(model)
        assert torch.equal(model(x), truth)
        assert model(x).dtype == truth.dtype
        found = gradients(model, x)
    for a, b in zip(found, grads, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.05 * b.norm()


def test_torch_func_runs_torchs_own() -> None:
    model, x = net()
    model.bn.eval()
    weights = dict(model.named_parameters())

    def loss(weights: Any) -> Tensor:
        return torch.func.functional_call(model, weights, x).square().sum()

    truth = torch.func.grad(loss)(weights)
    fqt.compress_(model, 2)
    found = torch.func.grad(loss)(weights)
    assert all(torch.equal(found[name], g) for name, g in truth.items())


def test_refusals() -> None:
    for bits in (1, 3, 16, "8", 2.5, True):
        with pytest.raises(FqtError, match="bits must be"):
            fqt.compress_(Net(), bits)  # type: ignore[arg-type]
    with pytest.raises(FqtError, match=r"takes the model first, a torch\.nn\.Module"):
        fqt.compress_(3)  # type: ignore[type-var]
    with pytest.raises(ConversionError, match="nothing runs between"):
        fqt.compress_(nn.Linear(3, 3))
    model = fqt.compress_(Net())
    model.act.__class__ = type("Above", (type(model.act),), {})
    with pytest.raises(ConversionError, match="Above was put on top"):
        fqt.compress_(model, None)
    assert fqt.nn.between.is_compressed(model)


def test_explain_says_what_is_kept_in_full() -> None:
    model, x = net()
    fqt.quantize_(model, "shq8")
    before = fqt.explain(model, x)
    fqt.compress_(model, 8)
    assert any("numbers in 8 bits" in note for note in fqt.explain(model).notes)
    after = fqt.explain(model, x)
    full = {row.operation for row in before.kept if row.form == "in full"}
    assert {"Relu", "NativeBatchNorm", "Gelu", "MaxPool"} <= {name.split("2D")[0] for name in full}
    assert {"Rectified", "BatchNormalized", "Elementwise", "Pooled"} <= {r.operation for r in after.kept}
    assert sum(r.bytes for r in after.kept) < 0.5 * sum(r.bytes for r in before.kept)
    assert "kept for backward" in str(after)
    assert {r.layer for r in before.kept if r.operation == "Relu"} == {""}


def test_diagnose_tells_the_noise_of_what_is_kept() -> None:
    """With exact products all of the variance is that of the codes: two estimates of it, within a factor of 4."""
    model, _ = net()
    fqt.quantize_(model, "shq8")
    batches = [drawn(8, 3, 8, 8, seed=s) for s in range(3)]
    loss = lambda model, x: model(x).square().sum()
    plain = fqt.diagnose(model, loss, batches, draws=4, table=0)
    fqt.compress_(model, 2)
    found = fqt.diagnose(model, loss, batches, draws=4, table=1)
    assert plain.total.kept.value == 0
    assert found.total.sampling == plain.total.sampling
    assert found.total.kept.value > 3 * plain.total.quantization.value
    assert 0.25 < found.total.quantization.value / found.total.kept.value < 4
    assert found.table is not None
    assert "of it kept codes" in str(found)
    assert {m.fqt_bits for m in model.modules() if fqt.nn.between.is_compressed(m)} == {2}
