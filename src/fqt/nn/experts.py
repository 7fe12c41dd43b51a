"""Mixtures of experts that hold their weights in one tensor (experts, …), as transformers does since version 5.

Each expert is a linear layer of its own on the tokens that were sent to it: with its own steps, its own noise and
the three products of any `Linear`. So the gradient is unbiased whatever the routing, an expert's codes do not
depend on the others' tokens, and the kernels are those that there are. One batched product over all experts was
rejected: with the tokens of each padded to those of the largest, uneven routing is paid for in padding, and rows
that are not there would have to be kept out of every range.

What runs between the products (gates, norms) is the class's own, by the interface through which transformers itself
exchanges the implementation of experts (`use_experts_implementation`); so one forward serves all of its classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fqt.kernels.linear_map import DenseMap
from fqt.nn.eager import not_compiled
from fqt.nn.layers import drawn_seeds, is_restored, products

_HOME = "transformers.integrations.moe"


def is_experts(kind: type[nn.Module]) -> bool:
    """Whether this class's forward is one that transformers exchanges for another implementation."""
    return getattr(vars(kind).get("forward"), "__globals__", {}).get("__name__") == _HOME


def experts(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of converted experts: two products per expert, over the tokens sent to it.

    In training mode seeds are drawn for all experts, whatever the routing.

    Args:
        layer: of a class of transformers, with `gate_up_proj` (or `up_proj`) and `down_proj`.
        hidden_states: (N, H).
        top_k_index: (N, K), the experts of each token; a number that is no expert's here stands for one of another
            process, whose share is left out.
        top_k_weights: (N, K), what each expert's output counts.

    Returns:
        (N, H), in the dtype of `hidden_states`.
    """
    if is_restored(layer):
        return type(layer).forward(layer, hidden_states, top_k_index, top_k_weights)
    return _experts(layer, hidden_states, top_k_index, top_k_weights)


@not_compiled("fqt: how many tokens an expert gets is known only when it runs: compile without fullgraph")
def _experts(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    count = layer.num_experts
    seeds = drawn_seeds(hidden_states, (2 * count,)).unbind() if layer.training else (None,) * (2 * count)
    ids = top_k_index.reshape(-1).clamp(max=count)
    *sizes, elsewhere = torch.bincount(ids, minlength=count + 1).tolist()
    slots = ids.argsort(stable=True)[: len(ids) - elsewhere]  # of (N · K), by expert

    inner = hidden_states[slots // top_k_index.shape[1]]
    inner = _each(layer, inner, sizes, "gate_up_proj" if layer.has_gate else "up_proj", seeds[:count])
    inner = layer._apply_gate(inner) if layer.has_gate else layer.act_fn(inner)
    output = _each(layer, inner, sizes, "down_proj", seeds[count:])
    if layer.has_post_expert_norm:
        output = layer.post_expert_norm(output)
    weighted = output * top_k_weights.reshape(-1)[slots].unsqueeze(-1)
    # Summed over a token's experts in one order, which index_add does not promise.
    by_slot = weighted.new_zeros(len(ids), weighted.shape[-1]).index_copy(0, slots, weighted)
    return by_slot.unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)


def _each(layer: Any, x: Tensor, sizes: Sequence[int], name: str, seeds: Sequence[Tensor | None]) -> Tensor:
    """The products of runs of rows by one expert's weight each.

    Args:
        layer: whose recipe and mode count.
        x: (S, I), sorted by expert.
        sizes: of the experts' runs.
        name: of the weights (experts, O, I), or (experts, I, O) where the layer says that they are transposed.
        seeds: of the experts; None in eval mode.

    Returns:
        (S, O).
    """
    weight = getattr(layer, name)
    # One node of the graph for all experts: a node for each would fill a gradient of all experts' size for each.
    weights = (weight.mT if layer.is_transposed else weight).unbind()
    biases = getattr(layer, f"{name}_bias").unbind() if layer.has_bias else [None] * len(sizes)
    runs = zip(x.split(list(sizes)), weights, biases, seeds, strict=True)
    return torch.cat(
        [products(layer, run, w, b, DenseMap(), seed) for run, w, b, seed in runs if len(run) or not len(x)]
    )
