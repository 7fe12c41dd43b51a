"""The operations between products as autograd sees them: torch's own forward, and a backward from what is kept.

Written so that the gradient is linear in what is kept, or a product of two kept numbers whose bias is known:

- where a decision is kept (ReLU, dropout, max pooling in `pooled.py`) it is exact, and so is the gradient: torch's;
- an elementwise function keeps its own derivative, not its input: `grad · f′(x)` is linear in it;
- `log_softmax` and `cross_entropy` keep the probabilities p: `grad − p · Σ grad` is linear in them;
- a normalization and `softmax` multiply a kept tensor by a sum over the same tensor, so that an entry meets itself:
  E[x̂ᵢ · Σⱼ gⱼ x̂ⱼ] = xᵢ · Σⱼ gⱼ xⱼ + gᵢ · Var[x̂ᵢ]. Dithered codes have a variance that is known when they are read,
  and the term is taken off.

So each of them is unbiased given the gradient from above, and their noise is independent: what a backward pass
through any number of them returns is an unbiased estimate of what it would return without them, up to the rounding
of float arithmetic. ActNN and GACT keep inputs of GELU and the like, whose gradient is then biased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.errors import FqtError
from fqt.kernels import results
from fqt.kernels.codes import compute_dtype
from fqt.nn.between.codes import Flags, Numbers, chosen

_aten = torch.ops.aten
_Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Noise:
    """How numbers are kept in one call: so many bits, by this seed."""

    bits: int
    seed: Tensor

    def keep(self, ctx: Any, x: Tensor, *others: Tensor | None) -> None:
        """Saves x as codes, and other tensors as they are."""
        kept = Numbers.of(x.detach(), self.bits, self.seed)
        ctx.kept = (kept.layout, self.bits)
        ctx.save_for_backward(*kept.tensors, *others)


def _read(ctx: Any) -> tuple[Numbers, Sequence[Any]]:
    """What `Noise.keep` saved; not for a second derivative, which would not see that the numbers depend on x."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise FqtError(
            "double backward through what fqt.compress_ keeps as codes is not defined: call model.eval() for this "
            "pass, or fqt.compress_(model, bits=None)"
        )
    codes, step, offset, seed, *others = ctx.saved_tensors
    return Numbers.again(*ctx.kept, codes, step, offset, seed), others


# ---- decisions: exact ----------------------------------------------------------------------------------------


class Rectified(torch.autograd.Function):
    """ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` is torch's own, in place or not."""
        output = chosen(results.relu)(x) if function is torch.relu else function(x)
        if output is x:
            ctx.mark_dirty(x)
        flags = Flags.positive(output.detach())
        ctx.layout = flags.layout
        ctx.save_for_backward(flags.tensor)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Differentiable again: the second derivative is zero where there is one."""
        flags = Flags(ctx.layout, *ctx.saved_tensors)
        return torch.where(flags.values(), grad, 0.0) if torch.is_grad_enabled() else flags.gate(grad), None


class Gated(torch.autograd.Function):
    """An elementwise function with two slopes, of which a bit says which: ReLU6, leaky ReLU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor], slope: float
    ) -> Tensor:
        """`gate` says of x where the slope is 1."""
        flags = Flags.of(gate(x))
        output = function(x)
        if output is x:
            ctx.mark_dirty(x)
        ctx.layout, ctx.slope = flags.layout, slope
        ctx.save_for_backward(flags.tensor)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Differentiable again: the second derivative is zero where there is one."""
        flags = Flags(ctx.layout, *ctx.saved_tensors).values()
        return torch.where(flags, grad, grad * ctx.slope if ctx.slope else 0.0), None, None, None


class Dropped(torch.autograd.Function):
    """Dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Draws what torch's own draws."""
        noise = F.dropout(torch.ones_like(x), p, True)
        flags = Flags.of(noise != 0)
        ctx.layout, ctx.scale = flags.layout, 1 / (1 - p) if p < 1 else 0.0
        ctx.save_for_backward(flags.tensor)
        return x * noise

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """The same mask."""
        flags = Flags(ctx.layout, *ctx.saved_tensors).values()
        return grad * (flags * torch.full((), ctx.scale, dtype=grad.dtype, device=grad.device)), None


# ---- elementwise functions: linear in the derivative ---------------------------------------------------------


