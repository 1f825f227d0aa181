"""The evaluation as one standalone HTML page: tables with intervals, plots inlined as images, no script and nothing fetched."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from genrecall.evaluation.records import find
from genrecall.evaluation.results_table import (
    STAGE_NAMES,
    aligned_row,
    channel_metrics,
    cuts_of,
    gain_records,
    meaning,
    row_name,
    rows_of,
    served_line,
    show,
    variant_metrics,
)
from genrecall.storage import Artifact

OURS, OTHERS, GREY = "#c2410c", "#475569", "#cbd5e1"
FEW = 10
"""Slices with fewer requests are shown in the table, marked, and left out of the picture."""
PALETTE = ("#475569", "#0f766e", "#7c3aed", "#a16207", "#0369a1", "#be185d", "#c2410c")
_HEALTH = (
    ("Reward", ("reward", "group_reward")),
    ("Samples by reward tier", ("tier_purchased", "tier_clicked", "tier_exposed", "tier_valid", "tier_invalid")),
    ("Valid SIDs and groups without spread", ("valid_rate", "valid_mass", "zero_spread", "gate_open")),
    ("Different SIDs per group", ("unique_sids",)),
    ("KL to the reference", ("kl",)),
    ("Entropy by level", ("entropy_1", "entropy_2", "entropy_3")),
    ("Clip fraction", ("clip_fraction",)),
    ("Experts: share and loss", ("expert_share", "expert_loss")),
    ("Hit rate, head and tail queries", ("hit_rate_head", "hit_rate_tail")),
    ("Rewards without a number, groups without a reward", ("unusable_rewards", "empty_groups")),
    ("Actors replaced, ranker calls failed, staleness", ("replaced_actors", "failed_ranker_calls", "staleness")),
    ("Stale experts left out", ("stale_experts",)),
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>genrecall evaluation: {{ dataset }}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1e293b; background: #f8fafc; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
header { border-bottom: 3px solid #c2410c; padding-bottom: 14px; margin-bottom: 22px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 34px 0 8px; } p { margin: 6px 0 10px; }
.about { color: #64748b; } .verdict { background: #fff7ed; border-left: 4px solid #c2410c; padding: 12px 16px; border-radius: 4px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; background: #fff; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 8px; font-size: 14px; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: #475569; background: #f1f5f9; }
td small { color: #94a3b8; display: block; font-size: 11px; line-height: 1.25; font-weight: 400; } td:first-child small { white-space: normal; } tr.ours td { background: #fff7ed; } tr.ours td:first-child { font-weight: 600; }
.numbers { columns: 3 300px; font-size: 13px; background: #fff; border: 1px solid #e2e8f0; border-radius: 6px; padding: 10px 14px; } .numbers div { display: flex; justify-content: space-between; gap: 10px; break-inside: avoid; border-bottom: 1px dotted #e2e8f0; } .numbers span { color: #64748b; }
.best { font-weight: 700; } .up { color: #15803d; } .down { color: #b91c1c; }
figure { margin: 12px 0; background: #fff; border: 1px solid #e2e8f0; border-radius: 6px; padding: 10px; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: #64748b; font-size: 13px; padding: 4px 4px 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 14px; } .grid figure { margin: 0; } .numbers + .grid { margin-top: 14px; }
ul { padding-left: 20px; margin: 6px 0; } code { font-size: 12.5px; color: #475569; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0; font-size: 13px; } dt { color: #64748b; } dd { margin: 0; overflow-wrap: anywhere; }
</style></head><body><main>
<header><h1>Evaluation: {{ dataset }}</h1><div class="about">{{ summary }}</div></header>
<p class="verdict">{{ meaning }}</p>
{% if served %}<p>{{ served }}</p>{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.about %}<p class="about">{{ section.about }}</p>{% endif %}
{% if section.rows %}<div class="wide"><table><thead><tr>{% for cell in section.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in section.rows %}<tr{% if row.ours %} class="ours"{% endif %}>{% for cell in row.cells %}<td{% if cell.kind %} class="{{ cell.kind }}"{% endif %}>{{ cell.text }}{% if cell.small %}<small>{{ cell.small }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if section.numbers %}<div class="numbers">{% for name, value in section.numbers %}<div><span>{{ name }}</span><b>{{ value }}</b></div>{% endfor %}</div>{% endif %}
{% if section.images %}<div class="{{ 'grid' if section.images | length > 1 else '' }}">{% for image in section.images %}<figure><img alt="{{ image.caption }}" src="data:image/png;base64,{{ image.data }}"><figcaption>{{ image.caption }}</figcaption></figure>{% endfor %}</div>{% endif %}
{% endfor %}
<h2>How to read this</h2><ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<h2>Versions</h2><dl>{% for name, part in parts %}<dt>{{ name }}</dt><dd><code>{{ part.hash }}</code></dd>{% endfor %}</dl>
</main></body></html>
"""


