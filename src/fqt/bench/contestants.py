"""Who is measured on a layer or a step: the float baselines, torchao's int8 training, and ours with each recipe.

Everyone starts from the same weights and batch, and gets a layer's input and gradient in the dtype that the
neighbouring layers would have in its own setting: float32, or bfloat16 under autocast.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from fqt.bench.workloads import SEED, Layer, Step, build, draw
from fqt.nn import Recipe, Rule, compress_, explain, inductor_options, load_recipe, quantize_, restore_
from fqt.nn.product import PRODUCTS, SAVED
from fqt.quant import Quantizer, quantizer
from fqt.quant.transform import Kept

Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class _Graph:
    """A pass as a CUDA graph: what it returns and the gradients that it leaves lie in the graph's memory."""

    graph: torch.cuda.CUDAGraph
    result: Tensor
    gradients: list[tuple[Tensor, Tensor | None]]

    @staticmethod
    def of(passed: Callable[[], Tensor], leaves: Sequence[Tensor]) -> _Graph:
        """Captures a pass, after a few in which kernels are compiled and chosen."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                passed()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = passed()
        return _Graph(graph, result, [(leaf, leaf.grad) for leaf in leaves])

    def replayed(self) -> Tensor:
        """What the pass returns, for its input as it is now; the gradients are the leaves' again."""
        self.graph.replay()
        for leaf, gradient in self.gradients:
            leaf.grad = gradient
        return self.result


