"""Settings of the evaluation: what is measured, and on how many requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and on how many requests.

    Attributes:
        main: the variant that becomes the `generative` channel.
        beams: N of clk@N and its like; the widest is the channel's beam.
        item_budgets: M of hit@items M.
        cuts: k of recall@k.
        cut_items, cut_beams: the cut-to-M curve.
        channels: beside `generative`; hybrids are built from those present.
        max_requests: test requests measured; None for all. max_validation_requests: for tuning the fusion weights.
        depth: items that each channel hands over, to hybrids too.
        dense_index: "hnsw" for catalogues beyond a few hundred thousand items.
        ab_requests: requests of the simulated A/B test (marketplace only), drawn from the measured ones; 0 leaves it out.
        ab_ranker: what orders the pages of both arms: the marketplace's own ranker, or the `ranker` artifact.
    """

    seed: int = 0
    main: str = "cqsid"
    beams: tuple[int, ...] = (1, 10, 100)
    item_budgets: tuple[int, ...] = (10, 50, 100, 1000)
    cuts: tuple[int, ...] = (10, 100)
    cut_items: int = 1000
    cut_beams: tuple[int, ...] = (10, 20, 40, 60, 80, 100)
    channels: tuple[Literal["bm25", "dense", "popularity"], ...] = ("bm25", "dense", "popularity")
    depth: int = 100
    max_requests: int | None = 1000
    max_validation_requests: int = 1000
    bootstrap_samples: int = 1000
    dense_index: Literal["flat", "hnsw"] = "flat"
    bm25_k1: float = 1.2
    bm25_b: float = 0.5
    ab_requests: int = 1000
    ab_ranker: Literal["production", "learned"] = "production"

    def problems(self) -> list[str]:
        found = [
            f"{name}: expected at least one value, all at least 1, got {values}"
            for name in ("beams", "item_budgets", "cuts", "cut_beams")
            if not (values := getattr(self, name)) or min(values) < 1
        ]
        least = {"cut_items": 1, "depth": 1, "max_validation_requests": 1, "bootstrap_samples": 1, "ab_requests": 0}
        found += [f"{name}: expected at least {low}, got {getattr(self, name)}" for name, low in least.items() if getattr(self, name) < low]
        if self.max_requests is not None and self.max_requests < 1:
            found.append(f"max_requests: expected at least 1 or none, got {self.max_requests}")
        if not found and max(self.cuts) > self.depth:
            found.append(f"depth={self.depth}: channels hand over fewer items than the largest of cuts={self.cuts}")
        if not found and max(self.cut_beams) > max(self.beams):
            found.append(f"cut_beams={self.cut_beams}: the widest search is max(beams)={max(self.beams)}")
        return found
