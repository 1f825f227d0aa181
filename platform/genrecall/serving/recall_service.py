"""Answers batches of recall requests from one bundle; plain Python, no Ray and no HTTP.

A batch is answered wholly by the bundle that was current when it began, so no answer mixes versions.

A deadline counts from the request's arrival. When the batch starts and less than half of it is left, the request gets the narrowest beam; when nothing
is left, no answer: whoever asked is gone. A bundle without posting lists cannot search within filters: it searches everything and takes out
what fails. Both are marked `degraded`, as is a beam narrowed by load and a history of which nothing can be used.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genrecall.generator.retriever import RecallResult
from genrecall.registry.bundle import Bundle
from genrecall.registry.versions import Version
from genrecall.serving.messages import (
    Filters,
    ItemExplanation,
    ModelInfo,
    Prefix,
    Reason,
    RecalledItem,
    RecalledSid,
    RecallRequest,
    RecallResponse,
    Role,
    Timings,
    Versions,
)
from genrecall.sid.filters import Filter

_ALL = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class ServedBundle:
    """A loaded bundle and the registered version it is."""

    version: Version
    bundle: Bundle
    role: Role = "champion"

    @property
    def versions(self) -> Versions:
        return Versions(model=self.version.text, bundle=self.bundle.hash[:16], catalog_seq=self.bundle.catalog_seq, role=self.role)

    def info(self, address: str, refused: str | None) -> ModelInfo:
        """What `GET /v1/model` says."""
        table = self.bundle.retriever.table
        return ModelInfo(
            versions=self.versions,
            address=address,
            items=self.bundle.num_listed,
            sids=len(table),
            levels=list(table.space.alphabet_sizes),
            stage=str(self.bundle.about["stage"]),
            refused=refused,
            genders=sorted(self.bundle.retriever.prompt_builder.tokenizer.genders),
            age_bands=sorted(self.bundle.retriever.prompt_builder.tokenizer.age_bands),
        )


@dataclass(frozen=True)
class Waiting:
    """A request in the queue; `arrived` is when it came, in seconds of `time.monotonic`."""

    request: RecallRequest
    arrived: float

    def left(self, now: float) -> float:
        """The share of its deadline that is left, 1 where it has none; 0 or less: it has passed."""
        deadline_ms = self.request.deadline_ms
        return 1.0 if deadline_ms is None else 1.0 - (now - self.arrived) * 1e3 / deadline_ms


def beam_size_by_load(waiting: int, beam_sizes: Sequence[int]) -> int:
    """The beam for a batch: the widest for up to 2 requests, the middle one up to 8, the narrowest beyond.

    Args:
        waiting: requests in the batch.
        beam_sizes: three sizes, widest first (the paper serves with 100, 50 and 20).
    """
    widest, middle, narrowest = beam_sizes
    return widest if waiting <= 2 else middle if waiting <= 8 else narrowest


def answer_batch(served: ServedBundle, requests: Sequence[RecallRequest], beam_sizes: Sequence[int]) -> list[RecallResponse]:
    """Answers to a batch of requests that arrive now, in order."""
    now = time.monotonic()
    return [answer for answer in answer_waiting(served, [Waiting(request, now) for request in requests], beam_sizes, now) if answer is not None]


def answer_waiting(
    served: ServedBundle, waiting: Sequence[Waiting], beam_sizes: Sequence[int], now: float | None = None, *, load: int | None = None
) -> list[RecallResponse | None]:
    """Answers to a batch, in order; requests of equal beam size are decoded together.

    Args:
        beam_sizes: three sizes, widest first.
        now: when the batch starts, in seconds of `time.monotonic`; default: now.
        load: requests that wait as the batch starts, itself included; default: those of the batch whose deadlines have not passed.

    Returns:
        None in place of an answer whose deadline has passed.
    """
    now = time.monotonic() if now is None else now
    answers: list[RecallResponse | None] = [None] * len(waiting)
    live = [place for place, one in enumerate(waiting) if one.left(now) > 0]
    by_beam: dict[int, list[tuple[int, list[Reason]]]] = defaultdict(list)
    for place in live:
        beam_size, reasons = _beam_of(waiting[place], now, load or len(live), beam_sizes)
        by_beam[beam_size].append((place, reasons))
    for beam_size, group in by_beam.items():
        requests = [waiting[place].request for place, _ in group]
        for (place, _), answer in zip(group, _answer_equal(served, requests, beam_size, [reasons for _, reasons in group]), strict=True):
            answers[place] = answer
    return answers


def _beam_of(one: Waiting, now: float, load: int, beam_sizes: Sequence[int]) -> tuple[int, list[Reason]]:
    """The beam of a request where `load` wait, and why it is narrower than asked for."""
    reasons: list[Reason] = []
    beam_size = one.request.beam_size or beam_size_by_load(load, beam_sizes)
    if one.request.beam_size is None and beam_size < beam_sizes[0]:
        reasons.append("load")
    if one.left(now) < 0.5 and beam_size > beam_sizes[-1]:
        beam_size = beam_sizes[-1]
        reasons.append("deadline")
    return beam_size, reasons


def _answer_equal(served: ServedBundle, requests: list[RecallRequest], beam_size: int, reasons: list[list[Reason]]) -> list[RecallResponse]:
    bundle = served.bundle
    retriever = bundle.retriever
    started = time.perf_counter()
    filters = [filter_of(bundle, request.filters) for request in requests]
    searched = filters if retriever.filters is not None else [None] * len(requests)
    histories = [bundle.rows_of(request.history) for request in requests]
    found = retriever.generate(
        [request.query for request in requests],
        [request.shopper.gender for request in requests],
        [request.shopper.age_band for request in requests],
        histories,
        beam_size=beam_size,
        filters=searched,
    )
    generated = time.perf_counter()
    results = []
    for row, (request, wanted, search) in enumerate(zip(requests, filters, searched, strict=True)):
        afterwards = wanted is not None and search is None
        result = retriever.expand(*found.of(row), _ALL if afterwards else request.limit, search)
        results.append(_passing(bundle, result, request) if afterwards else result)
        if afterwards:
            reasons[row].append("filters")
        if request.history and not (len(histories[row]) and retriever.personalised):
            reasons[row].append("history")
    expanded = time.perf_counter()
    timings = Timings(generate_ms=(generated - started) * 1e3, expand_ms=(expanded - generated) * 1e3, batch_size=len(requests))
    answers = []
    for request, rows, row_scores, result, why in zip(requests, found.sid_rows, found.scores, results, reasons, strict=True):
        rows, row_scores = rows[rows >= 0], row_scores[rows >= 0]
        text_of = dict(zip(rows.tolist(), retriever.table.space.texts_of(retriever.table.tokens[rows]), strict=True))
        score_of = dict(zip(rows.tolist(), row_scores.tolist(), strict=True))
        items = [
            RecalledItem(
                item_id=item["item_id"],
                title=item["title"],
                brand=item["brand"],
                category_path=item["category_path"],
                rank=rank,
                sid=text_of[sid],
                score=score,
                explanation=_explained(text_of[sid], score_of[sid], score) if request.explain else None,
            )
            for rank, (item, sid, score) in enumerate(zip(bundle.shown(result.item_rows), result.sid_rows.tolist(), result.scores.tolist(), strict=True))
        ]
        sids = [
            _sid(bundle, row, text_of[row], score, size, label, explain=request.explain)
            for row, score, size, label in zip(
                rows.tolist(), row_scores.tolist(), retriever.index.sizes(rows).tolist(), bundle.labels.made_before(rows), strict=True
            )
        ]
        read = retriever.prompt_builder.read_as(request.query) if request.explain else request.query
        answers.append(
            RecallResponse(
                items=items,
                sids=sids,
                beam_size=beam_size,
                versions=served.versions,
                timings=timings,
                degraded=bool(why),
                degraded_by=why,
                read_as=read if read != request.query else None,
            )
        )
    return answers


def _explained(sid: str, sid_score: float, score: float) -> ItemExplanation:
    codes = sid[1:-1].split(",")
    return ItemExplanation(sid_score=sid_score, share=score - sid_score, path=[f"<{','.join(codes[: level + 1])}>" for level in range(len(codes))])


def _sid(bundle: Bundle, row: int, text: str, score: float, size: int, label: str | None, *, explain: bool) -> RecalledSid:
    if not explain:
        return RecalledSid(sid=text, score=score, size=size, label=label)
    path = [Prefix(prefix=step.prefix, label=step.label, size=step.size) for step in bundle.labels.path(row)]
    return RecalledSid(sid=text, score=score, size=size, label=path[-1].label, path=path)


def filter_of(bundle: Bundle, asked: Filters | None) -> Filter | None:
    """The filter of a request, with item rows for ids; None where it asks nothing."""
    if asked is None:
        return None
    categories = tuple(tuple(path) for path in asked.categories)
    excluded = tuple(bundle.rows_of(asked.excluded).tolist())
    return Filter(categories=categories, brands=tuple(asked.brands), in_stock=asked.in_stock, excluded=excluded) or None


def _passing(bundle: Bundle, result: RecallResult, request: RecallRequest) -> RecallResult:
    """The items of an unfiltered answer that pass, by what the bundle shows of them."""
    asked = request.filters
    assert asked is not None
    excluded = set(asked.excluded)
    kept = [
        place
        for place, item in enumerate(bundle.shown(result.item_rows))
        if item["item_id"] not in excluded
        and (not asked.in_stock or bundle.in_stock(item["item_id"]))
        and (not asked.brands or item["brand"] in asked.brands)
        and (not asked.categories or any(item["category_path"][: len(path)] == path for path in asked.categories))
    ][: request.limit]
    return RecallResult(result.item_rows[kept], result.sid_rows[kept], result.scores[kept])
