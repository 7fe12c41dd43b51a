"""Which of torch's functions keep less for backward, and how each is called: a table that a row extends.

Functions, not modules: `nn.ReLU` and `F.relu` are the same row, and so is every module that calls one of them. A
row is a function of a `Call` and of the arguments as torch's takes them. It returns the output, or NotImplemented
for arguments that it does not take, which leaves the call to torch, and what torch keeps in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fqt.nn import dropout
from fqt.nn.between import functions, pooled
from fqt.nn.between.functions import Noise
from fqt.nn.layers import drawn_seeds

_aten = torch.ops.aten
_Pair = int | tuple[int, int] | list[int]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Call:
    """One call of a function.

    Attributes:
        function: torch's own.
        bits: of numbers that are kept.
        training: whether numbers may be kept as codes: in eval mode gradients are exact.
    """

    function: Any
    bits: int
    training: bool

    def noise(self, input: Tensor) -> Noise:
        """Draws one int64 from torch's generator of the input's device.

        Whether or not a gradient will be asked for, so that both forward passes of an activation checkpoint draw.
        """
        return Noise(self.bits, drawn_seeds(input))


def _differentiable(x: Tensor) -> bool:
    return x.requires_grad and _can_be_kept(x)


def _can_be_kept(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.dtype in _FLOATS and x.layout == torch.strided and x.numel() > 0


OPERATIONS: dict[Any, Callable[..., Any]] = {}
"""The row of each function of torch's."""


