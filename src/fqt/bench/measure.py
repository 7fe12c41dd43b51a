"""A run: every case verified, then timed in rounds; the record grows with each round and survives Ctrl-C."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fqt import kernels, nn
from fqt.bench import timing
from fqt.bench.cases import Case, kind
from fqt.bench.contestants import Contestant, Runner, Unavailable, contestants, noiseless, torchao_version
from fqt.bench.device import clock, describe, device_named, peak_bytes
from fqt.bench.integers import GPU_SHAPES, SHAPES, IntegerProduct, Shape, best_product
from fqt.bench.kept import kept_bytes
from fqt.bench.products import BlockedProduct
from fqt.bench.quantizing import Copy, Quantization, draw_all
from fqt.bench.verify import Verification, check_bias, check_error
from fqt.bench.workloads import Layer, Product, Quantize, Step, count_macs
from fqt.errors import FqtError
from fqt.files import is_plain
from fqt.records import environment, write_json

FORMAT = 1
LIMIT = "integer products"
EMULATED = 8.0
"""How many times as long as in fp32 a pass in bf16 takes where torch only emulates it: 14 to 71 without bfloat16
instructions, 0.2 to 2 with them (docs/speed.md)."""


class Observer(Protocol):
    """Is told what goes on."""

    def case(self, title: str, total: int) -> None:
        """A case with that many readings begins."""

    def say(self, text: str) -> None:
        """What is being done."""

    def advance(self) -> None:
        """A reading more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        cases: which.
        recipes: for every case; empty for each case's own.
        threads: of torch; None leaves its choice.
        repeats: rounds per case.
        seeds: passes whose mean must approach the gradient without noise.
        compile: whether compiled contestants take part.
        shapes: tried for the integer-product limit; empty for those that suit the device.
        device: "cpu", "cuda" or "cuda:1".
        command: for the record.
    """

    cases: tuple[Case, ...]
    recipes: tuple[str, ...] = ()
    threads: int | None = None
    repeats: int = 20
    seeds: int = 4
    compile: bool = True
    shapes: Sequence[Shape] = ()
    device: str = "cpu"
    command: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.seeds < 2 or (self.threads is not None and self.threads < 1):
            raise FqtError("a bench needs at least one round, two seeds and one thread")
        for recipe in self.recipes:
            nn.load_recipe(recipe)
        device_named(self.device)

    @property
    def at(self) -> torch.device:
        """Where."""
        return device_named(self.device)


def run(request: Request, out: Path | None, observer: Observer) -> dict[str, Any]:
    """Measures; the record is written after every case, and once more at the end.

    Torch's thread count and generators are afterwards what they were.

    Args:
        request: what.
        out: the record's file; None writes none.
        observer: is told.

    Returns:
        The record; "interrupted" says that Ctrl-C ended it early, with what was complete by then.

    Raises:
        FqtError: the record cannot be written.
    """
    before = torch.get_num_threads()
    record: dict[str, Any] = {"kind": "bench", "format": FORMAT}
    try:
        torch.set_num_threads(request.threads or before)
        record |= {
            "environment": environment(request.command),
            "kernels": asdict(kernels.status()),
            "device": describe(request.at),
            "torchao": torchao_version(),
            "repeats": request.repeats,
            "compile": request.compile,
            "interrupted": False,
            "integer_rate": None,
            "cases": [],
        }
        if out is not None:
            _keep(out, record)  # what cannot be written is said before hours of work
        compiler = _compiler() if request.compile else contextlib.nullcontext()
        drawing = [request.at] if request.at.type == "cuda" else []
        with torch.random.fork_rng(devices=drawing), compiler, _settings(request.at):
            _measure(request, out, record, observer)
    except KeyboardInterrupt:
        record["interrupted"] = True
    finally:
        torch.set_num_threads(before)
        if out is not None and "cases" in record:
            write_json(out, record)
    return record


def _keep(out: Path, record: Mapping[str, Any]) -> None:
    """Writes the record as far as it has come; into a pipe goes only the whole one."""
    if is_plain(out):
        write_json(out, record)


def failures(record: Mapping[str, Any]) -> list[str]:
    """One line per contestant whose result was wrong."""
    return [
        f"{case['name']}, {row['name']}: {row['reason']}"
        for case in record["cases"]
        for row in case["contestants"]
        if row["status"] == "failed"
    ]


@contextlib.contextmanager
def _compiler() -> Iterator[None]:
    """Compiled contestants side by side: each is a further specialization of the same functions to dynamo."""
    from torch._dynamo import config

    with config.patch(recompile_limit=256, accumulated_recompile_limit=4096), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo explains every graph break; their number is in the record
        yield


@contextlib.contextmanager
def _settings(device: torch.device) -> Iterator[None]:
    """A GPU's float32 products are those of the tensor cores, TF32: the best that float32 training has there."""
    if device.type == "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _measure(request: Request, out: Path | None, record: dict[str, Any], observer: Observer) -> None:
    product, at = None, request.at
    for case in request.cases:
        entry: dict[str, Any] = {
            "name": case.name,
            "title": case.title,
            "kind": kind(case.workload),
            "input": list(case.workload.input),
            "floors": [{**asdict(f), "recipes": list(f.recipes)} for f in case.floors if case.device == at.type],
            "contestants": [],
        }
        if at.type != "cpu":
            entry["device"] = at.type
        record["cases"].append(entry)
        recipes = request.recipes or case.recipes
        if isinstance(case.workload, Product):
            calls = _prepare_products(case.workload, case.recipes, request, entry, observer)
        elif isinstance(case.workload, Quantize):
            calls = _prepare_quantizer(case.workload, recipes, request, entry, observer)
        else:
            if product is None:
                product = _integer_rate(request, record, observer)
            calls = _prepare(case, recipes, request, product, entry, observer)
        _time(calls, request, entry, observer)
        if out is not None:
            _keep(out, record)
        if request.compile:
            torch._dynamo.reset()
        del calls
        if at.type == "cuda":
            torch.cuda.empty_cache()


