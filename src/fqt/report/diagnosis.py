"""A diagnosis and a plan as tables, for the terminal and for the page, and a diagnosis as a section of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fqt.report.diagnosis_charts import diagnosis_panels
from fqt.report.section import Section, Table, facts
from fqt.report.summary import number

__all__ = ["diagnosis_section", "diagnosis_tables", "plan_table"]


def diagnosis_section(name: str, record: Mapping[str, Any]) -> Section:
    """The tables, the variances by bits and by layer, the codes, and the layer × layer picture.

    Raises:
        KeyError, TypeError: the record is damaged.
    """
    widths = sorted({o["bits"] for o in record["operands"]})
    bits = " and ".join(map(str, widths)) if len(widths) < 3 else f"{widths[0]} to {widths[-1]}"
    where = f"At step {record['step']}: " if "step" in record else ""
    lead = (
        f"{where}ρ of the whole gradient is {with_error(record['total']['rho'])}, gradients in {bits} bits; from "
        f"{record['batches']} batches and {record['draws']} quantized gradients of each."
    )
    recipe = f" with {record['recipe']}" if "recipe" in record else ""
    drowned = f"‖g‖ < √3 · noise, where quantized training becomes ineffective: {', '.join(record['drowned'])}"
    return Section(
        title=f"Diagnosis: {record.get('run', name)}{recipe}",
        lead=lead,
        warnings=[drowned] if record["drowned"] else [],
        tables=diagnosis_tables(record),
        charts=[panel.chart() for panel in diagnosis_panels(record)],
        details=[facts("Recipes", record["recipes"]), facts("Environment", record.get("environment", {}))],
        footer=name,
    )


def diagnosis_tables(record: Mapping[str, Any]) -> list[Table]:
    """ρ by layer, gradient operands, and the sources of Theorem 2 if they were measured."""
    tables = [_noise(record), _operands(record)]
    return tables + ([_sources(record)] if record["table"] else [])


def _noise(record: Mapping[str, Any]) -> Table:
    rows = []
    for name, noise in (*record["layers"].items(), ("whole gradient", record["total"])):
        drowned = name in record["drowned"] or (
            name == "whole gradient"
            and number(noise["energy"]["value"]) < 3 * number(noise["quantization"]["value"])
        )
        cells = [with_error(noise[key]) for key in ("sampling", "quantization", "rho")]
        rows.append((name or "(model)", *cells, "!" if drowned else ""))
    return Table(
        "Gradient noise by layer",
        ("layer", "sampling", "quantization", "ρ", "√3"),
        rows,
        note="Variances summed over entries; ρ = quantization / sampling; √3: ‖g‖ below √3 · noise.",
    )


def _operands(record: Mapping[str, Any]) -> Table:
    widths = sorted({b for o in record["operands"] for b in o["variance"]}, key=int)
    rows = []
    for o in record["operands"]:
        energy, at = o["energy"]["value"], str(o["bits"])
        there = [o["variance"].get(b, {"value": math.nan})["value"] for b in widths]
        shares = [short(v / energy if energy else math.nan) for v in there]
        exact, bound = o["variance"][at]["value"], o["bound"][at]
        limit = None if not o["limit"] or not bound else o["limit"][at] / bound
        rows.append(
            (
                o["layer"] or "(model)",
                o["role"],
                at,
                *shares,
                short(bound / exact if exact else None),
                short(limit),
                short(o["range_ratio"]),
                f"{100 * o['empty']:.0f} %",
            )
        )
    return Table(
        "Gradient operands: exact variance over energy, by bits",
        ("layer", "for", "bits", *widths, "bound", "limit", "ranges", "empty"),
        rows,
        text_columns=2,
        note=(
            "At the layer's bits: bound: the closed form over the exact variance; limit: what no left transform's "
            "bound falls below, over the bound. Ranges: largest row over mean; empty: share of codes never used."
            + _again(record.get("again"))
        ),
    )


def _again(products: Sequence[str] | None) -> str:
    """What the variances of grad_output lack."""
    return (
        f" Not in these: the right operands that are quantized again, of {', '.join(products)}." if products else ""
    )


def _sources(record: Mapping[str, Any]) -> Table:
    found = record["table"]
    whole = found["total"]["*"]
    share = short(100 * found["gap"]["*"]["value"] / whole["value"]) if whole["value"] else "–"
    rows = []
    for layer in found["sources"]:
        effect = found["effect"][layer]
        both = sum(number(e["value"]) for e in effect.values())
        percent = 100 * both / whole["value"] if whole["value"] else math.nan
        cells = (with_error(effect["grad_input"]), with_error(effect["grad_weight"]), short(percent))
        rows.append((layer or "(model)", *cells))
    return Table(
        "Theorem 2: whose quantizer adds what",
        ("layer", "through grad_input", "own grad_weight", "share %"),
        rows,
        note=f"Measured directly: {with_error(whole)}; the sum of parts is off by {share} % of it.",
    )


def plan_table(widths: Mapping[str, int], weight: Mapping[str, int]) -> Table:
    """Bits by layer, with each layer's share of the multiplications."""
    total = max(sum(weight.values()), 1)
    rows = [(layer or "(model)", str(bits), f"{100 * weight[layer] / total:.1f}") for layer, bits in widths.items()]
    return Table("Bits of grad_input", ("layer", "bits", "multiplications %"), rows)


def short(value: float | None) -> str:
    """Two digits, or a dash for what is not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2g}"


def with_error(estimate: Mapping[str, float | None]) -> str:
    """An estimate with its standard error, where it has one."""
    error = short(estimate["error"])
    return short(estimate["value"]) + (f" ± {error}" if error != "–" else "")
