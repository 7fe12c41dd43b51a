"""Certification: draws on every input, all tests, one verdict."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fqt.errors import FqtError
from fqt.kernels.rounding import DITHERED
from fqt.quant import Kept, Quantizer, quantizer, quantizer_name
from fqt.seeds import derive_seed
from fqt.stats.certification import bias, independence, seeding
from fqt.stats.certification.certificate import Certificate, Finding, Power, verdict
from fqt.stats.certification.inputs import COLUMNS, Input, adversarial_inputs
from fqt.stats.certification.sample import Function, Refused, Sample, draw
from fqt.stats.certification.statistic import Significance

DRAWS = 1024
RATE = 1e-3
_KINDS = 13  # kinds of tests that share the false-alarm rate equally
_SEEDS = 2**31
_MIXES: dict[int | str | None, int | None] = {0: 0, "rows": 0, 1: 1, "features": 1, None: None, "none": None}

Progress = Callable[[str, int, int], None]


def certify(
    subject: Quantizer | str | Function,
    *,
    draws: int = DRAWS,
    rate: float = RATE,
    seed: int = 0,
    mixes: int | str | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Tests whether an estimate of x is unbiased, and its noise independent, on inputs chosen to break it.

    Every test is of a mean of independent draws, at a significance that Bonferroni's correction takes from `rate`;
    see docs/certify.md for the list, and `Power` for what is found. Nothing is random but the draws: the same
    arguments give the same certificate.

    Args:
        subject: a `Quantizer`, a quantizer's name, "package.module:function", or any f(x, seed) → x̂ with x an
            (N, D) float32 tensor on the CPU, seed an int below 2³¹, x̂ a float tensor of x's shape. torch's global
            generator may be used and seeded by f; it is left as it was.
        draws: estimates per input, 64 or more.
        rate: probability at most, of convicting an exact quantizer, over all tests and inputs.
        seed: what the inputs and the seeds of the draws derive from; below 2³¹ − draws.
        mixes: of a function: the axis along which it may mix entries, so that errors there are rightly
            correlated: 0 or "rows" (a transform over rows), 1 or "features", None or "none" (the default).
            Correlation along it is reported and not judged. A `Quantizer`, which is judged before its transform is
            undone, takes no other than the default.
        progress: called with (input's name, inputs done, inputs in all).

    Raises:
        FqtError: the subject cannot be found or called; it fails on plain Gaussian data; it returns what is no
            estimate of x; or an option is out of range.
    """
    _check(draws, rate, seed)
    name, target = _resolve(subject)
    axis = _axis(mixes)
    if axis is not None and isinstance(target, Quantizer):
        raise FqtError("mixes is of a function: a Quantizer is judged before its transform is undone")
    with torch.random.fork_rng(devices=[]):
        return _certify(name, target, draws, rate, seed, axis, progress or (lambda *_: None))


def _certify(
    name: str, target: Quantizer | Function, draws: int, rate: float, seed: int, mixes: int | None, tell: Progress
) -> Certificate:
    inputs = adversarial_inputs(seed)
    alphas = _alphas(inputs, rate, isinstance(target, Quantizer), draws)
    axis = _together(target) if isinstance(target, Quantizer) else mixes
    near = _Near.draw(target, inputs[0], range(seed, seed + draws))
    findings, notes = near.judge(alphas, axis)
    spread_seeds, distinct = _spread_seeds(seed, draws), float(draws)
    tested: dict[str, Input] = {}
    refused: dict[str, str] = {}
    for done, given in enumerate(inputs):
        tell(given.name, done, len(inputs))
        try:
            sample = draw(target, given, spread_seeds, near.deterministic)
        except Refused as reason:
            refused[given.name] = str(reason)
            continue
        tested[given.name] = given
        if done == 0:
            found, distinct = seeding.repeats(sample, alphas["repeats"], axis)
            odd = seeding.odd_draw(near.sample, sample, alphas["alike"], seed, axis)
            findings += [found, odd]
        findings += _judge(replace(sample, distinct=distinct), alphas, axis)
        if isinstance(target, Quantizer) and torch.isfinite(sample.error).all():
            declared = bias.declared_variance(sample, target, spread_seeds, alphas["law"])
            findings += [] if declared is None else [declared]
    if distinct < 0.5 * draws:
        notes.append(f"seeds repeat draws: bias is tested with the force of {distinct:.0f} draws only")
    tell("", len(inputs), len(inputs))
    if refused:
        text = " ".join(next(iter(refused.values())).split())[:120]
        notes.append(f"not tested, the function raised, on: {', '.join(refused)} ({text})")
    result = verdict(findings, tested)
    notes += _more_notes(target, findings, result, mixes)
    power = Power(
        entry=smallest_bias(alphas["entry"], draws, variance=1 / 4, jump=1.0),
        row=smallest_bias(alphas["row"], draws, *row_noise(COLUMNS)),
    )
    return Certificate(name, result, rate, draws, seed, tuple(findings), tuple(notes), power)