class Elementwise(torch.autograd.Function):
    """f(x), of which f′(x) is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        function: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor, Tensor], Tensor],
        noise: Noise,
    ) -> Tensor:
        """`derivative` takes x and f(x)."""
        output = function(x)
        noise.keep(ctx, derivative(x, output))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased; the variance of an entry is grad² · step²/12."""
        kept, _ = _read(ctx)
        return kept.times(grad), None, None, None


# ---- normalizations ------------------------------------------------------------------------------------------


class BatchNormalized(torch.autograd.Function):
    """Batch normalization; exact where it uses running statistics, but for grad_weight, which is linear in x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        noise: Noise,
    ) -> Tensor:
        """As `F.batch_norm`."""
        arguments = (x, weight, bias, mean, var, training, momentum, eps)
        output, batch_mean, rstd = chosen(results.batch_norm)(*arguments)
        if not training:
            assert var is not None
            batch_mean, rstd = mean, torch.rsqrt(var + eps)
        ctx.how, ctx.like = (training, eps), _like(weight, bias)
        noise.keep(ctx, x, weight, batch_mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased: the term by which an entry meets itself in the sum over its channel is taken off."""
        kept, (weight, mean, rstd) = _read(ctx)
        training, eps = ctx.how
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:5])
        if training:
            found = kept.batch_norm(grad, _wide(mean), _wide(rstd), weight)
        else:
            around = (mean, rstd.square().reciprocal() - eps, None, None)
            x = kept.values(grad.dtype)
            found = _aten.native_batch_norm_backward(grad, x, weight, *around, False, eps, list(needs))
        d_x, d_weight, d_bias = _where(needs, found, ctx.like)
        return d_x, None, None, d_weight, d_bias, *(None,) * 4


class LayerNormalized(torch.autograd.Function):
    """Layer normalization."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        noise: Noise,
    ) -> Tensor:
        """As `F.layer_norm`."""
        x = x.contiguous()
        output, mean, rstd = _aten.native_layer_norm(x, list(shape), weight, bias, eps)
        ctx.like = _like(weight, bias)
        noise.keep(ctx, x, weight, mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased, as batch normalization's, the sum being over the features."""
        kept, (weight, mean, rstd) = _read(ctx)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        d_x, d_weight, d_bias = _where(needs, kept.row_norm(grad, _wide(mean), _wide(rstd), weight), ctx.like)
        return d_x, None, d_weight, d_bias, None, None


class RootMeanSquareNormalized(torch.autograd.Function):
    """RMS normalization."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None, noise: Noise
    ) -> Tensor:
        """As `F.rms_norm`."""
        x = x.contiguous()
        output = F.rms_norm(x, list(shape), weight, eps)
        axes, least = tuple(range(-len(shape), 0)), torch.finfo(x.dtype).eps if eps is None else eps
        ctx.dtype, ctx.like = x.dtype, _like(weight)
        noise.keep(ctx, x, weight, torch.rsqrt(_wide(x).square().mean(axes) + least))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased, as layer normalization's."""
        kept, (weight, rstd) = _read(ctx)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        d_x, d_weight = _where(needs, kept.row_norm(grad, None, rstd, weight)[:2], ctx.like)
        return None if d_x is None else d_x.to(ctx.dtype), None, d_weight, None, None


