"""Beam search over the translations that a model can give, for many sentences at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fqt.train.parallel import BOS, EOS, PAD

__all__ = ["beam_search"]


@torch.no_grad()
def beam_search(
    model: nn.Module,
    source: Tensor,  # (B, S) int64, padded with PAD
    limits: Tensor,  # (B,) int64: tokens of each translation at most, EOS included
    *,
    beam: int,
    penalty: float,
) -> list[list[int]]:
    """The best translation found of each sentence, without `BOS`, with `EOS`.

    A translation y of T tokens, `EOS` included, scores log p(y | x) / T^penalty. At each length the ``beam`` most
    probable unfinished prefixes go on; those that end among the ``beam`` most probable candidates are finished. A
    sentence is done when ``beam`` of its translations are, or none can go on; at its limit only `EOS` may follow.
    With a beam as wide as there are prefixes the search is exhaustive. The whole prefix is computed anew for every
    token; sentences that are done leave the batch.

    Args:
        model: has ``encode(source) -> (memory, mask)`` and ``decode(before, memory, mask)``, which gives the
            logits (N, vocabulary) that follow prefixes (N, T); in eval mode.
        source: sentences.
        limits: at least 1 each.
        beam: at least 1; 1 is greedy.
        penalty: exponent of the length; 0 for none.
    """
    memory, mask = model.encode(source)  # type: ignore[operator]
    count, device = len(source), source.device
    found: list[list[int]] = [[] for _ in range(count)]
    rows = torch.arange(count, device=device)  # which sentences are still searched
    prefixes = torch.full((count, beam, 1), BOS, device=device)
    scores = torch.full((count, beam), -torch.inf, device=device)
    scores[:, 0] = 0.0  # equal prefixes count once
    best = torch.full((count,), -torch.inf, device=device)
    finished = torch.zeros(count, dtype=torch.int64, device=device)
    while len(rows):
        length = prefixes.shape[2]  # of translations that end now
        logits = model.decode(  # type: ignore[operator]
            prefixes.flatten(0, 1), memory[rows].repeat_interleave(beam, 0), mask[rows].repeat_interleave(beam, 0)
        )
        logp = logits.float().log_softmax(-1).unflatten(0, (len(rows), beam))
        logp[..., [PAD, BOS]] = -torch.inf
        last = limits[rows] <= length
        logp[last, :, :EOS] = logp[last, :, EOS + 1 :] = -torch.inf
        total = (scores[..., None] + logp).flatten(1)
        # Each prefix ends in one way, so that half of twice the beam goes on.
        values, places = total.topk(min(2 * beam, total.shape[1]))
        parents, tokens = places // logp.shape[-1], places % logp.shape[-1]
        grown = torch.cat([prefixes.gather(1, parents[..., None].expand(-1, -1, length)), tokens[..., None]], 2)
        ends = tokens == EOS

        ended = torch.where(ends[:, :beam], values[:, :beam] / length**penalty, -torch.inf)
        value, place = ended.max(1)
        for i in (value > best[rows]).nonzero().flatten().tolist():
            found[int(rows[i])] = grown[i, place[i], 1:].tolist()
        best[rows] = torch.maximum(best[rows], value)
        finished[rows] += ended.isfinite().sum(1)

        scores, order = values.masked_fill(ends, -torch.inf).topk(beam)
        prefixes = grown.gather(1, order[..., None].expand(-1, -1, length + 1))
        on = (finished[rows] < beam) & scores[:, 0].isfinite()
        rows, scores, prefixes = rows[on], scores[on], prefixes[on]
    return found
