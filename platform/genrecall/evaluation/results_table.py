"""The results as aligned text for a terminal: channels, variants, gains with intervals, and one sentence on what they mean."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from genrecall.evaluation.records import Record, find

CHANNEL_NAMES = {
    "bm25": "BM25",
    "dense": "dense two-tower",
    "popularity": "popularity",
    "guidance": "guidance alone (no decoder)",
    "generative": "generative (ours)",
    "rrf_bm25_dense": "RRF of BM25 + dense",
    "rrf_all": "RRF of BM25 + dense + generative",
    "bm25_corrected": "BM25, spelling corrected",
    "rrf_bm25_corrected_dense": "RRF of corrected BM25 + dense",
    "rrf_all_corrected": "RRF of corrected BM25 + dense + generative",
}
_VARIANT_NAMES = {
    "cqsid": "CQ-SID",
    "rqvae": "RQ-VAE",
    "rqvae_resized": "RQ-VAE, books resized",
    "rqkmeans": "RQ-KMeans",
    "cqsid_without_category": "CQ-SID without category",
    "cqsid_without_query": "CQ-SID without query",
    "cqsid_aligned": "CQ-SID + EG-GRPO",
}
STAGE_NAMES = {"stage2": "stage 2 (query alone)", "stage3": "stage 3 (query and shopper)", "stage4": "stage 4 (EG-GRPO)"}
_ABSENT = "n/a"
_WIDTH = 118


def results_table(metrics: Mapping[str, Any]) -> str:
    """The main results of an evaluation's `metrics.json` as text of at most 120 columns."""
    counts = metrics["counts"]
    head = (
        f"{metrics['dataset']}: {counts['headline_requests']:,} of {counts['test_requests']:,} test requests, {counts['items']:,} items, "
        f"split {metrics['split'].replace('_', ' ')}, {metrics['query_kind']} queries"
    )
    parts = [head, _channels(metrics)]
    for table, about in (("semantic", "SID variants, query alone"), ("personalised", "SID variants, query and shopper")):
        block = _variants(metrics, table, about)
        if block:
            parts.append(block)
    gains = _gain_lines(metrics)
    if gains:
        parts.append("\n".join(["Paired gains (95 % interval)", *gains]))
    closing = [textwrap.fill(line, _WIDTH) for line in (served_line(metrics), meaning(metrics)) if line]
    return "\n\n".join([*parts, *closing])


def cuts_of(metrics: Mapping[str, Any]) -> tuple[int, int]:
    """The smallest and the largest k of recall@k."""
    return min(metrics["config"]["cuts"]), max(metrics["config"]["cuts"])


def channel_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """The columns of the channels' table."""
    small, large = cuts_of(metrics)
    return [f"recall@{small}", f"recall@{large}", f"hit@{small}", f"marginal@{large}"]


def variant_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """The columns of the variants' tables: every beam, and budgets of items up to a hundred."""
    budgets = [budget for budget in metrics["config"]["item_budgets"] if budget in (10, 100)] or metrics["config"]["item_budgets"][:2]
    return [*(f"clk@{n}" for n in metrics["config"]["beams"]), *(f"hit@items{budget}" for budget in budgets)]


def row_name(row: str) -> str:
    """A row's name as people read it."""
    return CHANNEL_NAMES.get(row) or _VARIANT_NAMES.get(row) or row


def rows_of(metrics: Mapping[str, Any], table: str) -> list[str]:
    """Rows of a table, as people expect them: channels in a fixed order, variants with the main one last."""
    rows = list(dict.fromkeys(record["row"] for record in metrics["records"] if record["table"] == table and not record["slice"]))
    if table == "channels":
        return [row for row in CHANNEL_NAMES if row in rows] + [row for row in rows if row not in CHANNEL_NAMES]
    return sorted(rows, key=lambda row: (row in (metrics["main"], aligned_row(metrics)), row == aligned_row(metrics)))


def aligned_row(metrics: Mapping[str, Any]) -> str:
    """The row of the main variant after reinforcement learning."""
    return f"{metrics['main']}_aligned"


def served_line(metrics: Mapping[str, Any]) -> str:
    """Which stage is served, and what the validation requests said of the others; "" where there was no choice."""
    measured = metrics.get("validation_recall") or {}
    if len(measured) < 2:
        return ""
    said = "; ".join(
        f"{STAGE_NAMES[row]} " + ", ".join(f"{name} {_share(value) if value is not None else _ABSENT}" for name, value in one.items())
        for row, one in measured.items()
    )
    return f"Served: {STAGE_NAMES[metrics['served']]}, by recall on the validation requests ({said}). {barred_line(metrics)}".strip()


def barred_line(metrics: Mapping[str, Any]) -> str:
    """Which guarded metrics kept the aligned stage from being served; "" where none did."""
    falls = [f"{metric} by {show_gain(gain)}" for metric, gain in (metrics.get("stage4_falls") or {}).items()]
    if not falls:
        return ""
    return f"Not served: {STAGE_NAMES['stage4']}, because on the validation requests it falls beyond noise against stage 3: {', '.join(falls)}."


