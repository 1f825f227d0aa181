"""Answers batches of recall requests from one bundle; plain Python, no Ray and no HTTP.

A batch is answered wholly by the bundle that was current when it began, so no answer mixes versions.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from genrecall.registry.bundle import Bundle
from genrecall.registry.versions import Version
from genrecall.serving.messages import ModelInfo, RecalledItem, RecalledSid, RecallRequest, RecallResponse, Timings, Versions


@dataclass(frozen=True)
class ServedBundle:
    """A loaded bundle and the registered version it is."""

    version: Version
    bundle: Bundle

    @property
    def versions(self) -> Versions:
        return Versions(model=self.version.text, bundle=self.bundle.hash[:16])

    def info(self, address: str, refused: str | None) -> ModelInfo:
        """What `GET /v1/model` says."""
        table = self.bundle.retriever.table
        return ModelInfo(
            versions=self.versions,
            address=address,
            items=len(self.bundle.items),
            sids=len(table),
            levels=list(table.space.alphabet_sizes),
            stage=str(self.bundle.about["stage"]),
            refused=refused,
        )


def beam_size_by_load(waiting: int, beam_sizes: Sequence[int]) -> int:
    """The beam for a batch: the widest for up to 2 requests, the middle one up to 8, the narrowest beyond.

    Args:
        waiting: requests in the batch.
        beam_sizes: three sizes, widest first (the paper serves with 100, 50 and 20).
    """
    widest, middle, narrowest = beam_sizes
    return widest if waiting <= 2 else middle if waiting <= 8 else narrowest


def answer_batch(served: ServedBundle, requests: Sequence[RecallRequest], beam_sizes: Sequence[int]) -> list[RecallResponse]:
    """Answers to a batch, in order; requests of equal beam size are decoded together."""
    answers: list[RecallResponse | None] = [None] * len(requests)
    by_beam: dict[int, list[int]] = defaultdict(list)
    default = beam_size_by_load(len(requests), beam_sizes)
    for place, request in enumerate(requests):
        by_beam[request.beam_size or default].append(place)
    for beam_size, places in by_beam.items():
        for place, answer in zip(places, _answer_equal(served, [requests[place] for place in places], beam_size), strict=True):
            answers[place] = answer
    return [answer for answer in answers if answer is not None]


def _answer_equal(served: ServedBundle, requests: list[RecallRequest], beam_size: int) -> list[RecallResponse]:
    bundle = served.bundle
    retriever = bundle.retriever
    started = time.perf_counter()
    found = retriever.generate(
        [request.query for request in requests],
        [request.shopper.gender for request in requests],
        [request.shopper.age_band for request in requests],
        [bundle.rows_of(request.history) for request in requests],
        beam_size=beam_size,
    )
    generated = time.perf_counter()
    results = [retriever.expand(*found.of(row), request.limit) for row, request in enumerate(requests)]
    expanded = time.perf_counter()
    timings = Timings(generate_ms=(generated - started) * 1e3, expand_ms=(expanded - generated) * 1e3, batch_size=len(requests))
    answers = []
    for rows, row_scores, result in zip(found.sid_rows, found.scores, results, strict=True):
        rows = rows[rows >= 0]
        text_of = dict(zip(rows.tolist(), retriever.table.space.texts_of(retriever.table.tokens[rows]), strict=True))
        shown = zip(bundle.shown(result.item_rows), result.sid_rows.tolist(), result.scores.tolist(), strict=True)
        items = [
            RecalledItem(
                item_id=item["item_id"],
                title=item["title"],
                brand=item["brand"],
                category_path=item["category_path"],
                rank=rank,
                sid=text_of[sid],
                score=score,
            )
            for rank, (item, sid, score) in enumerate(shown)
        ]
        generated_sids = zip(rows.tolist(), row_scores.tolist(), retriever.index.sizes(rows).tolist(), strict=False)
        sids = [RecalledSid(sid=text_of[row], score=score, size=size) for row, score, size in generated_sids]
        answers.append(RecallResponse(items=items, sids=sids, beam_size=beam_size, versions=served.versions, timings=timings))
    return answers
