"""Batches answered from a real bundle, in process."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from genrecall.registry.bundle import load_bundle
from genrecall.registry.versions import Version
from genrecall.serving.api import create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.messages import RecallRequest, Shopper
from genrecall.serving.recall_service import ServedBundle, answer_batch, beam_size_by_load


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


def test_the_beam_narrows_under_load():
    assert [beam_size_by_load(waiting, (100, 50, 20)) for waiting in (1, 2, 3, 8, 9, 64)] == [100, 100, 50, 50, 20, 20]


def test_a_request_over_http_is_answered_from_the_bundle(served, monkeypatch):
    monkeypatch.delenv("GENRECALL_API_KEYS", raising=False)

    class Backend:
        async def recall(self, request):
            return answer_batch(served, [request], (5, 5, 5))[0]

        def info(self):
            return served.info("models:/shop@champion", None)

    async def ask():
        app = create_app(Backend, ApiKeys())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post("/v1/recall", json={"query": "lamp", "history": ["i01"], "limit": 3}), await client.get("/v1/model")

    answer, model = asyncio.run(ask())
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == 3
    assert set(answer.json()["items"][0]) == {"item_id", "title", "brand", "category_path", "rank", "sid", "score"}
    assert model.json()["items"] == 40
    assert model.json()["stage"] == "stage3"
    assert model.json()["levels"][:2] == [4, 3]
