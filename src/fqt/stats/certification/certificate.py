"""What a certification found, and the verdict that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fqt.errors import FqtError
from fqt.stats.certification.inputs import COLUMNS, Input

FORMAT = "fqt certificate 1"
DENSE = COLUMNS / 4  # entries that carry a row's energy
BIAS_TESTS = ("finite", "mean, each entry", "mean, each row", "mean, all entries", "magnitude", "no clipping")
NOISE_TESTS = (
    "variance law",
    "declared variance",
    "pairs of errors",
    "sums of errors",
    "seeds",
    "related seeds",
    "shifted draws",
    "repeated draws",
    "every seed alike",
    "same seed, same draw",
)
_EFFECTS = {
    "finite": "",
    "mean, each entry": "bias, in spreads of its row's errors",
    "mean, each row": "bias per entry, in spreads of its row's errors",
    "mean, all entries": "bias over noise, root mean squares",
    "magnitude": "⟨E[x̂], x⟩/‖x‖² − 1",
    "no clipping": "inward shift of rows' extremes, in ranges",
    "variance law": "measured over declared variance − 1",
    "declared variance": "measured over declared variance − 1",
    "pairs of errors": "correlation",
    "sums of errors": "variance of a sum, independent = 1",
    "seeds": "correlation between seeds",
    "related seeds": "correlation between seeds",
    "shifted draws": "overlap of draws when moved",
    "repeated draws": "share of draws that repeat another",
    "every seed alike": "gap of one draw's ‖error‖², in spans of the others",
    "same seed, same draw": "largest difference, in spreads",
    "spread of ‖error‖²": "Var‖error‖², independent = 1",
}


@dataclass(frozen=True)
class Finding:
    """One kind of test on one input.

    Attributes:
        test: the kind.
        input: the input's name.
        score: the largest statistic over its threshold; above 1 rejects.
        effect: how large what was tested is, where the score is largest; `meaning` says in what.
        where: which entry, row or pair that is.
        judged: whether it counts in the verdict.
    """

    test: str
    input: str
    score: float
    effect: float
    where: str = ""
    judged: bool = True

    @property
    def passed(self) -> bool:
        """Not rejected; what is not judged passes."""
        return not self.judged or self.score <= 1

    @property
    def meaning(self) -> str:
        """What `effect` measures."""
        return _EFFECTS[self.test]

    @property
    def outcome(self) -> str:
        """In a word."""
        return ("pass" if self.passed else "FAIL") if self.judged else "reported"

    @property
    def place(self) -> str:
        """The input, and where in it."""
        return self.input + (f", {self.where}" if self.where else "")

    def __str__(self) -> str:
        meaning = f" ({self.meaning})" if self.meaning else ""
        figures = f"score {self.score:.3g}, effect {self.effect:.3g}{meaning}"
        return f"{self.test}: {self.outcome}, {figures}, on {self.place}"


@dataclass(frozen=True)
class Power:
    """The smallest bias found with probability 0.99 at this significance and number of draws, in steps.

    Attributes:
        entry: of one entry that stochastic rounding finds half-way between two codes.
        row: common to the entries of one row of 128, each stochastic with its own fraction.
    """

    entry: float
    row: float


@dataclass(frozen=True)
class Certificate:
    """The verdict on an estimate f(x, seed) of x, and what it rests on.

    Attributes:
        subject: what was certified.
        verdict: "exact": every test passed; "asymptotic": biased only where few of a row's many entries carry its
            energy; "dependent": unbiased, but the noise is correlated, repeated, not of the declared variance or
            not what the seed says; "biased".
        rate: probability at most, of a verdict other than "exact" on a quantizer that is exact.
        draws: estimates per input. seed: what inputs and seeds of the draws start from.
        findings: all tests on all inputs.
        notes: what a reader should know besides.
        power: the smallest bias that is found.
    """

    subject: str
    verdict: str
    rate: float
    draws: int
    seed: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    power: Power

    @property
    def exact(self) -> bool:
        """Whether every test passed."""
        return self.verdict == "exact"

    @property
    def convicted(self) -> dict[str, list[Finding]]:
        """The inputs on which a test failed, with the failed tests, the clearest first."""
        failed: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if not finding.passed:
                failed.setdefault(finding.input, []).append(finding)
        return {name: sorted(found, key=lambda f: -f.score) for name, found in failed.items()}

    def worst(self) -> list[Finding]:
        """Of each kind of test the finding with the largest score (not judged: with the largest effect)."""
        best: dict[tuple[str, bool], Finding] = {}
        for f in self.findings:
            key = (f.test, f.judged)
            size = (f.score, abs(f.effect)) if f.judged else (abs(f.effect), 0.0)
            if key not in best or size > (
                (best[key].score, abs(best[key].effect)) if f.judged else (abs(best[key].effect), 0.0)
            ):
                best[key] = f
        order = (*BIAS_TESTS, *NOISE_TESTS, "spread of ‖error‖²")
        return sorted(best.values(), key=lambda f: (not f.judged, order.index(f.test)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which `from_dict` reads; infinite scores become None."""

        def plain(f: Finding) -> dict[str, Any]:
            row = asdict(f)
            row["score"] = f.score if math.isfinite(f.score) else None
            row["effect"] = f.effect if math.isfinite(f.effect) else None
            return {**row, "passed": f.passed, "meaning": f.meaning}

        return {
            "format": FORMAT,
            "subject": self.subject,
            "verdict": self.verdict,
            "rate": self.rate,
            "draws": self.draws,
            "seed": self.seed,
            "power": asdict(self.power),
            "notes": list(self.notes),
            "convicted": {name: [f.test for f in found] for name, found in self.convicted.items()},
            "findings": [plain(f) for f in self.findings],
        }

    @staticmethod
    def from_dict(record: Any) -> Certificate:
        """The certificate of such plain data.

        Raises:
            FqtError: it is none.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            raise FqtError("this is no record of fqt certify")
        try:
            return Certificate(
                subject=record["subject"],
                verdict=record["verdict"],
                rate=float(record["rate"]),
                draws=int(record["draws"]),
                seed=int(record["seed"]),
                findings=tuple(map(_finding, record["findings"])),
                notes=tuple(record["notes"]),
                power=Power(**{name: float(value) for name, value in record["power"].items()}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FqtError(f"the record of fqt certify is damaged ({type(error).__name__}: {error})") from error

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells: test, outcome, statistic over threshold, effect, its meaning, where."""
        return [
            (
                f.test,
                f.outcome,
                f"{f.score:.2f}" if f.judged else "",
                f"{f.effect:.3g}",
                f.meaning,
                f.place,
            )
            for f in self.worst()
        ]

    def summary(self) -> list[str]:
        """The lines below the table."""
        lines = [f"verdict: {self.verdict}"]
        for name, found in self.convicted.items():
            lines.append(f"convicted on “{name}”: " + "; ".join(f"{f.test} ({f.effect:.3g})" for f in found))
        lines.append(
            f"{self.draws} draws per input, seed {self.seed}; false alarms at most {self.rate:g} in all; a bias of "
            f"{self.power.entry:.3f} steps of one entry, or {self.power.row:.4f} steps common to a row of 128, is "
            "found with probability 0.99"
        )
        return lines + [f"note: {note}" for note in self.notes]

    def __str__(self) -> str:
        table = [HEADER, *self.rows()]
        width = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, width, strict=True)).rstrip() for row in table]
        return "\n".join([f"certificate of {self.subject}", *lines, *self.summary()])