class GroupNormalized(torch.autograd.Function):
    """Group normalization."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, noise: Noise
    ) -> Tensor:
        """As `F.group_norm`; (N, C, *)."""
        sizes = (x.shape[0], x.shape[1], x.numel() // (x.shape[0] * x.shape[1]), groups)
        output, mean, rstd = _aten.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.sizes, ctx.like = sizes, _like(weight, bias)
        noise.keep(ctx, x, weight, mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased, as batch normalization's, the sum being over a group of channels of a sample."""
        kept, (weight, mean, rstd) = _read(ctx)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        x = kept.values(grad.dtype)
        grad = grad.contiguous() if x.is_contiguous() else grad
        found = _aten.native_group_norm_backward(grad, x, mean, rstd, weight, *ctx.sizes, list(needs))
        d_x, d_weight, d_bias = _where(needs, found, ctx.like)
        if d_x is not None:
            samples, channels, pixels, groups = ctx.sizes
            by_channel = rstd.pow(3).repeat_interleave(channels // groups, 1) / (channels // groups * pixels)
            by_channel = by_channel if weight is None else by_channel * weight
            d_x = _off(d_x, grad, by_channel.view(samples, channels, *(1,) * (x.ndim - 2)), kept)
        return d_x, None, d_weight, d_bias, None, None


def _off(d_x: Tensor, grad: Tensor, factor: Tensor, kept: Numbers) -> Tensor:
    """d_x + grad · factor · Var: what d_x has too little of, since a sum's term met itself."""
    return d_x + (grad * factor * kept.variance()).to(d_x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _like(*parameters: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of a normalization's parameters, which are alike; None without any."""
    found = [(p.shape, p.dtype) for p in parameters if p is not None]
    return found[0] if found else None


def _where(needs: Sequence[bool], found: Sequence[Tensor | None], like: Any) -> _Gradients:
    """The gradients that are asked for: of the input, and of parameters as `_like` has them."""
    d_x, *rest = found
    if like is not None:
        rest = [None if g is None else g.view(like[0]).to(like[1]) for g in rest]
    return tuple(g if need else None for need, g in zip(needs, (d_x, *rest), strict=True))


# ---- probabilities -------------------------------------------------------------------------------------------


class Softmax(torch.autograd.Function):
    """Softmax along one axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, noise: Noise) -> Tensor:
        """As `torch.softmax`."""
        output = torch.softmax(x, dim)
        ctx.dim, ctx.dtype = dim, x.dtype
        noise.keep(ctx, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased: the term by which a probability meets itself in the sum is taken off."""
        kept, _ = _read(ctx)
        p = kept.values()
        d_x = p * (grad - (grad * p).sum(ctx.dim, keepdim=True)) + grad * kept.variance()
        return d_x.to(ctx.dtype), None, None


class LogSoftmax(torch.autograd.Function):
    """The logarithm of softmax along one axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, noise: Noise) -> Tensor:
        """As `torch.log_softmax`."""
        output = torch.log_softmax(x, dim)
        ctx.dim, ctx.dtype = dim, x.dtype
        noise.keep(ctx, output.exp())
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased: linear in the probabilities."""
        kept, _ = _read(ctx)
        return (grad - kept.values() * grad.sum(ctx.dim, keepdim=True)).to(ctx.dtype), None, None


class CrossEntropy(torch.autograd.Function):
    """Cross entropy with class indices, of which the probabilities are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore: int, noise: Noise
    ) -> Tensor:
        """As `F.cross_entropy` of x (N, C, *) and target (N, *)."""
        logs = torch.log_softmax(x, 1)
        output = F.nll_loss(logs, target, weight, ignore_index=ignore, reduction=reduction)
        counts = target != ignore
        shares = counts.to(logs.dtype) if weight is None else weight[target * counts] * counts
        ctx.dtype = x.dtype
        noise.keep(ctx, logs.exp_(), target * counts, shares / shares.sum() if reduction == "mean" else shares)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased: linear in the probabilities."""
        kept, (target, shares) = _read(ctx)
        each = (grad * shares).to(kept.dtype).unsqueeze(1)
        d_x = kept.values() * each
        return d_x.scatter_add_(1, target.unsqueeze(1), -each).to(ctx.dtype), *(None,) * 5


# ---- attention -----------------------------------------------------------------------------------------------


class Attention(torch.autograd.Function):
    """Scaled dot-product attention by torch's fused kernel for CPUs.

    Values and output are kept as codes: with probabilities P = softmax(QKᵀ) the backward takes them in
    P ∘ (grad · Vᵀ − rows(grad ∘ output)) alone, which is linear in either. Query and key decide P and stay whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        noise: Noise,
        second: Noise,
    ) -> Tensor:
        """(N, H, T, E) each; `second` keeps the output."""
        output, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        ctx.causal, ctx.scale = causal, scale
        out = Numbers.of(output, second.bits, second.seed)
        ctx.out = (out.layout, second.bits)
        # Copies: a part of one projection's output would keep the whole of it.
        noise.keep(ctx, value, query.contiguous(), key.contiguous(), mask, logsumexp, *out.tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        """Unbiased."""
        kept, (query, key, mask, logsumexp, *codes) = _read(ctx)
        output = Numbers.again(*ctx.out, *codes).values(query.dtype)
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, kept.values(query.dtype), output, logsumexp, 0.0, ctx.causal,
            attn_mask=mask, scale=ctx.scale,
        )  # fmt: skip
        return *found, *(None,) * 5
