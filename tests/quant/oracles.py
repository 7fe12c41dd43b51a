"""The truth, slowly: the quantizers of the paper as loops and dense N × N matrices in float64 numpy.

Written from the formulas; nothing here calls the code under test. An oracle's answer is a `Dense`: the matrix S,
its inverse, and each transformed row's range, from which variance and bound follow by

    Var = Σ_i ‖S⁻¹ e_i‖² step_i² Σ_j p_ij (1 − p_ij),      bound: ¼ for p (1 − p).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Dense:
    """S, S⁻¹ (both N × N), y = S (x − z), and the offset and step of each row of y."""

    forward: np.ndarray
    inverse: np.ndarray
    y: np.ndarray
    low: np.ndarray
    step: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        return (self.inverse**2).sum(0)

    def variance(self) -> float:
        """Of stochastic rounding on an affine grid."""
        t = (self.y - self.low[:, None]) / np.where(self.step > 0, self.step, 1)[:, None]
        on_code = np.abs(t - np.round(t)) < 1e-9  # above all both ends of the range
        p = np.where(on_code, 0, t - np.floor(t))
        return float((self.cost * self.step**2 * (p * (1 - p)).sum(1)).sum())

    def bound(self, per_entry: float = 0.25) -> float:
        return float((self.cost * self.step**2).sum() * self.y.shape[1] * per_entry)


def _range(rows: np.ndarray) -> np.ndarray:
    return rows.max(1) - rows.min(1)


def _rowwise(forward: np.ndarray, inverse: np.ndarray, y: np.ndarray, steps: int) -> Dense:
    return Dense(forward, inverse, y, y.min(1), _range(y) / steps)


def ptq(x: np.ndarray, steps: int) -> Dense:
    n, eye = len(x), np.eye(len(x))
    return Dense(eye, eye, x, np.full(n, x.min()), np.full(n, (x.max() - x.min()) / steps))


def psq(x: np.ndarray, steps: int) -> Dense:
    return _rowwise(np.eye(len(x)), np.eye(len(x)), x, steps)


def grouping(size: list[float]) -> list[tuple[int, list[int]]]:
    """Blocks as (large row, its small rows), by the released rule; empty where no row deserves a block."""
    n = len(size)
    order = sorted(range(n), key=lambda i: (-size[i], i))
    v = [size[i] for i in order]
    count = 0
    for small in range(1, n):  # the smallest number of small rows at which the rule holds
        large = n - small
        total = sum(v[:large])
        if total > 0 and small * v[large - 1] / total > 1:
            count = large
            break
    if count == 0:
        return []
    blocks, start, share = [], 0, 0.0
    for j in range(count):
        share += (n - count) * v[j] / sum(v[:count])
        stop = int(np.floor(share + 0.5))
        blocks.append((order[j], [order[count + i] for i in range(start, stop)]))
        start = stop
    return blocks


def householder(k: int) -> np.ndarray:
    """Q = I − 2nnᵀ/‖n‖², n = 1/√k − e_1."""
    normal = np.full(k, k**-0.5)
    normal[0] -= 1
    return np.eye(k) - 2 * np.outer(normal, normal) / (normal @ normal)


def bhq(x: np.ndarray, steps: int, guard: bool = True, small_rows: str = "released") -> Dense:
    n = len(x)
    size = _range(x)
    centred = x - x.min(1, keepdims=True)
    forward, inverse = np.eye(n), np.eye(n)
    for large, small in grouping(size.tolist()):
        rows = np.array([large, *small])
        k = len(rows)
        q = householder(k)
        w1 = size[large] / np.sqrt(k)
        spread = np.abs(q).max() if small_rows == "released" else (k - 1) / np.sqrt(k)
        w2 = size[small].max() * spread
        s = np.full(k, 1.0 if w2 == 0 else (w2 / (k - 1)) ** (-1 / 3))
        s[0] = w1 ** (-1 / 3)
        s[size[rows] == 0] = 0
        inv = np.where(s == 0, 0, 1 / np.where(s == 0, 1, s))
        block, undo = q * s, inv[:, None] * q
        if guard:
            mixed = ((undo**2).sum(0) * _range(block @ centred[rows]) ** 2).sum()
            if mixed >= (size[rows] ** 2).sum():
                continue
        forward[np.ix_(rows, rows)] = block
        inverse[np.ix_(rows, rows)] = undo
    return _rowwise(forward, inverse, forward @ centred, steps)


def hadamard(m: int) -> np.ndarray:
    """Sylvester's, not normalised."""
    h = np.ones((1, 1))
    while len(h) < m:
        h = np.block([[h, h], [h, -h]])
    return h


def shq(x: np.ndarray, steps: int, sign: np.ndarray, guard: bool = True) -> Dense:
    """One block: N must be a power of two. The rows enter the butterfly by falling size."""
    n = len(x)
    size = _range(x)
    order = sorted(range(n), key=lambda i: (-size[i], i))
    h = np.zeros((n, n))
    h[np.ix_(order, order)] = hadamard(n) / np.sqrt(n)
    s = np.where(size == 0, 0, sign / np.sqrt(np.where(size == 0, 1, size)))
    inv = np.where(s == 0, 0, 1 / np.where(s == 0, 1, s))
    forward, inverse = h * s, inv[:, None] * h.T
    y = forward @ (x - x.min(1, keepdims=True))
    if guard and ((inverse**2).sum(0) * _range(y) ** 2).sum() >= (size**2).sum():
        return psq(x, steps)
    return _rowwise(forward, inverse, y, steps)


def dense(method: str, x: np.ndarray, steps: int, seed: int = 0, guard: bool = True) -> Dense:
    """The method of that name."""
    x = np.asarray(x, dtype=np.float64)
    if method == "bhq":
        return bhq(x, steps, guard)
    if method == "shq":
        return shq(x, steps, signs(seed, len(x)), guard)
    return {"ptq": ptq, "psq": psq}[method](x, steps)


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds, on Python integers."""
    mask = 0xFFFFFFFF
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & mask, (p >> 32) ^ c[3] ^ k[1], p & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def words(seed: int, stream: int, n: int) -> list[int]:
    seed %= 1 << 64
    key = [seed & 0xFFFFFFFF, seed >> 32]
    out: list[int] = []
    for block in range(-(-n // 4)):
        out += philox4x32([block & 0xFFFFFFFF, block >> 32, stream, 0], key)
    return out[:n]


def rounding_noise(seed: int, n: int) -> list[int]:
    high = b"".join(w.to_bytes(4, "little") for w in words(seed, 0, n // 2 + 1))
    low = b"".join(w.to_bytes(4, "little") for w in words(seed, 4, n // 4 + 1))
    return [int.from_bytes(high[2 * i : 2 * i + 2], "little") << 8 | low[i] for i in range(n)]


def signs(seed: int, n: int) -> np.ndarray:
    """The signs of the scaled Hadamard transform: the top bit of stream 3."""
    return np.array([1.0 if w < 1 << 31 else -1.0 for w in words(seed, 3, n)])


def zero_scale(lo: float, hi: float, steps: int) -> float:
    """The least step of a grid 0 … steps with 0 on a code that covers [lo, hi]: try every zero code."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    best = np.inf
    for z in range(steps + 1):
        if (lo < 0 and z == 0) or (hi > 0 and z == steps):
            continue
        best = min(best, max(-lo / z if z else 0.0, hi / (steps - z) if z < steps else 0.0))
    return best