def _row(*names: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(row: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(names, row))
        return row

    return add


# ---- decisions -----------------------------------------------------------------------------------------------


def _gated(x: Tensor, inplace: bool, function: Any, written: Any, gate: Any, slope: float = 0.0) -> Any:
    if not _differentiable(x) or (inplace and x._is_view()):
        return NotImplemented
    return functions.Gated.apply(x, written if inplace else function, gate, slope)


@_row(F.relu, torch.relu, Tensor.relu)
def _relu(call: Call, input: Tensor, inplace: bool = False) -> Any:
    if not _differentiable(input) or (inplace and input._is_view()):
        return NotImplemented
    return functions.Rectified.apply(input, torch.relu_ if inplace else torch.relu)


@_row(torch.relu_, Tensor.relu_)
def _relu_(call: Call, input: Tensor) -> Any:
    return _relu(call, input, True)


def _between(x: Tensor) -> Tensor:
    return (x > 0) & (x < 6)


@_row(F.relu6)
def _relu6(call: Call, input: Tensor, inplace: bool = False) -> Any:
    return _gated(input, inplace, F.relu6, lambda x: F.relu6(x, True), _between)


@_row(F.leaky_relu)
def _leaky_relu(call: Call, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    function = lambda x: F.leaky_relu(x, negative_slope)
    written = lambda x: F.leaky_relu(x, negative_slope, True)
    return _gated(input, inplace, function, written, lambda x: x > 0, negative_slope)


@_row(F.dropout)
def _dropout(call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or inplace or not 0 < p <= 1 or not _differentiable(input) or dropout.is_off():
        return NotImplemented
    return functions.Dropped.apply(input, p)


def _pair(value: _Pair) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


@_row(F.max_pool2d, torch.max_pool2d)
def _max_pool2d(
    call: Call,
    input: Tensor,
    kernel_size: _Pair,
    stride: _Pair | None = None,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    size = _pair(kernel_size)
    if input.ndim != 4 or return_indices or size[0] * size[1] > 256 or not _differentiable(input):
        return NotImplemented
    steps = _pair(stride) if stride else size
    return pooled.Pooled.apply(input, size, steps, _pair(padding), _pair(dilation), ceil_mode)


@_row(F.avg_pool2d)
def _avg_pool2d(
    call: Call,
    input: Tensor,
    kernel_size: _Pair,
    stride: _Pair | None = None,
    padding: _Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if input.ndim != 4 or not _differentiable(input):
        return NotImplemented
    steps = stride if stride else kernel_size
    window = (_pair(kernel_size), _pair(steps), _pair(padding), ceil_mode, count_include_pad, divisor_override)
    return pooled.Averaged.apply(input, *window)


# ---- elementwise functions -----------------------------------------------------------------------------------


def _elementwise(call: Call, x: Tensor, function: Any, derivative: Any) -> Any:
    if not call.training:
        return NotImplemented
    noise = call.noise(x)
    if not _differentiable(x):
        return NotImplemented
    return functions.Elementwise.apply(x, function, derivative, noise)


def _one(x: Tensor) -> Tensor:
    return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)


@_row(F.gelu)
def _gelu(call: Call, input: Tensor, approximate: str = "none") -> Any:
    function = lambda x: F.gelu(x, approximate=approximate)
    return _elementwise(
        call, input, function, lambda x, _: _aten.gelu_backward(_one(x), x, approximate=approximate)
    )


@_row(F.silu)
def _silu(call: Call, input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return NotImplemented
    return _elementwise(call, input, F.silu, lambda x, _: _aten.silu_backward(_one(x), x))


@_row(F.mish)
def _mish(call: Call, input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return NotImplemented
    return _elementwise(call, input, F.mish, lambda x, _: _aten.mish_backward(_one(x), x))


@_row(F.hardswish)
def _hardswish(call: Call, input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return NotImplemented
    return _elementwise(call, input, F.hardswish, lambda x, _: _aten.hardswish_backward(_one(x), x))


@_row(F.elu)
def _elu(call: Call, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    if inplace:
        return NotImplemented
    derivative = lambda x, _: _aten.elu_backward(_one(x), alpha, 1.0, 1.0, False, x)
    return _elementwise(call, input, lambda x: F.elu(x, alpha), derivative)


@_row(F.softplus)
def _softplus(call: Call, input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    function = lambda x: F.softplus(x, beta, threshold)
    return _elementwise(call, input, function, lambda x, _: _aten.softplus_backward(_one(x), x, beta, threshold))


# ---- normalizations ------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """As autocast has it on GPUs for normalizations and softmax: float32."""
    return x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64 else x


def _asks(*tensors: Tensor | None) -> bool:
    """Whether the first is a batch to be kept, for itself or for parameters after it."""
    first = tensors[0]
    asked = any(t is not None and t.requires_grad for t in tensors)
    return asked and first is not None and _can_be_kept(first)


@_row(F.batch_norm)
def _batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not call.training or (training and input.numel() == input.shape[1]):
        return NotImplemented
    noise = call.noise(input)
    if not _asks(input, weight, bias):
        return NotImplemented
    rest = (running_mean, running_var, weight, bias, training, momentum, eps, noise)
    return functions.BatchNormalized.apply(input, *rest)


@_row(F.layer_norm)
def _layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not call.training:
        return NotImplemented
    noise = call.noise(input)
    if not _asks(input, weight, bias):
        return NotImplemented
    return functions.LayerNormalized.apply(_wide(input), tuple(normalized_shape), weight, bias, eps, noise)


@_row(F.rms_norm)
def _rms_norm(
    call: Call, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if not call.training:
        return NotImplemented
    noise = call.noise(input)
    if not _asks(input, weight):
        return NotImplemented
    return functions.RootMeanSquareNormalized.apply(_wide(input), tuple(normalized_shape), weight, eps, noise)


@_row(F.group_norm)
def _group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not call.training or input.ndim < 2 or input.shape[1] % num_groups:
        return NotImplemented
    noise = call.noise(input)
    if not _asks(input, weight, bias):
        return NotImplemented
    return functions.GroupNormalized.apply(_wide(input), num_groups, weight, bias, eps, noise)


# ---- probabilities -------------------------------------------------------------------------------------------


def _probabilities(call: Call, function: Any, x: Tensor, dim: int | None, dtype: torch.dtype | None) -> Any:
    if not call.training or dim is None or x.ndim == 0:
        return NotImplemented
    noise = call.noise(x)
    if not _differentiable(x):
        return NotImplemented
    return function.apply(_wide(x) if dtype is None else x.to(dtype), dim, noise)


@_row(torch.softmax, Tensor.softmax)
def _softmax(call: Call, input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Any:
    return _probabilities(call, functions.Softmax, input, dim, dtype)


@_row(F.softmax)
def _f_softmax(
    call: Call, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    return _probabilities(call, functions.Softmax, input, dim, dtype)


@_row(torch.log_softmax, Tensor.log_softmax)
def _log_softmax(call: Call, input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Any:
    return _probabilities(call, functions.LogSoftmax, input, dim, dtype)


@_row(F.log_softmax)
def _f_log_softmax(
    call: Call, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    return _probabilities(call, functions.LogSoftmax, input, dim, dtype)


@_row(F.cross_entropy)
def _cross_entropy(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    old = size_average is not None or reduce is not None
    if not call.training or old or label_smoothing or input.ndim < 2 or target.is_floating_point():
        return NotImplemented
    noise = call.noise(input)
    if not _differentiable(input):
        return NotImplemented
    short = torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64
    x = input.float() if short else input
    return functions.CrossEntropy.apply(x, target, weight, reduction, ignore_index, noise)


# ---- attention -----------------------------------------------------------------------------------------------

_FLASH = 1  # of `torch._fused_sdp_choice`


@_row(F.scaled_dot_product_attention)
def _attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    plain = query.device.type == "cpu" and query.ndim == 4 and dropout_p == 0.0 and not enable_gqa
    masked = attn_mask is not None and (attn_mask.dtype != query.dtype or attn_mask.requires_grad)
    if not call.training or not plain or masked or torch.compiler.is_compiling():
        return NotImplemented
    first, second = call.noise(query), call.noise(query)
    if not all(map(_differentiable, (query, key, value))):
        return NotImplemented
    if torch.is_autocast_enabled("cpu") and query.dtype != torch.get_autocast_dtype("cpu"):
        return NotImplemented
    if torch._fused_sdp_choice(query, key, value, attn_mask, 0.0, is_causal, scale=scale) != _FLASH:
        return NotImplemented
    return functions.Attention.apply(query, key, value, attn_mask, is_causal, scale, first, second)
