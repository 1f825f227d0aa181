"""The report's alignment section: which curves it draws, with the bounds of the stop rules and what was kept."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrecall.evaluation import report
from genrecall.storage import Artifact

ROWS = [
    {"step": float(step), "reward": 0.3 + step / 10, "kl": 0.1 * step, "unique_sids": 6.0, "tier_clicked": 0.2, "failed_ranker_calls": 0.0} for step in range(3)
]
LIMITS = {"kl": {"limit": 0.15, "at": "most"}, "reward": {"limit": 0.12, "at": "least"}}


@pytest.fixture
def drawn(monkeypatch, tmp_path: Path):
    """`drawn(facts)` is the section of a run and its panels by title."""

    def section(facts):
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "health.parquet")
        (tmp_path / "training.json").write_text(json.dumps(facts))
        figures = []
        monkeypatch.setattr(report, "_image", lambda figure, caption: figures.append(figure) or {"caption": caption, "data": ""})
        made = report._health_section(Artifact(str(tmp_path), tmp_path, {}))
        return made, {axis.get_title(loc="left"): axis for axis in figures[0].axes}

    return section


def test_curves_are_drawn_with_the_bounds_of_their_stop_rules(drawn) -> None:
    made, panels = drawn({"stopped": None, "kept_step": 3, "stop_limits": LIMITS})
    assert list(panels) == [
        "Reward",
        "Samples by reward tier",
        "Different SIDs per group",
        "KL to the reference",
        "Actors replaced, ranker calls failed, staleness",
    ]
    curve, bound = panels["KL to the reference"].lines
    assert list(curve.get_ydata()) == pytest.approx([0.0, 0.1, 0.2])
    assert set(bound.get_ydata()) == {0.15}
    assert bound.get_linestyle() == ":"
    assert len(panels["Different SIDs per group"].lines) == 1
    assert made["about"] == "Dotted: the bound of a stop rule."


def test_a_run_that_stopped_says_why_and_marks_what_it_kept(drawn) -> None:
    made, panels = drawn({"stopped": "near_reference: kl was 0.2", "kept_step": 1, "stop_limits": LIMITS})
    assert made["about"].startswith("Stopped early: near_reference: kl was 0.2. The weights after 1 steps were kept")
    assert list(panels["Different SIDs per group"].lines[-1].get_xdata()) == [1, 1]


def test_an_older_artifact_without_bounds_is_drawn_too(drawn) -> None:
    made, panels = drawn({"stopped": None})
    assert made["about"] == ""
    assert len(panels["KL to the reference"].lines) == 1


def test_a_line_without_alignment_has_no_such_section(tmp_path: Path) -> None:
    assert not report._health_section(None)["images"]
    assert not report._health_section(Artifact(str(tmp_path), tmp_path, {}))["images"]
