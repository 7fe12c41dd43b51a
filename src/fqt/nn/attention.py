"""`nn.MultiheadAttention` with its four projections on quantized operands.

torch's own forward hands the projections' weights to one fused function and never calls them as layers, so that
converting `out_proj` alone would change nothing. The two products inside the attention, query · keyᵀ and
weights · value, stay float.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fqt.kernels.linear_map import DenseMap
from fqt.nn.layers import check_tensor, is_restored, products


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` without `bias_k`, `bias_v` and `add_zero_attn`; every token is a row."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention`."""
        if is_restored(self):
            return nn.MultiheadAttention.forward(
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        for given in (query, key, value):
            check_tensor(self, given)
            if given.is_nested:
                raise RuntimeError("MultiheadAttention: nested tensors: give a padded batch and key_padding_mask")
        batched = query.ndim == 3
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask too, as torch asks")
        self._check(query, key, value, key_padding_mask, attn_mask)
        same = (query is key, key is value)
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(t) for t in self._project(query, key, value, same))  # (B, H, T, E/H)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, E)
        output = products(self, attended, self.out_proj.weight, self.out_proj.bias, DenseMap())
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Raises where torch's own forward would: without its checks, masks of a wrong shape would broadcast."""
        if not query.ndim == key.ndim == value.ndim or query.ndim not in (2, 3):
            axes = (query.ndim, key.ndim, value.ndim)
            raise RuntimeError(f"query, key and value must all have 2 or all have 3 axes; they have {axes}")
        batch, length = (0, 1) if self.batch_first else (1, 0)
        n = 1 if query.ndim == 2 else query.shape[batch]
        t, s, s_value = (x.shape[0 if x.ndim == 2 else length] for x in (query, key, value))
        if s != s_value or (query.ndim == 3 and not n == key.shape[batch] == value.shape[batch]):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise RuntimeError(f"query, key and value do not fit together: {shapes}")
        plain: tuple[int, ...] = (s,) if query.ndim == 2 else (n, s)
        masks: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
            ("key_padding_mask", padding, [plain]),
            ("attn_mask", attn_mask, [(t, s), (n * self.num_heads, t, s)]),
        ]
        for name, mask, shapes_ in masks:
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise RuntimeError(f"{name} must be boolean or floating-point, not {mask.dtype}")
            if tuple(mask.shape) not in shapes_:
                wanted = " or ".join(map(str, shapes_))
                raise RuntimeError(f"{name} must have the shape {wanted}, not {tuple(mask.shape)}")

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, same: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value projections; equal arguments share one product."""
        map = DenseMap()
        if self._qkv_same_embed_dim and same == (True, True):
            q, k, v = products(self, query, self.in_proj_weight, self.in_proj_bias, map).chunk(3, dim=-1)
            return q, k, v
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            products(self, x, w, b, map) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One additive mask (B or 1, H or 1, T, S) from both; True in a boolean mask means: leave out."""
        masks = []
        if padding is not None:
            masks.append(padding[:, None, None, :])
        if attn_mask is not None:
            shape = (-1, self.num_heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask.shape
            masks.append(attn_mask.reshape(shape))
        total = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
            total = mask.to(q.dtype) if total is None else total + mask.to(q.dtype)
        return total