def _integer_rate(request: Request, record: dict[str, Any], observer: Observer) -> IntegerProduct:
    shapes = request.shapes or (SHAPES if request.at.type == "cpu" else GPU_SHAPES)
    observer.case("integer products", len(shapes))
    observer.say("finding the best shape")
    product, tried = best_product(shapes, request.at)
    if not product.is_right():
        raise FqtError(f"{product.by} returns wrong sums on this machine: there is no limit to measure against")
    record["integer_rate"] = {
        "shape": list(product.shape),
        "transposed": product.transposed,
        "by": product.by,
        "macs": product.macs,
        "tried": tried,
    }
    return product


Calls = dict[str, Callable[[], object]]


def _row(entry: dict[str, Any], name: str, group: str, **more: Any) -> dict[str, Any]:
    row = {"name": name, "group": group, "status": "verified", "reason": "", "seconds": [], **more}
    entry["contestants"].append(row)
    return row


def _verified(row: dict[str, Any], found: Verification) -> bool:
    row |= {"error": found.error, "bias": found.bias, "errors": dict(found.errors)}
    if found.problem:
        row |= {"status": "failed", "reason": found.problem}
    return not found.problem


def _prepare(
    case: Case,
    recipes: Sequence[str],
    request: Request,
    product: IntegerProduct,
    entry: dict[str, Any],
    observer: Observer,
) -> Calls:
    """Builds and verifies the contestants of a layer or a step."""
    assert isinstance(case.workload, Layer | Step)
    everyone, at = contestants(recipes, request.at.type, case.keep, case.spare), request.at
    observer.case(case.title, len(everyone) + request.repeats)
    entry |= {"macs": count_macs(case.workload), "kept": {}}
    calls: Calls = {}
    formats: dict[str, bool] = {}
    first, emulated = Runner(everyone[0], case.workload, device=at), ""
    reference = first.outcome()
    for contestant in everyone:
        observer.say(f"verifying {contestant.name}")
        row = _row(
            entry,
            contestant.name,
            contestant.group,
            recipe=contestant.label,
            autocast=contestant.autocast,
            compiled=contestant.compiled,
        )
        try:
            if contestant.compiled and not request.compile:
                raise Unavailable("compilation was left out")
            if contestant.name == "bf16":
                emulated = _emulated(Runner(contestant, case.workload, device=at), first)
            if emulated and (contestant.autocast or contestant.short):
                if not contestant.compiled:
                    entry["kept"][contestant.name] = asdict(
                        kept_bytes(Runner(contestant, case.workload, device=at))
                    )
                raise Unavailable(emulated)
            breaks = _graph_breaks() if contestant.compiled else 0
            runner = _in_best_format(contestant, case.workload, formats, at)
            row["channels_last"] = runner.format is torch.channels_last
            if _verified(row, _check(runner, reference, case, request.seeds)):
                row["peak_bytes"] = None if contestant.graphed else peak_bytes(runner, at)  # a graph's are its own
                calls[contestant.name] = runner
            if contestant.compiled:
                row["graph_breaks"] = _graph_breaks() - breaks
            elif not contestant.graphed:
                entry["kept"][contestant.name] = asdict(kept_bytes(runner))
            if contestant.group == "ours":
                row["arithmetic"] = _arithmetic(runner)
        except Unavailable as reason:
            row |= {"status": "skipped", "reason": str(reason)}
        except FqtError:
            raise  # the recipe does not suit the model: for the user to change
        except Exception as error:
            # A compiler that does not work, or a baseline that does not run, must not end the run.
            reason_ = f"{type(error).__name__}: {_first_line(error)}"
            ours_broken = contestant.group == "ours" and not contestant.compiled
            row |= {"status": "failed" if ours_broken else "skipped", "reason": reason_}
        observer.advance()
    _row(entry, LIMIT, "limit", macs=product.macs)
    calls[LIMIT] = product
    return calls


