"""How a compiled graph keeps the mask of a ReLU: as a byte per entry that Inductor reads and writes fast.

A float layer keeps its input, and the ReLU before it finds its gradient's mask there. Ours keep codes, so that
the compiler keeps the mask itself, as booleans. On the CPU, Inductor's code for booleans takes ten times as long as
that for int8: a compiled ResNet-18 was a third slower than the eager one. Here the booleans become int8.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default


def inductor_options() -> dict[str, Any]:
    """What to give `torch.compile` for a converted model on the CPU: `options=fqt.inductor_options()`.

    One more of Inductor's graph passes, after any that are set in its configuration; without it a compiled network
    of convolutions and ReLUs is right but slow. `torch.compile` takes options or a mode: a mode's options are
    `torch._inductor.list_mode_options(mode)`, to be merged with these.
    """
    from torch._inductor import config

    there: Any = config.joint_custom_post_pass
    passes = [] if there is None else list(there) if isinstance(there, list | tuple) else [there]
    others = [p for p in passes if p is not _pass()]
    return {"joint_custom_post_pass": [*others, _pass()] if others else _pass()}  # torch 2.11 knows no list


def keep_bytes(graph: Graph) -> None:
    """Rewrites the masks in a graph of both directions."""
    for mask in [node for node in graph.nodes if _is_mask(node)]:
        kind = {"dtype": torch.float32, "device": mask.meta["val"].device}
        with graph.inserting_before(mask.next), mask.meta["val"].fake_mode:
            zero, one = (_add(graph, _aten.full.default, [], value, **kind) for value in (0.0, 1.0))
            flag = _add(graph, _aten.where.self, mask, zero, one)
            kept = _add(graph, _convert, flag, torch.int8)
            again = _add(graph, _aten.le.Scalar, _add(graph, _convert, kept, torch.float32), 0)
        mask.replace_all_uses_with(again, delete_user_cb=lambda user, flag=flag: user is not flag)
        again.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE  # else it would be kept itself: it is used later


def _add(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node with its fake value, from which the compiler takes sizes."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, Node) else a for a in args), **kwargs)
    return node


def _is_mask(node: Node) -> bool:
    """Whether a node is r ≤ 0 for the result r of a ReLU on the CPU, made for that ReLU's gradient."""
    if node.target is not _aten.le.Scalar or node.args[1] != 0 or "recompute" in node.meta:
        return False
    relu = node.args[0]
    while isinstance(relu, Node) and relu.target is _aten.alias.default:
        relu = relu.args[0]
    made_by_relu = isinstance(relu, Node) and relu.target is _aten.relu.default
    selects = all(user.target is _aten.where.self and user.args[0] is node for user in node.users)
    return made_by_relu and selects and node.meta["val"].device.type == "cpu"


@lru_cache(maxsize=1)
def _pass() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class KeepBytes(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            if any(node.target is torch.ops.fqt.layer.default for node in graph.nodes):
                keep_bytes(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return KeepBytes()
