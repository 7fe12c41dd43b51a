"""The measurements behind the paper's figures, on a network of this library's own training.

============  ==================================================================================================
variance      variance of the parameter gradient against the bits, for each quantizer
profile       exact variance of each quantizer on each layer's gradient
histogram     codes and bin sizes of one layer's gradient
layers        whose quantizer adds what to whose gradient's variance (Theorem 2)
overhead      time of each quantizer against the convolution it serves
============  ==================================================================================================

Each leaves one JSON record in the folder. What is in a record is not measured again: an interrupted sweep goes on
where it was. A record of other settings, or of another network, is never mixed with: it is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fqt.errors import FqtError
from fqt.nn import Recipe
from fqt.paper.overhead import Convolution, check_overhead, time_convolution, time_quantizer
from fqt.paper.profile import code_histogram, gradient_of_layer, layer_profile
from fqt.paper.quantizers import METHODS, paper_quantizer, paper_quantizers, sweep
from fqt.paper.record import FORMAT
from fqt.records import MAYBE, TEXT, check_shape, environment, read_json, write_json
from fqt.stats import quantization_variance, sampling_variance
from fqt.stats.decomposition import decompose
from fqt.stats.record import table_record
from fqt.train.config import resolve
from fqt.train.run import Observer, Silent, train
from fqt.train.snapshot import Snapshot

__all__ = ["FULL", "MEASURED", "QUICK", "Effort", "Reproduction", "trained_network"]

_NAME = (str, type(None))
# What a row must say for it to be known as done.
ROWS: dict[str, dict[str, Any]] = {
    "variance": {"method": _NAME, "rounding": _NAME, "bits": MAYBE, "grad_weight": TEXT, "value": MAYBE},
    "overhead": {"samples": (int,), "method": _NAME, "rounding": _NAME},
}
ROUNDINGS = ("stochastic", "dithered")
CIFAR10_STEPS = 600  # half-way, at 300, the loss falls fast and the gradient is that of a network in training
HISTOGRAM_BITS = 8  # the paper's
LAYERS_BITS = 4  # of its block Householder quantizer: enough noise to see, too little to change the gradients below
# Observed gradients carry the noise of the layers above: eight dithered bits add a thousandth of the mini-batch's.
_NEARLY_EXACT = Recipe(grad_input="shq8d")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        bits: widths of grad_input.
        batches, draws: of the variance of the gradient; batches also of the profile.
        sampling_batches: for the mini-batch variance.
        convolution: its shape, for the overhead.
        repeats: timings of each piece of work.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    batches: int = 4
    draws: int = 2
    sampling_batches: int = 16
    convolution: Convolution = field(default_factory=Convolution)
    repeats: int = 9


FULL = Effort()
QUICK = Effort(
    bits=(2, 4, 8),
    batches=2,
    sampling_batches=4,
    convolution=Convolution(samples=16, channels=16, size=28),
    repeats=3,
)


def trained_network(
    folder: Path,
    *,
    data: str | None = None,
    model: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    command: Sequence[str] = (),
    observer: Observer | None = None,
) -> Snapshot:
    """A network half-way through a qat run in ``folder``, which is made or continued if need be.

    With ``data`` the task is CIFAR-10 and the run 600 steps long, without it is digits; the rest are the task's
    defaults.

    Raises:
        FqtError: the folder holds a different run, or what `train` raises.
        Interrupted: the user stopped the training; calling again continues.
    """
    if data is not None:
        steps = steps or CIFAR10_STEPS
    given = {"recipe": "qat", "data": data, "model": model, "steps": steps, "seed": seed}
    config = resolve("digits" if data is None else "cifar10", None, given)
    train(config, folder, resume=True, command=command, observer=observer)
    return Snapshot.of_config(config, folder / "halfway.pt")


class Reproduction:
    """The figures' measurements on one network, kept in one folder.

    Args:
        folder: where the records go.
        effort: how much is measured.
        seed: of all noise.
        force: discard the records that are there.
        command: what the user typed, for the records.
        observer: told of progress.
    """

    def __init__(
        self,
        folder: Path,
        *,
        effort: Effort = FULL,
        seed: int = 0,
        force: bool = False,
        command: Sequence[str] = (),
        observer: Observer | None = None,
    ) -> None:
        self.folder, self.effort, self.seed, self.force = folder, effort, seed, force
        self.command, self.observer = command, observer or Silent()

    def variance(self, network: Snapshot) -> None:
        """Variance of the parameter gradient against the bits; one row per cell of `sweep`.

        Raises:
            FqtError: a record of other settings is there, or what the estimators raise.
        """
        effort, seed = self.effort, self.seed
        settings = {"bits": effort.bits, "batches": effort.batches, "draws": effort.draws}
        record = self._open("variance", {**settings, "sampling_batches": effort.sampling_batches}, network)
        batches = network.batches(max(effort.batches, effort.sampling_batches))
        cells = sweep(effort.bits)
        done = [
            {name: row[name] for name in ("method", "rounding", "bits", "grad_weight")} for row in record["rows"]
        ]
        missing = [cell for cell in cells if dataclasses.asdict(cell) not in done]
        self.observer.begin("variance against bits", len(cells), len(cells) - len(missing))
        try:
            if "sampling" not in record:
                qat = network.model("qat")
                found = sampling_variance(qat, network.loss, batches[: effort.sampling_batches], seed).total
                record["sampling"] = dataclasses.asdict(found)
                self._save("variance", record)
            for cell in missing:
                model = network.model(cell.recipe())
                found = quantization_variance(
                    model, network.loss, batches[: effort.batches], effort.draws, seed
                ).total
                record["rows"].append({**dataclasses.asdict(cell), **dataclasses.asdict(found)})
                self._save("variance", record)
                self.observer.step()
        finally:
            self.observer.end()

    def profile(self, network: Snapshot) -> None:
        """Exact variance by layer, quantizer and bits; one row per layer.

        Raises:
            FqtError: a record of other settings is there, or the model has no layer to profile.
        """
        settings = {"bits": self.effort.bits, "batches": self.effort.batches, "roundings": ROUNDINGS}
        record = self._open("profile", settings, network)
        if record["rows"]:
            return
        named = {
            f"{method}, {rounding}, {bits}": q
            for (method, rounding, bits), q in paper_quantizers(self.effort.bits, ROUNDINGS).items()
        }
        batches = network.batches(self.effort.batches)
        self.observer.begin("variance by layer", len(batches), 0)
        try:
            model, profiles = network.model(_NEARLY_EXACT), []
            for batch in batches:
                profiles.append(layer_profile(model, network.loss, [batch], named, self.seed))
                self.observer.step()
        finally:
            self.observer.end()
        for of_batches in zip(*profiles, strict=True):
            first = of_batches[0]
            variance = {
                method: {
                    rounding: [
                        sum(p.variance[f"{method}, {rounding}, {bits}"] for p in of_batches) / len(batches)
                        for bits in self.effort.bits
                    ]
                    for rounding in ROUNDINGS
                }
                for method in METHODS
            }
            energy = sum(p.energy for p in of_batches) / len(batches)
            row = {"layer": first.layer, "rows": first.rows, "columns": first.columns, "energy": energy}
            record["rows"].append({**row, "variance": variance})
        self._save("profile", record)

    def histogram(self, network: Snapshot, layer: str | None = None) -> None:
        """Codes and bin sizes of one layer's gradient; one row per method.

        Raises:
            FqtError: a record of other settings is there, or the model has no such layer.
        """
        record = self._open("histogram", {"bits": HISTOGRAM_BITS, "layer": layer}, network)
        if record["rows"]:
            return
        name, x = gradient_of_layer(
            network.model(_NEARLY_EXACT), network.loss, network.batches(1)[0], layer, self.seed
        )
        record["layer"], record["shape"] = name, list(x.shape)
        for method in METHODS:
            found = code_histogram(paper_quantizer(method, HISTOGRAM_BITS), x, self.seed)
            record["rows"].append({"method": method, **dataclasses.asdict(found)})
        self._save("histogram", record)

    def layers(self, network: Snapshot) -> None:
        """Theorem 2's layer × layer table, of BHQ with the paper's 8 bits per tensor for grad_weight.

        Raises:
            FqtError: a record of other settings is there, or what `decompose` raises.
        """
        effort = self.effort
        settings = {"method": "bhq", "bits": LAYERS_BITS, "batches": effort.batches, "draws": effort.draws}
        record = self._open("layers", settings, network)
        if "table" in record:
            return
        model = network.model(Recipe(grad_input=paper_quantizer("bhq", LAYERS_BITS)))
        batches = network.batches(effort.batches)
        self.observer.begin("layer × layer", 1, 0)
        try:
            record["table"] = table_record(decompose(model, network.loss, batches, effort.draws, self.seed))
            self.observer.step()
        finally:
            self.observer.end()
        self._save("layers", record)

    def overhead(self) -> None:
        """Seconds of each quantizer and of the convolution, one thread; then of smaller batches.

        Everything is checked before it is timed (`check_overhead`).

        Raises:
            FqtError: a record of other settings is there, or a check failed.
        """
        shape, repeats = self.effort.convolution, self.effort.repeats
        settings = {"convolution": dataclasses.asdict(shape), "repeats": repeats, "bits": HISTOGRAM_BITS}
        record = self._open("overhead", settings, None)
        pairs = [(m, r) for m in METHODS for r in ROUNDINGS]
        halves = [shape.samples // 4, shape.samples // 2]
        work: list[tuple[int, str | None, str | None]] = [(shape.samples, None, None)]
        work += [(shape.samples, *pair) for pair in pairs]
        work += [(samples, m, "stochastic") for samples in halves for m in METHODS]
        done = [(row["samples"], row["method"], row["rounding"]) for row in record["rows"]]
        missing = [item for item in work if item not in done]
        if not missing:
            return
        small = dataclasses.replace(shape, samples=min(shape.samples, 16))
        self.observer.begin("overhead", len(work), len(work) - len(missing))
        try:
            check_overhead(small, {f"{m}, {r}": paper_quantizer(m, HISTOGRAM_BITS, r) for m, r in pairs}, self.seed)
            for samples, method, rounding in missing:
                here = dataclasses.replace(shape, samples=samples)
                if method is None or rounding is None:
                    seconds = time_convolution(here, repeats, self.seed)
                else:
                    q = paper_quantizer(method, HISTOGRAM_BITS, rounding)
                    seconds = time_quantizer(here, q, repeats, self.seed)
                record["rows"].append(
                    {"samples": samples, "method": method, "rounding": rounding, "seconds": seconds}
                )
                self._save("overhead", record)
                self.observer.step()
        finally:
            self.observer.end()

    def _open(self, figure: str, settings: dict[str, Any], network: Snapshot | None) -> dict[str, Any]:
        """The record that is there, or a new one."""
        path = self.folder / f"{figure}.json"
        wanted = {"seed": self.seed, **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}
        identity = None if network is None else network.identity()
        if path.exists() and not self.force:
            record = read_json(path)
            if not isinstance(record, dict) or record.get("format") != FORMAT or "rows" not in record:
                raise FqtError(
                    f"{path} is no record of this figure; name another --out, or discard it with --force"
                )
            check_shape(record, {"environment": {}, "rows": [ROWS.get(figure, {})]}, str(path))
            if record.get("settings") != wanted or record.get("network") != identity:
                raise FqtError(
                    f"{path} was measured with other settings or on another network: name another --out, or "
                    "discard it with --force"
                )
            return record
        return {
            "format": FORMAT,
            "figure": figure,
            "environment": environment(self.command),
            "settings": wanted,
            "network": identity,
            "rows": [],
        }

    def _save(self, figure: str, record: dict[str, Any]) -> None:
        write_json(self.folder / f"{figure}.json", record)


MEASURED = ("variance", "layers", "profile", "histogram", "overhead")
