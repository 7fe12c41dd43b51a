"""Gradients averaged over processes in quantized messages: a communication hook for `DistributedDataParallel`.

Process r of W sends codes of its gradient x_r instead of floats. All decode, and average in one order, so that all
have the same bits. A bucket of gradients has one axis: it is cut into the fewest equal rows of at most `block`
neighbouring entries, the last filled up with zeros, fewer than there are rows.

    gather     every process sends all of x_r to every other             W − 1 messages of n entries
               variance  W⁻² Σ_r Var[x̂_r]
    scatter    every process averages a W-th of the entries, and sends   2(W − 1) messages of n/W entries
               that again in codes
               variance  W⁻² Σ_r Var[x̂_r] + Var of the average's codes

Noise is independent over processes, messages and stages, so variances add up, and the average is unbiased if
the quantizer is: quantized stochastic gradients (Alistarh et al., QSGD, arXiv 1610.02132; Wen et al., TernGrad,
arXiv 1705.07878), with any member of the catalog. Codes cannot be added on the way as floats are, so
a plain all-reduce was no choice. Error feedback, which makes biased messages converge, was left out: it keeps a
residual per process, which no other number of processes can take up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.futures import Future

from fqt.distributed.message import read, write
from fqt.errors import FqtError
from fqt.kernels.philox import as_seed
from fqt.kernels.rounding import NEAREST
from fqt.quant import QuantizedTensor, Quantizer, quantizer
from fqt.seeds import derive_seed

EXCHANGES = ("gather", "scatter")


class Messages:
    """What `quantized_messages` needs: how messages are quantized, their noise, and what they have cost.

        messages = fqt.distributed.Messages("psq8", seed=0)
        model = DistributedDataParallel(model)
        model.register_comm_hook(messages, fqt.distributed.quantized_messages)

    Every process makes one with the same arguments. Messages are computed in float32, whatever the gradients'
    dtype. A NaN or Inf comes back as NaN in all of its block (in all of the bucket, where rows are mixed or share a
    step) on every process, so that a `GradScaler` skips the step everywhere; nothing is raised, since one process
    that stopped would leave the others waiting.

    Args:
        quantizer: a quantizer or its name; the row of a per-row one is a block.
        seed: of the noise; each process, message and stage draws its own from it.
        block: entries of a row.
        exchange: "gather" or "scatter"; by default "gather" for 2 processes, which sends as much in one stage, and
            "scatter" for more.
        biased: whether a quantizer with a bias is taken too.
        group: of processes; by default all.

    Attributes:
        measuring: whether messages' exact variance is computed: see `measure`.
        bytes_sent: by this process, since it was made.
        bytes_float: what a ring all-reduce of the same gradients would have sent.

    Raises:
        FqtError: an argument makes no sense; a quantizer that is biased, unless `biased`, or remembers ranges.
    """

    def __init__(
        self,
        quantizer: Quantizer | str,
        *,
        seed: int,
        block: int = 1024,
        exchange: str | None = None,
        biased: bool = False,
        group: Any = None,
    ) -> None:
        if exchange is not None and exchange not in EXCHANGES:
            raise FqtError(f"unknown exchange {exchange!r}; known: {', '.join(EXCHANGES)}")
        if type(block) is not int or block < 1:
            raise FqtError(f"block is a number of entries, at least 1, not {block!r}")
        self.quantizer, self.seed, self.block = _checked(quantizer, biased), seed, block
        self.exchange, self.group = exchange, group
        self.measuring, self._agreed = False, False
        self.bytes_sent = self.bytes_float = self._count = 0
        self._variances: list[Tensor] = []

    def measure(self, on: bool = True) -> None:
        """From here on sums up the exact variance of messages, at about two passes over each in float64, or stops.

        Every process must say so before the same message.
        """
        self.measuring, self._variances = on, []

    @property
    def variance(self) -> float:
        """The exact variance of the averages since `measure`, summed over entries; NaN without it.

        Over the rounding noise, given the random signs that were drawn, of rows with what fills them up, less than
        an entry each. Of a second stage given the first, so that the sum is then an unbiased estimate of the
        variance of both.
        """
        return float(sum(map(float, self._variances))) if self.measuring else math.nan

    def state_dict(self) -> dict[str, int]:
        """How many messages have drawn noise; valid at any number of processes."""
        return {"count": self._count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues with noise that has not been drawn yet."""
        self._count = state["count"]

    def average(self, x: Tensor) -> Future[Tensor]:
        """The mean of a tensor over processes, of its shape and dtype, the same bits everywhere.

        Unbiased (see the module), but for its rounding to a dtype shorter than float32. Every process must call it
        for tensors of one shape, in one order.

        Args:
            x: any shape, any real floating dtype; not changed.

        Raises:
            FqtError: the processes' messages differ in quantizer, block or exchange; all of them raise.
        """
        count = dist.get_world_size(self.group)
        self._count += 1
        self.bytes_float += 2 * (count - 1) * x.numel() * x.element_size() // count
        if count == 1 or not x.numel():
            found: Future[Tensor] = Future(devices=[x.device] if x.is_cuda else None)
            found.set_result(x)
            return found
        self._check_agreement(x.device)
        flat, stages = x.detach().reshape(-1).float(), self.exchange or ("gather" if count == 2 else "scatter")
        mean = self._gathered(flat, count) if stages == "gather" else self._scattered(flat, count)
        return mean.then(lambda future: future.value().view(x.shape).to(x.dtype))

    def _check_agreement(self, device: torch.device) -> None:
        """Asks the other processes, once: codes of equal length would be read as another quantizer's."""
        if self._agreed:
            return
        mine = torch.tensor([derive_seed(repr(self.quantizer), self.block, str(self.exchange))], device=device)
        each = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(each, mine, group=self.group)
        if any(other != mine for other in each):
            raise FqtError("every process must make its Messages with the same quantizer, block and exchange")
        self._agreed = True

    def _gathered(self, flat: Tensor, count: int) -> Future[Tensor]:
        mine, like = self._write(_rows(flat, self.block), "gather")

        def mean(messages: Tensor) -> Tensor:
            values, variance = self._mean(messages, like)
            self._noted(variance)
            return values.view(-1)[: flat.numel()]

        return self._all_gather(mine, count, mean)

    def _scattered(self, flat: Tensor, count: int) -> Future[Tensor]:
        parts = _rows(flat, self.block, count).chunk(count)
        written = [self._write(part, "scatter", to) for to, part in enumerate(parts)]
        sent = torch.stack([message for message, _ in written])
        received = torch.empty_like(sent)
        # Waits here: a callback that waits for another exchange can take the thread that this one needs.
        dist.all_to_all_single(received, sent, group=self.group)
        self.bytes_sent += (count - 1) * sent.shape[1]
        average, variance = self._mean(received, written[0][1])
        mine, like = self._write(average, "again", plus=variance)

        def whole(messages: Tensor) -> Tensor:
            found = [read(message, self.quantizer, like) for message in messages]
            self._noted(*(variance for _, variance in found))
            return torch.cat([part.dequantize().view(-1) for part, _ in found])[: flat.numel()]

        return self._all_gather(mine, count, whole)

    def _all_gather(self, mine: Tensor, count: int, then: Callable[[Tensor], Tensor]) -> Future[Tensor]:
        """What `then` makes of all processes' messages (W, length)."""
        messages = mine.new_empty(count, mine.numel())
        work = dist.all_gather(list(messages), mine, group=self.group, async_op=True)
        self.bytes_sent += (count - 1) * mine.numel()
        return work.get_future().then(lambda future: (future.wait(), then(messages))[1])

    def _write(
        self, x: Tensor, stage: str, to: int = 0, plus: Tensor | float = 0.0
    ) -> tuple[Tensor, QuantizedTensor]:
        """A matrix's message, and its codes; what was lost before adds to its variance."""
        number = derive_seed(self.seed, "message", self._count, stage, dist.get_rank(self.group), to)
        seed = as_seed(number, x.device)
        found = self.quantizer.quantize(x, seed, nonfinite="propagate")
        unknown = torch.full((), torch.nan, dtype=torch.float64, device=x.device)
        variance = self.quantizer.variance(x, seed) if self.measuring else unknown
        return write(found, self.quantizer, seed, variance + plus), found

    def _noted(self, *variances: Tensor) -> None:
        self._variances += variances if self.measuring else ()

    def _mean(self, messages: Tensor, like: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """The mean of the matrices that were sent, added in the order of ranks, and its variance."""
        total = torch.zeros(like.shape, device=messages.device)
        variance = torch.zeros((), dtype=torch.float64, device=messages.device)
        for message in messages:
            found, own = read(message, self.quantizer, like)
            total, variance = total.add_(found.dequantize()), variance + own
        return total / len(messages), variance / len(messages) ** 2


def quantized_messages(state: Messages, bucket: dist.GradBucket) -> Future[Tensor]:
    """Averages a bucket of gradients in quantized messages; for `DistributedDataParallel.register_comm_hook`.

    The average is unbiased, and has the variance that `Messages` says on top of the gradients' own.

    Raises:
        FqtError: the state that was registered is no `Messages`.
    """
    if not isinstance(state, Messages):
        raise FqtError(f"register_comm_hook(Messages('psq8', seed=0), quantized_messages), not {state!r}")
    return state.average(bucket.buffer())


# torch compares these with its own types, which annotations that are strings are not.
quantized_messages.__annotations__.update({"bucket": dist.GradBucket, "return": Future[Tensor]})


def _rows(flat: Tensor, block: int, parts: int = 1) -> Tensor:
    """(N, D): the entries in rows of at most `block`, N the least multiple of `parts`; zeros fill the last up."""
    rows = -(-flat.numel() // (block * parts)) * parts
    width = -(-flat.numel() // rows)
    return torch.nn.functional.pad(flat, (0, rows * width - flat.numel())).view(rows, width)


def _checked(method: Quantizer | str, biased: bool) -> Quantizer:
    found = quantizer(method) if isinstance(method, str) else method
    if not isinstance(found, Quantizer):
        raise FqtError(f"messages take a quantizer or its name, not {method!r}")
    if found.scale.remembers:
        raise FqtError(
            f"a message is quantized in its own range, and {method!r} remembers others: take 'ptq8', say"
        )
    nearest = any(coding.rounding == NEAREST for coding in found.codings)
    if not biased and any(coding.rounding.unit_bias or coding.rounding.settles for coding in found.codings):
        raise FqtError(
            f"messages quantized by {method!r} are biased{'' if nearest else ', if only a little'}, and so is a "
            "gradient that is their average: take one without bias ('psq8', 'shq4d'), or Messages(…, biased=True)"
        )
    return found