def _emulated(bf16: Runner, fp32: Runner) -> str:
    """Why no contestant in bfloat16 is verified and timed, which would take hours; empty where they are."""
    at = clock(fp32.device)
    for runner in (bf16, fp32):
        runner.backward()
    for _ in range(2):  # once more where it is slow: one reading may be of a machine held up
        ratio = at(bf16.backward) / at(fp32.backward)
        if ratio < EMULATED:
            return ""
    return f"bfloat16 is emulated here: a pass in it takes {ratio:.0f} times that in fp32"


def _check(runner: Runner, reference: Mapping[str, torch.Tensor], case: Case, seeds: int) -> Verification:
    if runner.contestant.group == "fp8":
        runner.backward()  # its scales are those of the pass before
    layer, slack = isinstance(case.workload, Layer), runner.contestant.slack
    found = check_error(runner.outcome(), reference, case.bound, by_row=layer, slack=slack)
    if runner.contestant.group != "ours" or found.problem:
        return found
    last = runner.format is torch.channels_last
    quiet = Runner(noiseless(runner.contestant), runner.workload, last, runner.device)
    exact = quiet.outcome()
    rounding = 2.0**-8 if runner.contestant.autocast else 2.0**-10
    if isinstance(case.workload, Step):
        rounding *= 4  # a gradient is rounded by every layer on its way: twice that was seen behind fifty of them
    return check_bias(found, (runner.outcome(seed) for seed in range(1, seeds + 1)), exact, rounding)


def _in_best_format(
    contestant: Contestant, workload: Layer | Step, formats: dict[str, bool], at: torch.device
) -> Runner:
    """The contestant in the memory format that suits it; a compiled one takes that of its eager form."""
    if len(workload.input) != 4:
        return Runner(contestant, workload, device=at)
    eager = contestant.name.removesuffix(" graphed").removesuffix(" compiled")
    if eager not in formats:
        both = {last: Runner(contestant, workload, last, at) for last in (False, True)}
        spent = {last: [] for last in both}  # type: dict[bool, list[float]]
        for _ in range(3):
            for last, runner in both.items():
                spent[last].append(clock(at)(runner.backward))
        formats[eager] = min(spent[True]) < min(spent[False])
    return Runner(contestant, workload, formats[eager], at)


def _arithmetic(runner: Runner) -> dict[str, int]:
    """How many of the model's products run on integers, simulated, or in float."""
    found: dict[str, int] = {}
    for product in nn.explain(runner.plain).products:
        found[product.arithmetic] = found.get(product.arithmetic, 0) + 1
    return found


def _graph_breaks() -> int:
    """How many dynamo has counted so far."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0][:300]


def _prepare_quantizer(
    workload: Quantize, recipes: Sequence[str], request: Request, entry: dict[str, Any], observer: Observer
) -> Calls:
    observer.case(entry["title"], 1 + len(recipes) + request.repeats)
    sources = draw_all(workload, request.at)
    copy = Copy(sources)
    calls: Calls = {}
    if _verified(_row(entry, "copy", "copy", bytes=copy.bytes), copy.verify()):
        calls["copy"] = copy
    observer.advance()
    for recipe in recipes:
        observer.say(f"verifying {recipe}")
        try:
            quantization = Quantization(sources, recipe)
        except FqtError as reason:
            _row(entry, recipe, "ours", recipe=recipe, status="skipped", reason=str(reason))
        else:
            row = _row(entry, recipe, "ours", recipe=recipe, bytes=quantization.bytes)
            if _verified(row, quantization.verify(request.seeds)):
                calls[recipe] = quantization
        observer.advance()
    return calls


def _prepare_products(
    workload: Product, operands: Sequence[str], request: Request, entry: dict[str, Any], observer: Observer
) -> Calls:
    observer.case(entry["title"], 1 + len(operands) + request.repeats)
    calls: Calls = {}
    for name in (None, *operands):
        product, known = BlockedProduct(workload, name, request.at), {} if name is None else {"recipe": name}
        row = _row(entry, name or "plain product", "plain" if name is None else "ours", **known)
        if _verified(row, product.verify()):
            calls[row["name"]] = product
        observer.advance()
    return calls


def _time(calls: Calls, request: Request, entry: dict[str, Any], observer: Observer) -> None:
    by = clock(request.at)
    rows = {row["name"]: row for row in entry["contestants"]}
    observer.say("warming up")
    counts = {name: timing.calls_per_reading(call, by) for name, call in calls.items()}
    for name, count in counts.items():
        rows[name] |= {"status": "timed", "calls": count}
    observer.say("timing")
    for found in timing.rounds(calls, counts, request.repeats, by):
        for name, value in found.items():
            rows[name]["seconds"].append(value)
        observer.advance()