def show(record: Record | None, *, interval: bool = False) -> str:
    """A share as `.123`, with its interval when asked; `n/a` where there is none."""
    if record is None or record["value"] is None:
        return _ABSENT
    text = _share(record["value"])
    return f"{text} ({_share(record['low'])}-{_share(record['high'])})" if interval and record["low"] is not None else text


def show_gain(record: Record | None) -> str:
    """A relative gain as `+3.1 % (+1.0 to +5.2)`."""
    if record is None or record["value"] is None:
        return _ABSENT
    bounds = "" if record["low"] is None else f" ({100 * record['low']:+.1f} to {100 * record['high']:+.1f})"
    return f"{100 * record['value']:+.1f} %{bounds}"


def meaning(metrics: Mapping[str, Any]) -> str:
    """One sentence: what the channel adds to the site's other channels."""
    at = cuts_of(metrics)[1]
    gain = find(metrics, "channels", "rrf_all", f"recall@{at}_gain_vs_rrf_bm25_dense")
    new = find(metrics, "channels", "generative", f"missed_found@{at}")
    found = (
        f" Of the targets that BM25, dense and their hybrid miss, it finds {100 * new['value']:.1f} %." if new is not None and new["value"] is not None else ""
    )
    if gain is None or gain["value"] is None or gain["low"] is None:
        return "What it means: the hybrid with our channel was not measured against the one without." + found
    if gain["low"] > 0:
        verdict = f"adding the generative channel to BM25 + dense raises recall@{at} by {show_gain(gain)}: ahead, the interval lies above zero."
    elif gain["high"] is not None and gain["high"] < 0:
        verdict = f"adding the generative channel to BM25 + dense lowers recall@{at}, by {show_gain(gain)}: behind, the interval lies below zero; give the channel less weight or train it longer."
    else:
        verdict = f"adding the generative channel to BM25 + dense changes recall@{at} by {show_gain(gain)}: no gain is proven, the interval holds zero."
    beside = find(metrics, "channels", "rrf_all_corrected", f"recall@{at}_gain_vs_rrf_bm25_corrected_dense")
    if beside is not None and beside["value"] is not None:
        found += f" Where BM25 reads queries with their spelling corrected too, the gain is {show_gain(beside)}."
    return "What it means: " + verdict + found


def gain_records(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, list[Record]]]:
    """The gains worth showing: (table, row, base, records)."""
    recalls, variants = channel_metrics(metrics)[:2], variant_metrics(metrics)
    channels = (("rrf_all", "rrf_bm25_dense"), ("rrf_all_corrected", "rrf_bm25_corrected_dense"), ("generative", "dense"), ("generative", "guidance"))
    wanted = [("channels", row, base, recalls) for row, base in channels]
    main = metrics["main"]
    for table in ("semantic", "personalised"):
        wanted.append((table, main, "rqvae", [*variants[:3], variants[-1]]))
    wanted.append(("personalised", aligned_row(metrics), main, [*variants[:2], "pvr@10"]))
    found = []
    for table, row, base, names in wanted:
        records = [find(metrics, table, row, f"{name}_gain_vs_{base}") for name in names]
        present = [record for record in records if record is not None and record["value"] is not None]
        if present:
            found.append((table, row, base, present))
    return found


def _channels(metrics: Mapping[str, Any]) -> str:
    names = channel_metrics(metrics)
    rows = [
        [row_name(row), *(show(find(metrics, "channels", row, name), interval=name.startswith("recall")) for name in names)]
        for row in rows_of(metrics, "channels")
    ]
    for row in rows:
        row[-1] = "" if row[-1] == _ABSENT and row[0] != CHANNEL_NAMES["generative"] else row[-1]
    return _aligned(["Recall channels", *names], rows)


def _variants(metrics: Mapping[str, Any], table: str, about: str) -> str:
    rows = []
    for row in rows_of(metrics, table):
        size = find(metrics, table, row, "items_per_sid") or find(metrics, table, metrics["main"], "items_per_sid")
        values = [show(find(metrics, table, row, name)) for name in variant_metrics(metrics)]
        rows.append([row_name(row), _ABSENT if size is None else f"{size['value']:.1f}", *values])
    return _aligned([about, "items/SID", *variant_metrics(metrics)], rows) if rows else ""


def _gain_lines(metrics: Mapping[str, Any]) -> list[str]:
    lines = []
    for table, row, base, records in gain_records(metrics):
        values = [f"{record['metric'].split('_gain')[0]} {show_gain(record)}" for record in records]
        where = "" if table == "channels" else f" ({table})"
        lines.append(f"  {row_name(row)} over {row_name(base)}{where}:")
        lines += ["      " + "   ".join(values[begin : begin + 3]) for begin in range(0, len(values), 3)]
    return lines


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])


def _share(value: float) -> str:
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0.") else text
