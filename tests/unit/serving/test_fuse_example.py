"""The example of a search application: BM25 and the channel fused, and BM25 alone where the channel does not answer."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from genrecall.evaluation.baselines import Bm25
from genrecall.serving.api import OverloadedError, create_app
from genrecall.serving.api_keys import ApiKeys
from genrecall.serving.client import RecallClient
from genrecall.serving.messages import RecalledItem, RecallResponse, Timings, Versions

EXAMPLE = Path(__file__).parents[3] / "examples" / "fuse_with_bm25.py"
TITLES = ["garden hose", "hose nozzle", "angle bracket", "watering can", "deck screw"]
ITEMS = [{"item_id": f"i{row}", "title": title, "brand": None, "category_path": ["Home"]} for row, title in enumerate(TITLES)]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("fuse_with_bm25", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Backend:
    """Recalls the watering can, the hose, and an item that BM25's list does not have yet."""

    def __init__(self):
        self.requests, self.overloaded = [], False

    async def recall(self, request):
        self.requests.append(request)
        if self.overloaded:
            raise OverloadedError("too many requests are waiting")
        found = [("i3", "watering can"), ("i0", "garden hose"), ("new", "hose reel")]
        items = [
            RecalledItem(item_id=item_id, title=title, brand="", category_path=[], rank=rank, sid="<0,0,0>", score=-1.0)
            for rank, (item_id, title) in enumerate(found)
        ]
        timings = Timings(generate_ms=1.0, expand_ms=0.5, batch_size=1)
        return RecallResponse(items=items, sids=[], beam_size=5, versions=Versions(model="shop/1", bundle="a"), timings=timings)


@pytest.fixture(scope="module")
def stand_in():
    backend = Backend()
    server = uvicorn.Server(uvicorn.Config(create_app(lambda: backend, ApiKeys()), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield backend, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


def test_reciprocal_ranks_are_added_up(example):
    # a: 1/61 + 1/63, b: 1/62, c: 1/63 + 1/61, d: 1/62; equal sums stay in the order they were met.
    assert example.fuse([["a", "b", "c"], ["c", "d", "a"]]) == ["a", "c", "b", "d"]
    assert example.fuse([[], ["x"]]) == ["x"]


def test_both_channels_are_fused_and_named(example, stand_in):
    backend, url = stand_in
    backend.overloaded = False
    bm25 = Bm25([example.text_of(item) for item in ITEMS])
    found = example.search("hose", ITEMS, bm25, RecallClient(url, timeout_s=10), limit=10)
    channels = {item_id: (title, names) for title, item_id, names in found}
    assert found[0][1] == "i0", "only it is in both lists"
    assert channels == {
        "i0": ("garden hose", ["bm25", "generative"]),
        "i1": ("hose nozzle", ["bm25"]),
        "i3": ("watering can", ["generative"]),
        "new": ("hose reel", ["generative"]),
    }
    assert (backend.requests[-1].limit, backend.requests[-1].deadline_ms) == (100, 500)
    assert len(example.search("hose", ITEMS, bm25, RecallClient(url, timeout_s=10), limit=2)) == 2


def test_without_the_channel_bm25_goes_on_alone(example, stand_in, capsys):
    backend, url = stand_in
    backend.overloaded = True
    found = example.search("hose", ITEMS, Bm25([example.text_of(item) for item in ITEMS]), RecallClient(url, timeout_s=10, retries=0), limit=10)
    assert {item_id for _, item_id, _ in found} == {"i0", "i1"}
    assert "without the generative channel" in capsys.readouterr().err