def write_report(
    path: Path, metrics: Mapping[str, Any], *, sid_index: Artifact | None = None, quantizer: Artifact | None = None, aligned: Artifact | None = None
) -> None:
    """Write the report of an evaluation's metrics to `path`.

    Args:
        sid_index, quantizer: of the main variant; their pictures and numbers make the SID section.
        aligned: its health makes the reinforcement-learning section.
    """
    sections = [_channel_section(metrics)]
    sections += [section for table in ("semantic", "personalised") if (section := _variant_section(metrics, table))]
    sections += [
        _gain_section(metrics),
        _curve_section(metrics),
        _slice_section(metrics),
        _judged_section(metrics),
        _ab_section(metrics),
        _cost_section(metrics),
    ]
    sections += [_sid_section(sid_index, quantizer), _health_section(aligned)]
    counts = metrics["counts"]
    weights = [
        f"Fusion weights of {name} for {budget} items: " + ", ".join(f"{channel} {weight:g}" for channel, weight in one.items()) + "."
        for name, by_budget in metrics["fusion_weights"].items()
        for budget, one in by_budget.items()
    ]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    html = page.render(
        dataset=metrics["dataset"],
        summary=f"{counts['headline_requests']:,} of {counts['test_requests']:,} test requests · {counts['items']:,} items · "
        f"split {metrics['split'].replace('_', ' ')} · {metrics['query_kind']} queries · served: {STAGE_NAMES[metrics['served']]}",
        meaning=meaning(metrics),
        served=served_line(metrics),
        sections=[section for section in sections if section["rows"] or section["images"] or section["numbers"]],
        notes=[*metrics["notes"], "Means are over requests with a target of the tier; n/a where the data set has none.", *weights],
        parts=list(metrics["parts"].items()),
    )
    path.write_text(html, encoding="utf-8")


