"""Batches answered from a real bundle, in process."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import math

import httpx
import pytest

from genrecall.generator.spelling import SpellingCorrector
from genrecall.registry.bundle import load_bundle
from genrecall.registry.versions import Version
from genrecall.serving.api import create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import Filters, RecallRequest, Shopper
from genrecall.serving.recall_service import ServedBundle, Waiting, answer_batch, answer_waiting, beam_size_by_load


@pytest.fixture(scope="module")
def served(untrained_line):
    return ServedBundle(Version("shop", 1, "0" * 64), load_bundle(untrained_line().path))


def request(query="angle bracket", **fields):
    return RecallRequest(query=query, **{"limit": 10, **fields})


def test_an_answer_lists_items_by_rank_with_the_sid_they_came_from(served):
    (answer,) = answer_batch(served, [request(beam_size=5)], (4, 3, 2))
    assert [item.rank for item in answer.items] == list(range(10))
    scores = {sid.sid: sid.score for sid in answer.sids}
    assert len(scores) == 5
    assert all(item.score < scores[item.sid] + 1e-6 for item in answer.items)  # an item's own probability is a share of its SID's
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    table, index = served.bundle.retriever.table, served.bundle.retriever.index
    for sid in answer.sids:
        assert sid.size == len(index.items(int(next(row for row in range(len(table)) if table.text(row) == sid.sid))))
    first = answer.items[0]
    assert first.title == served.bundle.shown(served.bundle.rows_of([first.item_id]))[0]["title"]
    assert answer.versions.model == "shop/1"
    assert answer.beam_size == 5


def test_a_batch_answers_each_request_as_alone_and_in_order(served):
    requests = [
        request(),
        request("hose", beam_size=3, limit=2),
        request("", shopper=Shopper(gender="f", age_band="unseen"), history=["i00", "nobody", "i09"]),
        request("x" * 1000, beam_size=3),
        request("日本 \x00 \U0001f600", beam_size=200, limit=1000),
    ]
    together = answer_batch(served, requests, (4, 4, 4))
    for one, answer in zip(requests, together, strict=True):
        (alone,) = answer_batch(served, [one], (4, 4, 4))
        assert [item.item_id for item in answer.items] == [item.item_id for item in alone.items]
        assert [sid.score for sid in answer.sids] == pytest.approx([sid.score for sid in alone.sids], abs=1e-4)
    assert len(together[1].items) == 2
    # A beam beyond the number of SIDs gives them all, and all items.
    assert len(together[4].sids) == len(served.bundle.retriever.table)
    assert len(together[4].items) == 40


def test_filtered_answers_hold_what_passes_and_equal_the_whole_answer_less_the_rest(served):
    def ids(filters=None, **fields):
        (answer,) = answer_batch(served, [request(beam_size=200, limit=1000, filters=filters and Filters(**filters), **fields)], (4, 4, 4))
        return [item.item_id for item in answer.items], {item.item_id: item for item in answer.items}

    whole, items = ids()
    assert len(whole) == 40
    for filters, passes in (
        ({"categories": [["Home", "garden hose"], ["Home", "deck screw"]]}, lambda item: item.category_path[1] in ("garden hose", "deck screw")),
        ({"categories": [["Home"]], "brands": ["Acme", "Nobody"], "in_stock": True}, lambda item: True),
        ({"brands": ["acme"]}, lambda item: False),
        ({"categories": [["Attic"]]}, lambda item: False),
        ({"excluded": ["i03", "nobody", "i00", "\x00"]}, lambda item: item.item_id not in ("i00", "i03")),
        ({"categories": [["Home", "garden hose"]], "excluded": ["i08", "i00"]}, lambda item: item.category_path[1] == "garden hose" and item.item_id != "i08"),
        ({}, lambda item: True),
    ):
        assert ids(filters)[0] == [one for one in whole if passes(items[one])]


def test_a_batch_of_filtered_and_other_requests_answers_each_as_alone(served):
    filters = [Filters(categories=[["Home", "deck screw"]]), None, Filters(), Filters(excluded=["i00"]), Filters(brands=["Nobody"])]
    requests = [request(query, filters=one, beam_size=3) for query in ("angle bracket", "hose") for one in filters]
    together = answer_batch(served, requests, (4, 4, 4))
    for one, answer in zip(requests, together, strict=True):
        (alone,) = answer_batch(served, [one], (4, 4, 4))
        assert [item.item_id for item in answer.items] == [item.item_id for item in alone.items]
        assert [sid.score for sid in answer.sids] == pytest.approx([sid.score for sid in alone.sids], abs=1e-4)
    assert {item.category_path[1] for item in together[0].items} == {"deck screw"}
    assert len(together[0].items) > 0
    assert together[4].items == together[4].sids == []


def test_an_explained_answer_says_what_the_query_was_read_as(served, monkeypatch):
    monkeypatch.setattr(served.bundle.retriever.prompt_builder, "spelling", SpellingCorrector({"garden": 9, "hose": 9}))
    asked = [request("Gardn hose", explain=True), request("Gardn hose"), request("garden hose", explain=True)]
    slip, unexplained, right = answer_batch(served, asked, (5, 5, 5))
    assert (slip.read_as, unexplained.read_as, right.read_as) == ("garden hose", None, None)


def test_an_explained_item_is_its_sids_probability_times_its_share(served):
    plain, explained = answer_batch(served, [request(beam_size=200, limit=1000), request(beam_size=200, limit=1000, explain=True)], (5, 5, 5))
    assert [item.item_id for item in plain.items] == [item.item_id for item in explained.items]
    assert all(item.explanation is None for item in plain.items)
    assert all(sid.path is None for sid in plain.sids)
    assert [sid.label for sid in plain.sids] == [sid.label for sid in explained.sids]
    sid_scores = {sid.sid: sid.score for sid in explained.sids}
    shares = dict.fromkeys(sid_scores, 0.0)
    for item in explained.items:
        why = item.explanation
        assert why.sid_score == sid_scores[item.sid]
        assert why.sid_score + why.share == pytest.approx(item.score, abs=1e-6)
        assert why.path[2] == item.sid
        assert why.path[1] == ",".join(item.sid.split(",")[:2]) + ">"
        shares[item.sid] += math.exp(why.share)
    # The beam holds every SID and the answer every item, so the shares of a SID's items make one.
    assert list(shares.values()) == pytest.approx([1.0] * len(shares), abs=1e-4)


def test_an_explained_sid_has_a_label_and_a_path_of_the_items_below(served):
    (answer,) = answer_batch(served, [request(beam_size=200, limit=1000, explain=True)], (5, 5, 5))
    below = collections.Counter(prefix for item in answer.items for prefix in item.explanation.path)
    for sid in answer.sids:
        assert sid.label == sid.path[-1].label
        assert [step.size for step in sid.path] == [below[step.prefix] for step in sid.path]
    categories = {item.category_path[-1] for item in answer.items}
    assert all(sid.label.partition(":")[0] in categories for sid in answer.sids)


def test_a_beam_narrowed_by_load_is_marked_and_one_asked_for_is_not(served):
    for count, beam, reasons in ((1, 5, []), (3, 4, ["load"]), (9, 3, ["load"])):
        answers = answer_batch(served, [request(str(number)) for number in range(count)], (5, 4, 3))
        assert {(answer.beam_size, answer.degraded, *answer.degraded_by) for answer in answers} == {(beam, bool(reasons), *reasons)}
    answers = answer_batch(served, [request(str(number), beam_size=3) for number in range(9)], (5, 4, 3))
    assert {(answer.beam_size, answer.degraded) for answer in answers} == {(3, False)}


@pytest.mark.parametrize(
    ("fields", "waited_s", "beam", "reasons"),
    [
        ({"deadline_ms": 100}, 0.0, 5, []),
        ({"deadline_ms": 100}, 0.049, 5, []),
        ({"deadline_ms": 100}, 0.051, 3, ["deadline"]),
        ({"deadline_ms": 100}, 0.099, 3, ["deadline"]),
        ({"deadline_ms": 100}, 0.101, None, None),
        ({"deadline_ms": 100, "beam_size": 40}, 0.060, 3, ["deadline"]),
        ({"deadline_ms": 100, "beam_size": 2}, 0.060, 2, []),
        ({}, 1e6, 5, []),
    ],
)
def test_a_deadline_half_gone_narrows_the_beam_and_one_gone_gets_no_answer(served, fields, waited_s, beam, reasons):
    (answer,) = answer_waiting(served, [Waiting(request(**fields), 1000.0)], (5, 4, 3), now=1000.0 + waited_s)
    if beam is None:
        assert answer is None
    else:
        assert (answer.beam_size, answer.degraded, answer.degraded_by) == (beam, bool(reasons), reasons)


def test_those_too_late_leave_the_others_their_places_and_their_beam(served):
    late, hurried, patient = request("hose", deadline_ms=10), request("lamp", deadline_ms=150), request("screw")
    waiting = [Waiting(late, 0.0), Waiting(hurried, 0.0), Waiting(late, 0.0), Waiting(patient, 0.0)]
    found = answer_waiting(served, waiting, (5, 4, 3), now=0.1)
    assert [answer and answer.beam_size for answer in found] == [None, 3, None, 5]  # two are left: no load
    (alone,) = answer_batch(served, [patient], (5, 4, 3))
    assert [item.item_id for item in found[3].items] == [item.item_id for item in alone.items]


def test_a_history_that_cannot_be_used_degrades_the_answer(served):
    def degraded_by(bundle, history):
        return answer_batch(ServedBundle(served.version, bundle), [request(history=history)], (5, 5, 5))[0].degraded_by

    assert degraded_by(served.bundle, ["nobody", "no one"]) == ["history"]
    assert degraded_by(served.bundle, ["nobody", "i01"]) == degraded_by(served.bundle, []) == []
    retriever = copy.copy(served.bundle.retriever)
    retriever.personalised = False
    assert degraded_by(dataclasses.replace(served.bundle, retriever=retriever), ["i01"]) == ["history"]


def test_without_posting_lists_what_fails_is_taken_out_afterwards_and_said(served):
    retriever = copy.copy(served.bundle.retriever)
    retriever.filters = None
    bare = ServedBundle(served.version, dataclasses.replace(served.bundle, retriever=retriever))
    for filters in (
        {"categories": [["Home", "garden hose"], ["Home", "deck screw"]], "excluded": ["i08", "nobody"]},
        {"brands": ["Acme"], "in_stock": True},
        {"brands": ["Nobody"]},
    ):
        asked = request(beam_size=200, limit=7, filters=Filters(**filters))
        (exact,), (answer,) = answer_batch(served, [asked], (5, 5, 5)), answer_batch(bare, [asked], (5, 5, 5))
        # The beam holds every SID, so that nothing is lost by filtering late.
        assert [item.item_id for item in answer.items] == [item.item_id for item in exact.items]
        assert (answer.degraded_by, exact.degraded_by) == (["filters"], [])
    (unfiltered,) = answer_batch(bare, [request(filters=Filters())], (5, 5, 5))
    assert not unfiltered.degraded


def test_the_shoppers_that_the_generator_knows_are_named(served):
    info = served.info("models:/shop@champion", None)
    assert (info.genders, info.age_bands) == (["f", "m"], ["18-24"])


def test_the_beam_narrows_under_load():
    assert [beam_size_by_load(waiting, (100, 50, 20)) for waiting in (1, 2, 3, 8, 9, 64)] == [100, 100, 50, 50, 20, 20]


def test_a_request_over_http_is_answered_from_the_bundle(served, monkeypatch):
    monkeypatch.delenv("GENRECALL_API_KEYS", raising=False)

    class Backend:
        async def recall(self, request):
            return answer_batch(served, [request], (5, 5, 5))[0]

        async def recall_batch(self, requests):
            return answer_batch(served, requests, (5, 5, 5))

        def ready(self):
            return True

        def info(self):
            return served.info("models:/shop@champion", None)

    async def ask():
        app = create_app(Backend, ApiKeys())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            body = {"query": "lamp", "history": ["i01"], "filters": {"categories": [["Home"]], "excluded": ["i02"]}, "limit": 3}
            return await client.post("/v1/recall", json=body), await client.get("/v1/model")

    answer, model = asyncio.run(ask())
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == 3
    assert set(answer.json()["items"][0]) == {"item_id", "title", "brand", "category_path", "rank", "sid", "score"}
    assert model.json()["items"] == 40
    assert model.json()["stage"] == "stage3"
    assert model.json()["levels"][:2] == [4, 3]
