"""The tables of a diagnosis and of a plan, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

__all__ = ["diagnosis_tables", "plan_table"]


def diagnosis_tables(record: Mapping[str, Any]) -> list[Table]:
    """ρ by layer, gradient operands, and the sources of Theorem 2 if they were measured."""
    tables = [_noise(record), _operands(record)]
    return tables + ([_sources(record)] if record["table"] else [])


def _noise(record: Mapping[str, Any]) -> Table:
    table = Table(
        title="gradient noise by layer",
        caption="variances summed over entries; ρ = quantization / sampling; √3: ‖g‖ below √3 · noise",
        caption_justify="left",
    )
    for name in ("layer", "sampling", "quantization", "ρ", "√3"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for name, noise in (*record["layers"].items(), ("whole gradient", record["total"])):
        drowned = name in record["drowned"] or (
            name == "whole gradient" and noise["energy"]["value"] < 3 * noise["quantization"]["value"]
        )
        cells = (_with_error(noise[key]) for key in ("sampling", "quantization", "rho"))
        table.add_row(name or "(model)", *cells, "!" if drowned else "")
    return table


def _operands(record: Mapping[str, Any]) -> Table:
    widths = list(record["operands"][0]["variance"]) if record["operands"] else []
    table = Table(
        title="gradient operands: exact variance over energy, by bits",
        caption="limit: what no left transform's bound falls below, over the bound; ranges: largest row over mean",
        caption_justify="left",
    )
    for name in ("layer", "for", "bits", *map(str, widths), "limit", "ranges", "empty"):
        table.add_column(name, justify="left" if name in ("layer", "for") else "right", no_wrap=True)
    for o in record["operands"]:
        energy = o["energy"]["value"]
        shares = [_short(o["variance"][b]["value"] / energy if energy else math.nan) for b in widths]
        at = widths[-1]
        limit = None if not o["limit"] or not o["bound"][at] else o["limit"][at] / o["bound"][at]
        table.add_row(
            o["layer"] or "(model)",
            o["role"],
            str(o["bits"]),
            *shares,
            "–" if limit is None else _short(limit),
            _short(o["range_ratio"]),
            f"{100 * o['empty']:.0f} %",
        )
    return table


def _sources(record: Mapping[str, Any]) -> Table:
    found = record["table"]
    whole = found["total"]["*"]
    share = _short(100 * found["gap"]["*"]["value"] / whole["value"]) if whole["value"] else "–"
    table = Table(
        title="Theorem 2: whose quantizer adds what",
        caption=f"measured directly: {_with_error(whole)}; sum of parts off by {share} % of it",
        caption_justify="left",
    )
    for name in ("layer", "through grad_input", "own grad_weight", "share %"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for layer in found["sources"]:
        effect = found["effect"][layer]
        both = sum(e["value"] for e in effect.values())
        percent = 100 * both / whole["value"] if whole["value"] else math.nan
        table.add_row(
            layer or "(model)",
            _with_error(effect["grad_input"]),
            _with_error(effect["grad_weight"]),
            _short(percent),
        )
    return table


def plan_table(widths: Mapping[str, int], weight: Mapping[str, int]) -> Table:
    """Bits by layer, with each layer's share of the multiplications."""
    table = Table(title="bits of grad_input")
    for name in ("layer", "bits", "multiplications %"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    total = max(sum(weight.values()), 1)
    for layer, bits in widths.items():
        table.add_row(layer or "(model)", str(bits), f"{100 * weight[layer] / total:.1f}")
    return table


def _short(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2g}"


def _with_error(estimate: Mapping[str, float | None]) -> str:
    error = _short(estimate["error"])
    return _short(estimate["value"]) + (f" ± {error}" if error != "–" else "")