class Unavailable(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to train the model of a workload.

    Attributes:
        name: unique within a case.
        group: "fp32", "bf16", "torchao" or "ours".
        convert: what is done to the float model, in place; raises `Unavailable`.
        recipe: of ours, as a user names it.
        spares: whether ours leaves the layers float that `fqt.explain(model).slower` names.
        autocast: whether the forward pass runs under bfloat16 autocast.
        compiled: whether `torch.compile` is applied.
        graphed: whether a pass is captured as a CUDA graph once and replayed, so that the host launches one thing.
        short: whether the model itself and its input are bfloat16.
        around: what the forward pass runs in besides autocast.
        slack: by product, "output", "grad_input" and "grad_weight", how many times the errors of 8-bit integers it
            may have; 1 where it is not named.
    """

    name: str
    group: str
    convert: Callable[[nn.Module], nn.Module] = lambda model: model
    recipe: str | None = None
    spares: bool = False
    autocast: bool = False
    compiled: bool = False
    graphed: bool = False
    short: bool = False
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    slack: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        """The recipe in records and tables."""
        return f"{self.recipe} spared" if self.spares else self.recipe


def contestants(
    recipes: Sequence[str], device: str = "cpu", keep: int | None = None, spare: bool = False
) -> list[Contestant]:
    """All that take part on devices of this type, the fp32 reference first; `keep` and `spare` as in `Case`."""
    found = [
        Contestant(name="fp32", group="fp32"),
        Contestant(name="bf16", group="bf16", autocast=True),
        Contestant(name="bf16 compiled", group="bf16", autocast=True, compiled=True),
        Contestant(name="torchao int8", group="torchao", convert=_torchao, compiled=True, short=True),
    ]
    if device == "cuda":
        found += [replace(each, name=f"{each.name} graphed", graphed=True) for each in found[1:]]
        e5m2 = {"grad_input": 4.0, "grad_weight": 4.0}
        fp8 = Contestant(name="TransformerEngine fp8", group="fp8", short=True, slack=e5m2)
        found.append(replace(fp8, convert=_transformer_engine, around=_engine_autocast))
    for recipe in recipes:
        allowed = slack(load_recipe(recipe))
        ours = Contestant(name=recipe, group="ours", convert=_ours(recipe, keep), recipe=recipe, slack=allowed)
        found += [
            ours,
            replace(ours, name=f"{recipe} bf16", autocast=True),
            replace(ours, name=f"{recipe} bf16 compiled", autocast=True, compiled=True),
        ]
        if device == "cuda":
            found += [replace(each, name=f"{each.name} graphed", graphed=True) for each in found[-2:]]
        if spare:
            spared = replace(ours, name=f"{recipe} spared", convert=_ours(recipe, keep, spares=True), spares=True)
            found += [spared, replace(spared, name=f"{spared.name} bf16", autocast=True)]
    return found


def slack(recipe: Recipe) -> dict[str, float]:
    """How many times the errors of 8-bit integers each product may have.

    As many times as the worst of its quantizers errs on gaussian entries in rows of 256, against `ptq8`. Infinite
    where only a part of grad_output is kept, whose error depends on the data: only the bias tells then.
    """
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(SEED))
    usual, found = _error(quantizer("ptq8"), x), dict.fromkeys(PRODUCTS, 1.0)
    for each in (recipe, *(load_recipe(rule.recipe) for rule in recipe.rules)):
        for name, (_, saved) in PRODUCTS.items():
            product = each.product(name)
            right = each.operand(saved) if product.right == SAVED else product.right
            for q in (product.left, right):
                if isinstance(q, Quantizer):
                    error = math.inf if isinstance(q.transform, Kept) else _error(q, x) / usual
                    found[name] = max(found[name], error)
            if product.keep is not None:
                found[name] = math.inf
    return found


def _error(q: Quantizer, x: Tensor) -> float:
    return float(torch.linalg.vector_norm(q.quantize(x, seed=0).dequantize() - x))


def _ours(
    recipe: str, keep: int | None = None, spares: bool = False, noisy: bool = True
) -> Callable[[nn.Module], nn.Module]:
    def converted(model: nn.Module) -> nn.Module:
        whole = load_recipe(recipe)
        lost = explain(quantize_(model, whole)).slower if spares else ()
        if spares and not lost:
            raise Unavailable("no layer is slower on integers here")
        quantize_(model, whole if noisy else _noiseless(whole))
        for name in lost:
            restore_(model.get_submodule(name))
        return model if keep is None else compress_(model, keep)

    return converted


def noiseless(contestant: Contestant) -> Contestant:
    """The expectation of one of ours over its noise: the same forward codes, the gradient not quantized.

    Compiled if the contestant is: fusing moves bfloat16 roundings, and with them the forward codes.
    """
    assert contestant.recipe is not None
    convert = _ours(contestant.recipe, spares=contestant.spares, noisy=False)
    return replace(contestant, convert=convert, graphed=False)


def _noiseless(recipe: Recipe) -> Recipe:
    rules = tuple(Rule(rule.pattern, _noiseless(load_recipe(rule.recipe))) for rule in recipe.rules)
    return replace(recipe, grad_input=None, grad_weight=None, rules=rules)


def torchao_version() -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return None


def _torchao(model: nn.Module) -> nn.Module:
    """torchao's int8 mixed-precision training of a bfloat16 model, on every `nn.Linear`."""
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        raise Unavailable("torchao's int8 training has no convolution")
    if torchao_version() is None:
        raise Unavailable("torchao is not installed")
    try:
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
        from torchao.quantization import quantize_ as torchao_quantize_
    except Exception as error:  # whatever an installation that does not fit this torch raises
        raise Unavailable(f"torchao does not import ({error})") from error
    torchao_quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=True))
    return model


