"""What a compiled graph keeps of a ReLU whose result a quantized layer reads: that result, and not a mask.

A float convolution keeps its input, and the ReLU before it finds its gradient's mask there. Ours keep codes, so
that the compiler keeps the mask itself, a boolean per entry. On the CPU, Inductor's code for storing and loading
booleans takes seven times as long as that for bfloat16: a compiled ResNet-18 was a third slower than the eager one.
The comparisons are marked to be made again in the backward pass instead; what is kept then is one or three bytes an
entry more, and less than in float training.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy


def install() -> None:
    """Has Inductor mark the masks of graphs that it compiles from now on; called as a layer is traced.

    Nothing happens where something else compiles, or where the user has a pass of their own in that place.
    """
    config = sys.modules.get("torch._inductor.config")
    if config is not None and getattr(config, "joint_custom_post_pass", 0) is None:
        config.joint_custom_post_pass = _pass()  # type: ignore[attr-defined]


def mark(graph: Graph) -> int:
    """Marks the masks in a graph of both directions.

    Returns:
        How many there are.
    """
    masks = [n for n in graph.nodes if n.target is torch.ops.aten.le.Scalar and _is_read_relu(_source(n.args[0]))]
    for mask in masks:
        mask.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return len(masks)


@lru_cache(maxsize=1)
def _pass() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class MarkMasks(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            mark(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return MarkMasks()


def _source(node: Any) -> Any:
    while isinstance(node, Node) and node.target is torch.ops.aten.alias.default:
        node = node.args[0]
    return node


def _is_read_relu(node: Any) -> bool:
    """Whether a node is a ReLU on the CPU that a quantized layer reads."""
    if not isinstance(node, Node) or node.target is not torch.ops.aten.relu.default:
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return False
    readers = [user for user in node.users if user.target is torch.ops.aten.alias.default]
    return any(user.target is torch.ops.fqt.layer.default for n in (node, *readers) for user in n.users)
