"""Steps on a contracted axis: an operand taken apart, so that its steps move into grad_output.

A forward operand with a step per row (token, sample or output channel) that is contracted over these rows is

    X_n = step_n · (code_n − centre_n) + offset_n

and its product with grad_output G therefore (step·G)ᵀ · (code − centre) + (Gᵀ·offset) ⊗ 1. Only the first term is
computed from a quantized gradient; the second is exact. The noise of the first grows with ‖code − centre‖², least
about the mean of a row's codes. A row of zeros has step 0: it takes no part in the first term and adds no noise to
it, however large its gradient is. So has a constant row of an affine operand: it is all offset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqt.kernels import ops
from fqt.kernels.tensor import QuantizedTensor


@dataclass(frozen=True)
class Split:
    """A forward operand with a step per row, taken apart.

    Attributes:
        codes: the operand; constant rows of a symmetric one have larger codes here.
        step: (N,), not negative.
        centre: (N,) int32 in 0 … 255, the mean of the row's codes, rounded; None is 0.
        offset: (N,) the value of that code; None is 0.
    """

    codes: QuantizedTensor
    step: Tensor
    centre: Tensor | None = None
    offset: Tensor | None = None

    @staticmethod
    def of(q: QuantizedTensor, last_code: int) -> Split | None:
        """None if there is nothing to move: one step, or steps by column.

        Args:
            q: the operand.
            last_code: of its grid, if it is symmetric.
        """
        if q.matrix_step.numel() == 1 or q.matrix_step.shape[1] != 1:
            return None
        step, offset = q.matrix_step.flatten(), q.group_offset.flatten()
        if q.matrix_codes.dtype == torch.int8:
            return Split(*_like_others(q, step, last_code))
        centre = (ops.row_sums(q.matrix_codes).double() / max(q.matrix_codes.shape[1], 1)).round()
        offset = offset + step * centre.to(step.dtype)
        return Split(q, step, _unless_zero(centre.to(torch.int32)), _unless_zero(offset))

    def along_rows(self, vector: Tensor) -> Tensor:
        """A vector (N,) so that it broadcasts against the operand."""
        shape, axis = self.codes.view.shape, self.codes.view.axis
        return vector.view([n if d in axis else 1 for d, n in enumerate(shape)])

    def rest(self, dtype: torch.dtype) -> Tensor:
        """code − centre, of the operand's shape."""
        codes = self.codes.codes.to(dtype)
        return codes if self.centre is None else codes - self.along_rows(self.centre.to(dtype))


@dataclass(frozen=True)
class Folded:
    """What the weight's gradient needs of a split input, beside its codes, whose steps are in grad_output.

    Attributes:
        centre: as in `Split`, one per row of the input.
        share: (taps, O) float32, Σ over the pixels that a tap reads of offset · grad_output: what every channel of
            the tap gets; None is 0. A Linear has one tap.
    """

    centre: Tensor | None = None
    share: Tensor | None = None


def _unless_zero(vector: Tensor) -> Tensor | None:
    """None where a correction can be left out, asked only where the answer costs nothing."""
    return None if ops.at_hand(vector) and not bool(vector.any()) else vector


def _like_others(q: QuantizedTensor, step: Tensor, last_code: int) -> tuple[QuantizedTensor, Tensor]:
    """A symmetric operand whose constant rows have a third of the last code, and a step as much smaller, for ±1.

    With its magnitude as step, which is exact, a constant row's gradient would be scaled up a hundred times above
    that of its neighbours, and set the range of all. A third is where the root mean square of an ordinary row lies.
    """
    codes, third = q.matrix_codes, max(1, last_code // 3)
    if third == 1 or not codes.numel():
        return q, step
    constant = codes[:, 0].abs() == 1
    if ops.at_hand(constant) and not bool(constant.any()):
        return q, step
    constant = constant & (codes == codes[:, :1]).all(1)
    codes = torch.where(constant[:, None], codes * third, codes)
    return replace(q, matrix_codes=codes), torch.where(constant, step / third, step)