def _transformer_engine(model: nn.Module) -> nn.Module:
    """TransformerEngine's layers in place of every `nn.Linear` of a bfloat16 model, with the same weights."""
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        raise Unavailable("TransformerEngine has no convolution")
    engine = _engine()
    if not torch.cuda.get_device_capability() >= (8, 9):
        raise Unavailable("tensor cores for fp8 begin with compute capability 8.9")

    def changed(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        made = engine.Linear(*sizes[:2], bias=sizes[2], params_dtype=layer.weight.dtype, device="cuda")
        made.load_state_dict(layer.state_dict(), strict=False)
        return made

    if isinstance(model, nn.Linear):
        return changed(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        model.set_submodule(name, changed(layer))
    return model


def _engine() -> Any:
    try:
        import transformer_engine.pytorch as engine
    except Exception as error:  # not installed, or whatever an installation that does not fit this torch raises
        raise Unavailable(f"TransformerEngine does not import ({type(error).__name__})") from error
    return engine


def _engine_autocast() -> contextlib.AbstractContextManager:
    return _engine().fp8_autocast(enabled=True)


class Runner:
    """One contestant on one workload: its model, its batch, and the pass that is timed.

    Args:
        contestant: who.
        workload: on what.
        channels_last: the memory format of four-dimensional weights, inputs and gradients.
        device: where.

    Raises:
        Unavailable: the contestant does not take this workload.
    """

    def __init__(
        self,
        contestant: Contestant,
        workload: Layer | Step,
        channels_last: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.contestant, self.workload, self.device = contestant, workload, torch.device(device)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        plain = build(workload, self.device).to(memory_format=self.format)  # type: ignore[call-overload]
        dtype = torch.bfloat16 if contestant.short else torch.float32
        self.plain = contestant.convert(plain.to(self.device, dtype))
        self.model: Any = self._compiled() if contestant.compiled else self.plain
        layer = isinstance(workload, Layer)
        seen = torch.bfloat16 if contestant.autocast and layer else dtype
        self.input = self._formed(draw(workload.input, 1, self.device).to(seen)).requires_grad_(layer)
        self.above: Tensor | None = None
        self.graph: _Graph | None = None
        if isinstance(workload, Step):
            drawn = workload.target(self.input, torch.Generator().manual_seed(SEED + 2))
            self.target = drawn.to(self.device)
        # Momentum SGD in one fused pass: the optimizer is part of a step, not its subject. The small rate keeps
        # repeated steps on one batch from diverging.
        parameters = list(self.plain.parameters())
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=True)

    def _compiled(self) -> Any:
        options = inductor_options() if self.contestant.group == "ours" else None
        return torch.compile(self.plain, dynamic=False, options=options)

    def __call__(self) -> None:
        """What is timed: forward and backward, and for a step the optimizer."""
        self.backward()
        if isinstance(self.workload, Step):
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Frees the gradients, so that many contestants find room beside each other."""
        self.optimizer.zero_grad(set_to_none=True)
        self.input.grad = None

    def backward(self) -> Tensor:
        """Forward and backward; returns a layer's output or a step's loss. The gradients are the model's."""
        if not self.contestant.graphed:
            return self._passed()
        if self.graph is None:
            self.graph = _Graph.of(self._passed, [self.input, *self.plain.parameters()])
        return self.graph.replayed()

    def _passed(self) -> Tensor:
        self.forget()
        with self.setting(), self.contestant.around():
            output = self.model(self.input)
        if isinstance(self.workload, Step):
            output = self.workload.loss(output, self.target)
            output.backward()
            return output.detach()
        if self.above is None:
            self.above = self._formed(draw(tuple(output.shape), 3, self.device).to(output))
        output.backward(self.above)
        return output.detach()

    def outcome(self, seed: int = SEED) -> Outcome:
        """Output or loss, and all gradients, of one pass with the noise of `seed`; weights stay as they are.

        Returns:
            "output", "grad_input" (layers only) and "grad <parameter>"; tensors of the caller's own.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            found = {"output": self.backward()}
        trained = [(name, p) for name, p in self.plain.named_parameters() if p.requires_grad]
        gradients = {f"grad {name}": p.grad for name, p in trained}
        if isinstance(self.workload, Layer):
            gradients["grad_input"] = self.input.grad
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            raise RuntimeError(f"no gradient came back: {', '.join(missing)}")
        self.forget()
        return found | {name: g.detach() for name, g in gradients.items() if g is not None}

    def setting(self) -> contextlib.AbstractContextManager:
        """What the forward pass runs in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.contestant.autocast)

    def _formed(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.format) if x.ndim == 4 else x