def _section(
    title: str,
    about: str = "",
    header: Sequence[str] = (),
    rows: Sequence[dict[str, Any]] = (),
    images: Sequence[dict[str, str]] = (),
    numbers: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    return {"title": title, "about": about, "header": list(header), "rows": list(rows), "images": list(images), "numbers": list(numbers)}


def _row(cells: Sequence[Any], *, ours: bool = False) -> dict[str, Any]:
    return {"ours": ours, "cells": [cell if isinstance(cell, dict) else {"text": str(cell), "small": "", "kind": ""} for cell in cells]}


def _cell(record: Mapping[str, Any] | None, *, best: bool = False) -> dict[str, str]:
    small = ""
    if record is not None and record["low"] is not None and record["value"] is not None:
        small = f"{show({**record, 'value': record['low']})} to {show({**record, 'value': record['high']})}"
    return {"text": "" if record is None else show(dict(record)), "small": small, "kind": "best" if best else ""}


def _gain_cell(record: Mapping[str, Any] | None) -> dict[str, str]:
    if record is None or record["value"] is None:
        return {"text": "n/a", "small": "", "kind": ""}
    kind = "" if record["low"] is None else "up" if record["low"] > 0 else "down" if record["high"] < 0 else ""
    small = "" if record["low"] is None else f"{100 * record['low']:+.1f} to {100 * record['high']:+.1f}"
    return {"text": f"{100 * record['value']:+.1f} %", "small": small, "kind": kind}


def _table(metrics: Mapping[str, Any], table: str, names: Sequence[str], *, ours: Sequence[str]) -> list[dict[str, Any]]:
    rows = rows_of(metrics, table)
    found = {(row, name): find(metrics, table, row, name) for row in rows for name in names}
    values = {key: record["value"] for key, record in found.items() if record is not None and record["value"] is not None}
    top = {name: max((values[row, name] for row in rows if (row, name) in values), default=None) for name in names}
    cells = {row: [_cell(found[row, name], best=top[name] is not None and values.get((row, name)) == top[name]) for name in names] for row in rows}
    return [_row([row_name(row), *cells[row]], ours=row in ours) for row in rows]


def _channel_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    small, large = cuts_of(metrics)
    names = [*channel_metrics(metrics)[:-1], f"hit@{large}", f"marginal@{large}", f"missed_found@{large}"]
    about = f"Share of clicked targets among a channel's first {small} and {large} items. marginal: targets that neither BM25, dense nor their hybrid finds; missed_found: the part of what those miss."
    rows = rows_of(metrics, "channels")
    figure, axes = _figure(2, width=10.5, height=3.4)
    for axis, name in zip(axes, (f"recall@{small}", f"recall@{large}"), strict=True):
        _bars(axis, metrics, "channels", rows, name, highlight=("generative", "rrf_all"))
    return _section(
        "Recall by channel",
        about,
        ["channel", *names],
        _table(metrics, "channels", names, ours=("generative", "rrf_all")),
        [_image(figure, "Recall by channel with 95 % intervals")],
    )


def _variant_section(metrics: Mapping[str, Any], table: str) -> dict[str, Any] | None:
    rows = rows_of(metrics, table)
    if not rows:
        return None
    about = {
        "semantic": "Stage 2: the model reads the query alone.",
        "personalised": "Stage 3 and, after alignment, stage 4: the model reads the query and the shopper.",
    }[table]
    names = [*variant_metrics(metrics), "exp@10", "pvr@10", "buy@10"]
    body = _table(metrics, table, names, ours=(metrics["main"], aligned_row(metrics)))
    for row, content in zip(rows, body, strict=True):
        size = find(metrics, table, row, "items_per_sid") or find(metrics, table, metrics["main"], "items_per_sid")
        content["cells"].insert(1, {"text": "n/a" if size is None else f"{size['value']:.1f}", "small": "", "kind": ""})
    title = f"SID variants, {table}"
    return _section(title, about + " Beam metrics grow with cluster size, so budgets of items stand beside them.", ["variant", "items/SID", *names], body)


def _gain_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for table, row, base, records in gain_records(metrics):
        for record in records:
            rows.append(_row([f"{row_name(row)} over {row_name(base)}", table, record["metric"].split("_gain")[0], _gain_cell(record), record["n"]]))
    about = "Relative, paired over requests. Green: the whole interval lies above zero; red: below."
    return _section("Gains", about, ["comparison", "table", "metric", "gain", "requests"], rows)


def _curve_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    table = "semantic" if rows_of(metrics, "semantic") else "personalised"
    cut = metrics["config"]["cut_items"]
    curves = (
        ("clk@", metrics["config"]["beams"], "clicked targets found", "SIDs (beam)"),
        ("hit@items", metrics["config"]["item_budgets"], "clicked targets found", "items served"),
    )
    figure, axes = _figure(3, width=10.5, height=3.5)
    for axis, (prefix, points, label, below) in zip(axes[:2], curves, strict=True):
        _curve(axis, metrics, table, prefix, points, label, below)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    _curve(axes[2], metrics, table, f"cut{cut}@beam", metrics["config"]["cut_beams"], f"found after the cut to {cut:,} items", "SIDs (beam)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return _section(
        "Hit rate against beam and budget",
        "",
        images=[_image(figure, f"{table.capitalize()} models; bands are 95 % intervals. Right: expansions cut to the {cut:,} best items by prior score")],
    )


def _slice_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    at = cuts_of(metrics)[1]
    rows, drawn = [], []
    for name, about in [("", "headline requests"), *metrics["slices"].items()]:
        values = [find(metrics, "channels", row, f"recall@{at}", name) for row in ("bm25", "dense", "generative", "rrf_bm25_dense", "rrf_all")]
        if not any(values):
            continue
        extra = [_cell(find(metrics, "channels", "generative", metric, name)) for metric in (f"marginal@{at}", f"missed_found@{at}")]
        gain = _gain_cell(find(metrics, "channels", "rrf_all", f"recall@{at}_gain_vs_rrf_bm25_dense", name))
        first = next(value for value in values if value)
        rows.append(
            _row(
                [
                    {"text": (name or "all").replace("_", " "), "small": about if first["n"] >= FEW else f"{about}; too few to tell", "kind": ""},
                    first["n"],
                    *map(_cell, values),
                    *extra,
                    gain,
                ]
            )
        )
        if first["n"] >= FEW:
            drawn.append((name or "all", values))
    if len(rows) < 2 or not drawn:
        return _section("Slices")
    figure, axes = _figure(1, width=10.5, height=3.4)
    width = 0.26
    for number, (column, label, colour) in enumerate(((0, "BM25", OTHERS), (1, "dense", "#94a3b8"), (2, "generative", OURS))):
        chosen = [one[column] for _, one in drawn]
        heights = [np.nan if record is None or record["value"] is None else float(record["value"]) for record in chosen]
        axes[0].bar(np.arange(len(drawn)) + (number - 1) * width, heights, width, color=colour, label=label)
    axes[0].set_xticks(np.arange(len(drawn)), [name.replace("_", "\n") for name, _ in drawn], fontsize=8.5)
    axes[0].set_ylabel(f"recall@{at}")
    axes[0].legend(frameon=False, ncols=3, fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1))
    header = ["slice", "requests", "BM25", "dense", "generative", "RRF without", "RRF with", "marginal", "of missed", "gain of RRF"]
    return _section(f"Slices: recall@{at}", "", header, rows, [_image(figure, f"Recall@{at} by slice")])


