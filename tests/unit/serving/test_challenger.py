"""The version beside the champion: when it is loaded, what it answers, and that its failures and its shadows cost the champion nothing."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.promotion import register
from genrecall.registry.versions import MANIFEST_TAG
from genrecall.serving import challenger as module
from genrecall.serving import hot_swap
from genrecall.serving.api import OverloadedError, VersionNotLoadedError
from genrecall.serving.challenger import MAX_SHADOWS, Challenger, overlap
from genrecall.serving.deployments import RecallDeployment
from genrecall.serving.hot_swap import BundleFollower
from genrecall.serving.messages import RecallRequest
from genrecall.serving.recall_service import answer_batch

BEAMS = (5, 4, 3)


@pytest.fixture
def pair(registry, untrained_line, tmp_path):
    """A served champion shop/1, its follower, and a `Challenger` that may load shop/2."""
    for seed in (0, 1):
        register(untrained_line(seed=seed), "shop", metrics={})
    registry.set_registered_model_alias("shop", "champion", "1")
    registry.set_registered_model_alias("shop", "challenger", "2")
    follower = BundleFollower("models:/shop@champion", registry.tracking_uri, catalogues=tmp_path / "logs")
    served = follower.load()
    return served, follower, Challenger(follower.of_challenger("shop"), BEAMS)


def test_it_is_loaded_for_a_share_and_dropped_without_one_or_without_its_alias(pair, registry):
    champion, _, challenger = pair
    challenger.follow(champion)
    assert (challenger.served, challenger.info()) == (None, None)
    challenger.configure({"canary_share": 0.5})
    challenger.follow(champion)
    loaded = challenger.served
    assert (loaded.versions.model, loaded.versions.role) == ("shop/2", "challenger")
    challenger.follow(champion)
    assert challenger.served is loaded
    registry.set_registered_model_alias("shop", "challenger", "1")  # the champion is no challenger
    challenger.follow(champion)
    assert challenger.served is None
    registry.set_registered_model_alias("shop", "challenger", "2")
    challenger.follow(champion)
    assert challenger.served is not None
    registry.delete_registered_model_alias("shop", "challenger")
    challenger.follow(champion)
    assert (challenger.served, challenger.info().refused) == (None, None)


def test_a_bad_one_is_refused_and_named(pair, monkeypatch):
    champion, _, challenger = pair

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("genrecall.serving.hot_swap.load_bundle", broken)
    challenger.configure({"load_challenger": True})
    challenger.follow(champion)
    assert challenger.served is None
    assert challenger.info().refused == "shop/2: disk full"


def test_a_registered_version_that_cannot_be_used_is_refused_and_said_once(pair, registry, caplog):
    champion, _, challenger = pair
    challenger.configure({"load_challenger": True})
    challenger.follow(champion)
    registry.delete_model_version_tag("shop", "2", MANIFEST_TAG)
    for _ in range(3):
        challenger.follow(champion)
    assert challenger.served is None
    assert "was not registered by genrecall" in challenger.info().refused
    assert caplog.text.count("no challenger, refused") == 1
    registry.delete_registered_model_alias("shop", "challenger")  # absence is no failure
    challenger.follow(champion)
    assert challenger.info().refused is None


def test_one_that_is_exchanged_makes_room_before_the_other_is_loaded(pair, registry, untrained_line, monkeypatch):
    champion, _, challenger = pair
    register(untrained_line(seed=2), "shop", metrics={})
    registry.set_registered_model_alias("shop", "challenger", "2")
    challenger.configure({"load_challenger": True})
    challenger.follow(champion)
    before = weakref.ref(challenger.served.bundle)
    held, load = [], hot_swap.load_bundle

    def seen(path):
        held.append(before() is not None)
        return load(path)

    monkeypatch.setattr(hot_swap, "load_bundle", seen)
    registry.set_registered_model_alias("shop", "challenger", "3")
    challenger.follow(champion)
    assert challenger.served.version.number == 3
    assert held == [False]


def test_changes_of_the_catalogue_reach_it(pair):
    champion, follower, challenger = pair
    challenger.configure({"load_challenger": True})
    challenger.follow(champion)
    follower.log.append([ItemRecord(item_id="n0", title="hose")], ["i00"])
    challenger.follow_log()
    (answer,) = answer_batch(challenger.served, [RecallRequest(query="hose", beam_size=200, limit=1000)], BEAMS)
    ids = {item.item_id for item in answer.items}
    assert "n0" in ids
    assert "i00" not in ids
    assert answer.versions.catalog_seq == 2


def test_one_that_cannot_take_the_changes_is_let_go(pair, monkeypatch):
    champion, _, challenger = pair
    challenger.configure({"load_challenger": True})
    challenger.follow(champion)
    monkeypatch.setattr(challenger._follower, "up_to_date", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    challenger.follow_log()
    assert challenger.served is None


@pytest.mark.parametrize("meanwhile", ["let go", "taken further"])
def test_what_the_log_made_of_it_while_the_alias_was_looked_at_stays(pair, monkeypatch, meanwhile):
    champion, follower, challenger = pair
    challenger.configure({"load_challenger": True})
    challenger.follow(champion)
    follower.log.append([], ["i00"])
    wanted = challenger._follower.wanted_challenger

    def slow(*versions):
        with monkeypatch.context() as patch:
            if meanwhile == "let go":
                patch.setattr(challenger._follower, "up_to_date", lambda _: (_ for _ in ()).throw(OSError("disk full")))
            challenger.follow_log()
        return wanted(*versions)

    monkeypatch.setattr(challenger._follower, "wanted_challenger", slow)
    challenger.follow(champion)
    sequence = challenger.served and challenger.served.versions.catalog_seq
    assert sequence == (None if meanwhile == "let go" else 1)


@pytest.mark.parametrize("wrong", [{"canary_share": 1.5}, {"canary_share": "much"}, {"canary": 0.1}])
def test_shares_that_cannot_be_used_change_nothing_and_are_reported(pair, wrong):
    _, _, challenger = pair
    challenger.configure({"canary_share": 0.25})
    challenger.configure(wrong)
    assert challenger.shares.canary_share == 0.25
    assert next(iter(wrong)) in challenger.info().refused
    challenger.configure({"canary_share": 0.5})
    assert (challenger.shares.canary_share, challenger.info().refused) == (0.5, None)


def test_shadows_return_at_once_and_are_dropped_when_full(pair, monkeypatch):
    champion, _, challenger = pair
    challenger.configure({"shadow_share": 1.0})
    challenger.follow(champion)
    request = RecallRequest(query="hose", limit=3)
    (answer,) = answer_batch(champion, [request], BEAMS)
    go, seen = threading.Event(), []

    def stuck(served, requests, beam_sizes):
        go.wait(10)
        seen.append((served.versions.model, requests[0].beam_size))
        raise ValueError("a failing challenger")

    monkeypatch.setattr(module, "answer_batch", stuck)
    started = time.monotonic()
    taken = [challenger.shadow(request, answer) for _ in range(MAX_SHADOWS + 5)]
    assert time.monotonic() - started < 5  # they hang for 10 s
    assert taken == [True] * MAX_SHADOWS + [False] * 5
    go.set()
    challenger._shadow_thread.shutdown(wait=True)
    assert seen == [("shop/2", answer.beam_size)] * MAX_SHADOWS
    assert all(challenger._pending.acquire(blocking=False) for _ in range(MAX_SHADOWS))  # failures give their places back


def test_overlap():
    assert overlap(["a", "b", "c", "d"], ["d", "x", "a"]) == 0.5
    assert overlap([], []) is None
    assert overlap([], ["a"]) == 0.0


class Replica:
    """As much of a replica as choosing a version needs."""

    def __init__(self, *, loaded=True, canary=False, error=None):
        self.calls, self.failures, self.shadows = [], [], []
        self.error = error
        self._challenger = SimpleNamespace(
            served=object() if loaded else None, canary_of=lambda _: canary, failed=self.failures.append, shadow=lambda *one: self.shadows.append(one)
        )

    async def _recall(self, role, request, arrived):
        self.calls.append(role)
        if role == "challenger" and self.error is not None:
            raise self.error
        return f"answer of the {role}"

    def ask(self, **fields):
        return asyncio.run(RecallDeployment.func_or_class.recall(self, RecallRequest(query="hose", **fields)))


def test_a_canary_is_answered_by_the_challenger_alone_and_others_by_the_champion():
    replica = Replica(canary=True)
    assert replica.ask() == "answer of the challenger"
    assert (replica.calls, replica.shadows) == (["challenger"], [])
    assert replica.ask(version="champion") == "answer of the champion"
    assert replica.shadows == []
    other = Replica()
    assert other.ask() == "answer of the champion"
    assert [answer for _, answer in other.shadows] == ["answer of the champion"]


def test_where_the_challenger_fails_the_champion_answers_and_it_is_counted():
    replica = Replica(canary=True, error=ZeroDivisionError("broken"))
    assert replica.ask() == "answer of the champion"
    assert replica.calls == ["challenger", "champion"]
    assert replica.failures == [replica.error]
    with pytest.raises(OverloadedError, match="the challenger failed"):
        replica.ask(version="challenger")
    with pytest.raises(VersionNotLoadedError, match="no challenger is loaded"):
        Replica(loaded=False).ask(version="challenger")


def test_where_the_challenger_is_taken_out_meanwhile_the_champion_answers_and_nothing_failed():
    replica = Replica(canary=True, error=VersionNotLoadedError("the challenger was taken out of service"))
    assert replica.ask() == "answer of the champion"
    assert (replica.calls, replica.failures) == (["challenger", "champion"], [])
