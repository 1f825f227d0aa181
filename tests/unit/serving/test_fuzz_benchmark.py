"""The fuzzer's quick mode against both servers, and that it sees what it looks for."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in ("GENRECALL_API_KEYS", "GENRECALL_ADMIN_KEYS"):
            patch.delenv(name, raising=False)
        yield importlib.import_module("fuzz")


def test_every_status_that_the_fuzzer_meets_is_explained_to_operators(fuzz):
    table = re.search(r"## Answers other than 200\n(.*?)\n## ", (BENCHMARKS.parent / "docs" / "operations.md").read_text(), re.DOTALL)
    first_cells = re.findall(r"^\|([^|]*)\|", table[1], re.MULTILINE)
    explained = {int(status) for cell in first_cells for status in re.findall(r"\b\d{3}\b", cell)}
    assert explained == fuzz.REFUSALS | {500}


def test_hostile_requests_meet_no_failure_and_are_recorded(fuzz, untrained_line, tmp_path):
    output = tmp_path / "serving.json"
    other = {"table": "latency", "row": "default", "metric": "http_added_p50_ms", "value": 1.0}
    output.write_text(json.dumps([other, {"table": "fuzz", "row": "old", "metric": "fuzz_requests", "value": 1.0}]))
    records = fuzz.main(["--quick", "--bundle", str(untrained_line().path), "--output", str(output)])
    assert json.loads(output.read_text()) == [other, *records]
    values = {(record["row"], record["metric"]): record["value"] for record in records}
    assert values["all", "fuzz_requests"] == values["routes", "fuzz_requests"] + values["bundle", "fuzz_requests"] >= 400
    assert values["all", "fuzz_unexpected_5xx"] == values["routes", "fuzz_wrong_answers"] == values["bundle", "fuzz_wrong_answers"] == 0
    # It gets through to the backends and is refused in every way.
    assert values["bundle", "status_200"] > 10
    assert all(values["routes", f"status_{status}"] for status in (200, 401, 404, 413, 422))
    assert ("all", "rss_growth") in values
    assert set(records[0]) == {"table", "row", "metric", "value", "low", "high", "machine", "command", "commit"}


def test_the_same_number_is_the_same_request(fuzz):
    one, two, other = (fuzz.HostileRequests(seed, "key", "admin", (2**16, 2**20)) for seed in (0, 0, 1))
    assert [one(number) for number in range(50)] == [two(number) for number in reversed(range(50))][::-1]
    assert one(7) != other(7)


class Broken:
    """A backend with a defect of each kind."""

    def __init__(self, fuzz, defect):
        self.inner, self.defect = fuzz.RoutesBackend(), defect

    async def recall(self, request):
        if self.defect == "raises":
            raise RuntimeError("broken")
        answer = await self.inner.recall(request)
        return answer.model_copy(update={"items": [item.model_copy(update={"rank": 5}) for item in answer.items]})

    recall_batch = change_items = ready = info = None


@pytest.mark.parametrize(("defect", "said", "unexpected"), [("raises", "status 500|RuntimeError", 1), ("rank", "items out of rank", 0)])
def test_a_defect_is_seen(fuzz, defect, said, unexpected, capsys):
    loop = asyncio.new_event_loop()
    target = fuzz.Target("broken", Broken(fuzz, defect), loop)
    headers = ((b"content-type", b"application/json"), (b"x-api-key", fuzz.KEY.encode()))
    target.fire(fuzz.Attempt("plausible", "POST", "/v1/recall", headers, (b'{"query": "x"}',)), "number 1")
    loop.close()
    assert len(target.wrong) == 1
    assert any(part in target.wrong[0] for part in said.split("|"))
    assert target.unexpected == unexpected


def test_growth_is_that_of_the_last_fifth_over_the_first(fuzz):
    samples = [100, 100] + [90] * 6 + [104, 106]
    assert fuzz.growth(samples) == pytest.approx((0.04, 0.05, 0.06))


def test_the_bundle_behind_the_fuzzer_takes_changes_and_sees_a_delisted_item(fuzz, untrained_line, tmp_path):
    backend = fuzz.BundleBackend(untrained_line().path, fuzz.CatalogueLog(tmp_path))
    changes = fuzz.ItemsRequest.model_validate({"upsert": [{"item_id": "n0", "title": "garden hose", "brand": "Newcomer"}], "delist": ["i00"]})
    assert asyncio.run(backend.change_items(changes)).catalog_seq == 2
    asked = fuzz.RecallRequest.model_validate({"query": "hose", "limit": 1000, "filters": {"brands": ["Newcomer"]}})
    answer = asyncio.run(backend.recall(asked))
    assert ([item.item_id for item in answer.items], answer.versions.catalog_seq) == (["n0"], 2)
    backend._delisted.add("n0")
    with pytest.raises(AssertionError, match="delisted items in an answer"):
        asyncio.run(backend.recall_batch([asked]))