def _finding(row: Mapping[str, Any]) -> Finding:
    fields = {name: row[name] for name in ("test", "input", "where", "judged")}
    if fields["test"] not in _EFFECTS:
        raise ValueError(f"unknown test {fields['test']!r}")
    score = math.inf if row["score"] is None else float(row["score"])
    effect = math.nan if row["effect"] is None else float(row["effect"])
    return Finding(score=score, effect=effect, **fields)


HEADER = ("test", "outcome", "score", "effect", "what the effect is", "where the score is largest")


def verdict(findings: Sequence[Finding], tested: Mapping[str, Input]) -> str:
    """The verdict that the failed tests amount to.

    Bias is "asymptotic" if it was found on wide inputs of which few entries carry a row's energy, and on none that
    is dense: it vanishes as energy spreads. On short rows alone, which have few entries to begin with, it is plain
    bias: of a remainder, say.

    Args:
        findings: all of them.
        tested: the inputs by name.
    """
    failed = [f for f in findings if not f.passed]
    biased = [f for f in failed if f.test in BIAS_TESTS]
    if not biased:
        return "dependent" if failed else "exact"
    if any(f.test == "finite" or (f.test == "no clipping" and math.isinf(f.score)) for f in biased):
        return "biased"
    wide = [tested[f.input] for f in biased if tested[f.input].x.shape[1] >= COLUMNS]
    dense = any(tested[f.input].carriers >= DENSE for f in biased)
    return "asymptotic" if wide and not dense else "biased"