def _judged_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    at = cuts_of(metrics)[0]
    names = [f"{name}@{at}" for name in ("judged", "junk", "ndcg", "condensed_ndcg", "condensed_recall")]
    if find(metrics, "channels", "generative", f"junk@{at}") is None:
        return _section("Judgements")
    about = (
        f"judged: share of the first {at} answers that a human judged; junk: share of those below grade 2.0; condensed: the ranking without unjudged answers."
    )
    return _section("Judgements", about, ["channel", *names], _table(metrics, "channels", names, ours=("generative", "rrf_all")))


def _ab_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for name, label in (("gmv", "GMV per shopper"), ("uctcvr", "UCTCVR"), ("purchases", "purchases per shopper"), ("clicks", "clicks per shopper")):
        control, ours = find(metrics, "ab", "control", name), find(metrics, "ab", "with_channel", name)
        if control and ours:
            rows.append(
                _row([label, f"{control['value']:.3f}", f"{ours['value']:.3f}", _gain_cell(find(metrics, "ab", "with_channel", f"{name}_gain_vs_control"))])
            )
    shares = [
        (action, find(metrics, "ab", "with_channel", f"{action}_share"), find(metrics, "ab", "with_channel", f"{action}_only_share"))
        for action in ("exposure", "click", "purchase")
    ]
    about = "; ".join(
        f"{action}s: {100 * one['value']:.0f} % proposed by our channel, {100 * only['value']:.0f} % by it alone"
        for action, one, only in shares
        if one and only
    )
    return _section(
        "Simulated A/B test",
        "The site's channels with and without ours behind the same ranker. " + about + ".",
        ["outcome", "without", "with", "difference"],
        rows,
    )


def _cost_section(metrics: Mapping[str, Any]) -> dict[str, Any]:
    records = [(row, find(metrics, "cost", row, "seconds_per_1000_queries")) for row in rows_of(metrics, "cost")]
    rows = [_row([row_name(row), f"{record['value']:.1f}"]) for row, record in records if record]
    return _section("Cost", "Seconds per 1,000 queries in batches on the machine that evaluated, query encoding included.", ["channel", "seconds"], rows)