def _together(q: Quantizer) -> int | None:
    """The axis along which a quantizer's errors rightly depend on each other before its transform is undone.

    Entries of a row that is kept as a whole or not do.
    """
    return 1 if isinstance(q.transform, Kept) else None


def smallest_bias(alpha: Significance, draws: int, variance: float, jump: float, slack: float = 1e-4) -> float:
    """The bias of a mean of `draws` that scores above 1 with probability 0.99, by the normal approximation."""
    error = alpha.error(torch.tensor(variance, dtype=torch.float64), jump, 0.0, draws)
    return slack + float(alpha.z * error) + 2.3263 * math.sqrt(variance / draws)


def row_noise(columns: int) -> tuple[float, float]:
    """Variance, and typical jump, of the mean of `columns` stochastic errors: near Gaussian, 1/6 each."""
    variance = 1 / (6 * columns)
    return variance, math.sqrt(3 * variance)


def _alphas(
    inputs: Sequence[Input], rate: float, of_quantizer: bool, draws: int = DRAWS
) -> dict[str, Significance]:
    """Each kind's share of the rate and number of tests, counted before anything is drawn."""
    entries = sum(i.x.numel() for i in inputs)
    rows, columns = (sum(i.x.shape[axis] for i in inputs) for axis in (0, 1))
    counts = {
        "entry": entries,
        "row": 2 * rows,
        "all": len(inputs),
        "magnitude": len(inputs),
        "clipping": 3 * len(inputs),
        "law": entries + 2 * len(inputs) if of_quantizer else 0,
        "pairs": sum(i.x.numel() * (i.x.numel() - 1) // 2 for i in inputs),
        "sums": rows + columns + len(inputs),
        "seeds": len(seeding.LAGS) * len(seeding.SHIFTS),
        "related": 2 * seeding.RELATIVES,
        "shifted": 1,
        "repeats": 2,
        "alike": draws,
    }
    assert len(counts) == _KINDS
    return {kind: Significance(rate / _KINDS, max(count, 1)) for kind, count in counts.items()}


def _judge(sample: Sample, alphas: dict[str, Significance], mixes: int | None) -> list[Finding]:
    """All tests of one input."""
    name = sample.input.name
    if not torch.isfinite(sample.error).all():
        share = float((~torch.isfinite(sample.error)).double().mean())
        return [Finding("finite", name, math.inf, share, "NaN or Inf in the estimate")]
    found = [
        Finding("finite", name, 0.0, 0.0),
        bias.entry_mean(sample, alphas["entry"]),
        bias.row_mean(sample, alphas["row"]),
        bias.squared_bias(sample, alphas["all"]),
        bias.magnitude(sample, alphas["magnitude"]),
        bias.clipping(sample, alphas["clipping"]),
        independence.pairs(sample, alphas["pairs"], mixes),
        *independence.sums(sample, alphas["sums"], mixes),
        independence.energy_spread(sample),
    ]
    law = bias.variance_law(sample, alphas["law"])
    return found if law is None else [*found, law]


@dataclass(frozen=True)
class _Near:
    """Draws of plain data with consecutive seeds, as a user would take them, and with relatives of a few seeds."""

    sample: Sample
    relatives: Sample
    again: Tensor
    seeds: range

    @staticmethod
    def draw(target: Quantizer | Function, given: Input, seeds: range) -> _Near:
        """Draws them, and the first once more.

        Raises:
            FqtError: plain data cannot be quantized, or comes back as NaN.
        """
        related = seeding.relatives(_spread_seeds(seeds[0], seeding.BASES, "relatives"))
        try:
            sample = draw(target, given, [*seeds, *related])
            again = draw(target, given, seeds[:1])
        except Refused as reason:
            shape, why = tuple(given.x.shape), " ".join(str(reason).split())
            raise FqtError(f"f(x, seed) failed on a plain {shape} float32 tensor: {why}") from reason
        if not torch.isfinite(sample.error).all():
            raise FqtError("f(x, seed) returned NaN or Inf for plain Gaussian data: there is nothing to certify")
        near, far = (seeding.part(sample, s) for s in (slice(0, len(seeds)), slice(len(seeds), None)))
        return _Near(near, far, again.error[0], seeds)

    @property
    def deterministic(self) -> bool:
        """Whether nothing is drawn at all."""
        error = self.sample.error
        return bool((error == error[0]).all() and (self.relatives.error == error[0]).all())

    def judge(self, alphas: dict[str, Significance], mixes: int | None) -> tuple[list[Finding], list[str]]:
        """Are draws new, unrelated, and what the seed says? Findings and notes."""
        repeated, distinct = seeding.repeats(self.sample, alphas["repeats"], mixes)
        sample = replace(self.sample, distinct=distinct)
        findings = [
            repeated,
            seeding.neighbours(sample, alphas["seeds"]),
            seeding.related(self.relatives, alphas["related"]),
            seeding.shifted(sample, alphas["shifted"]),
            seeding.repeatable(sample, self.again),
        ]
        notes = ["deterministic: every seed gives the same estimate"] if self.deterministic else []
        if not findings[-1].passed:
            notes.append("not repeatable: the same seed gives another estimate each time")
        return findings, notes


def _spread_seeds(seed: int, draws: int, purpose: str = "certify") -> list[int]:
    """Seeds below 2³¹ without pattern, so that a relation between neighbours does not pass for a bias."""
    g = torch.Generator().manual_seed(derive_seed(seed, purpose))
    return [int(s) for s in torch.randint(0, _SEEDS, (draws,), generator=g)]


def _more_notes(
    target: Quantizer | Function, findings: Sequence[Finding], result: str, mixes: int | None
) -> list[str]:
    notes = []
    if isinstance(target, Quantizer) and any(coding.rounding == DITHERED for coding in target.codings):
        widest = max((f for f in findings if f.test == "spread of ‖error‖²"), key=lambda f: f.effect)
        which = "dithered" if len(target.codings) == 1 else "dithered (where 'best' takes it)"
        notes.append(
            f"{which} errors are independent in threes, not jointly: linear functionals vary as with independent "
            f"errors, ‖error‖² up to {widest.effect:.1f} times as much (variance, on {widest.input})"
        )
    if isinstance(target, Quantizer) and _together(target) is not None:
        notes.append("rows are kept as a whole or not at all: correlation across features is reported, not judged")
    if not isinstance(target, Quantizer) and mixes is not None:
        axis = ("rows", "features")[mixes]
        notes.append(f"correlation across {axis} is reported, not judged: mixes={mixes}")
    if result == "asymptotic":
        notes.append("biased only where few entries carry a row's energy; no bias was found on dense inputs")
    return notes


def _axis(mixes: int | str | None) -> int | None:
    if isinstance(mixes, bool) or not isinstance(mixes, int | str | None) or mixes not in _MIXES:
        raise FqtError(f'mixes must be 0 or "rows", 1 or "features", None or "none", not {mixes!r}')
    return _MIXES[mixes]


def _check(draws: int, rate: float, seed: int) -> None:
    if type(draws) is not int or draws < 64:
        raise FqtError(f"draws must be an integer of at least 64, not {draws!r}")
    if not isinstance(rate, float) or not 0 < rate < 0.5:
        raise FqtError(f"the false-alarm rate must lie between 0 and 0.5, not {rate!r}")
    if type(seed) is not int or not 0 <= seed < _SEEDS - draws:
        raise FqtError(f"the seed must be an integer from 0 up to 2³¹ less the draws, not {seed!r}")


def _resolve(subject: object) -> tuple[str, Quantizer | Function]:
    """The subject's name, and the `Quantizer` or function it stands for."""
    if isinstance(subject, Quantizer):
        return quantizer_name(subject) or str(subject), subject
    if isinstance(subject, str):
        return subject, load_function(subject) if ":" in subject else _named(subject)
    if isinstance(subject, type) or not callable(subject):
        raise FqtError(f"cannot certify {subject!r}: give a quantizer, its name, or a function f(x, seed)")
    return getattr(subject, "__qualname__", type(subject).__name__), subject


def _named(name: str) -> Quantizer:
    try:
        return quantizer(name)
    except FqtError as error:
        raise FqtError(f"{error}; a function goes by package.module:function") from None


def load_function(path: str) -> Quantizer | Function:
    """The function, or `Quantizer`, that "package.module:name" stands for.

    Raises:
        FqtError: it cannot be imported, or is none.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may raise anything while it is imported
        raise FqtError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    if isinstance(found, Quantizer):
        return found
    if isinstance(found, type) or not callable(found):
        raise FqtError(f"{path}: is not a function f(x, seed)")
    return found