def _sid_section(sid_index: Artifact | None, quantizer: Artifact | None) -> dict[str, Any]:
    images, numbers = [], []
    for artifact in [one for one in (quantizer, sid_index) if one is not None]:
        for file in sorted(artifact.path.glob("*.png")):
            caption = f"{artifact.kind}: {file.stem}".replace("_", " ")
            images.append({"caption": caption, "data": base64.b64encode(file.read_bytes()).decode()})
    for source, name in ((sid_index, "stats.json"), (quantizer, "diagnostics.json")):
        if source and (source.path / name).is_file():
            numbers += _flat(source.json(name))
    return _section(
        "SID health", "Cluster sizes count items; usage, perplexity and purity are those of the quantiser, by level.", images=images, numbers=numbers
    )


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested JSON as (dotted name, text)."""
    if isinstance(tree, Mapping):
        return [pair for key, value in tree.items() for pair in _flat(value, f"{prefix}{key}." if isinstance(value, (Mapping, list)) else f"{prefix}{key}")]
    if isinstance(tree, list) and any(isinstance(value, (Mapping, list)) for value in tree):
        return [pair for number, value in enumerate(tree) for pair in _flat(value, f"{prefix}{number + 1}.")]
    text = (
        ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in tree)
        if isinstance(tree, list)
        else f"{tree:.4g}"
        if isinstance(tree, float)
        else str(tree)
    )
    return [(prefix.rstrip(".").replace("_", " "), text)]


def _health_section(aligned: Artifact | None) -> dict[str, Any]:
    if aligned is None or not (aligned.path / "health.parquet").is_file():
        return _section("Alignment")
    health = pq.read_table(aligned.path / "health.parquet").to_pydict()
    facts = json.loads((aligned.path / "training.json").read_text()) if (aligned.path / "training.json").is_file() else {}
    limits = facts.get("stop_limits", {})
    panels = [(title, [name for name in names if name in health]) for title, names in _HEALTH]
    panels = [(title, names) for title, names in panels if names]
    steps = health.get("step", list(range(len(next(iter(health.values()), [])))))
    figure = Figure(figsize=(10.5, 2.5 * ((len(panels) + 2) // 3)), layout="constrained")
    for number, (title, names) in enumerate(panels):
        axis = figure.add_subplot((len(panels) + 2) // 3, 3, number + 1)
        for name, colour in zip(names, (OURS, OTHERS, "#0f766e", "#7c3aed", "#a16207"), strict=False):
            axis.plot(steps, health[name], color=colour, label=name.replace("_", " "), linewidth=1.4)
            if name in limits:
                axis.axhline(limits[name]["limit"], color=colour, linewidth=1.0, linestyle=":")
        if facts.get("stopped"):
            axis.axvline(facts["kept_step"], color=GREY, linewidth=1.0, zorder=0)
        _style(axis)
        axis.set_title(title, fontsize=9.5, loc="left")
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
    return _section("Alignment (EG-GRPO)", _health_words(facts), images=[_image(figure, "Health of the reinforcement-learning run by step")])


def _health_words(facts: Mapping[str, Any]) -> str:
    words = f"Stopped early: {facts['stopped']}. The weights after {facts['kept_step']} steps were kept (grey line). " if facts.get("stopped") else ""
    return words + ("Dotted: the bound of a stop rule." if facts.get("stop_limits") else "")


def _figure(panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axis in axes:
        _style(axis)
    return figure, axes


def _style(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.tick_params(labelsize=8.5, color=GREY)
    axis.grid(axis="y", color="#e2e8f0", linewidth=0.7)
    axis.set_axisbelow(True)


def _bars(axis: Axes, metrics: Mapping[str, Any], table: str, rows: Sequence[str], metric: str, *, highlight: Sequence[str]) -> None:
    shown = [(row, record) for row in reversed(rows) if (record := find(metrics, table, row, metric)) and record["value"] is not None]
    values = np.array([record["value"] for _, record in shown])
    low, high = (np.array([record[bound] if record[bound] is not None else record["value"] for _, record in shown]) for bound in ("low", "high"))
    axis.barh(
        range(len(shown)),
        values,
        xerr=np.maximum([values - low, high - values], 0),
        color=[OURS if row in highlight else OTHERS for row, _ in shown],
        height=0.62,
        ecolor="#0f172a",
        capsize=2.5,
        error_kw={"elinewidth": 1},
    )
    for place, (value, bound) in enumerate(zip(values, high, strict=True)):
        axis.text(bound + 0.012 * max(high.max(initial=0.0), 1e-9), place, f"{value:.3f}", va="center", fontsize=8.5)
    axis.set_yticks(range(len(shown)), [row_name(row) for row, _ in shown])
    axis.set_xlim(0, 1.14 * max(high.max(initial=0.0), 1e-9))
    axis.set_title(metric, fontsize=10, loc="left")
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color="#e2e8f0", linewidth=0.7)


def _curve(axis: Axes, metrics: Mapping[str, Any], table: str, prefix: str, points: Sequence[int], label: str, below: str) -> None:
    for number, row in enumerate(rows_of(metrics, table)):
        colour = OURS if row == metrics["main"] else PALETTE[number % (len(PALETTE) - 1)]
        shown = [(point, record) for point in points if (record := find(metrics, table, row, f"{prefix}{point}")) and record["value"] is not None]
        if not shown:
            continue
        at = [point for point, _ in shown]
        axis.plot(at, [record["value"] for _, record in shown], marker="o", markersize=3.5, color=colour, label=row_name(row), linewidth=1.6)
        if all(record["low"] is not None for _, record in shown):
            axis.fill_between(at, [record["low"] for _, record in shown], [record["high"] for _, record in shown], color=colour, alpha=0.12, linewidth=0)
    axis.set_xlabel(below, fontsize=9)
    axis.set_title(label, fontsize=9.5, loc="left")
    axis.set_ylim(bottom=0)


def _image(figure: Figure, caption: str) -> dict[str, str]:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9}):
        figure.savefig(buffer, format="png", dpi=130)
    return {"caption": caption, "data": base64.b64encode(buffer.getvalue()).decode()}
