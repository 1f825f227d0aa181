from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.data.request_assembly import Assembled, AssemblyRules, assemble_requests
from genrecall.data.schema import EVENTS

START = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
RULES = AssemblyRules(session_gap_minutes=30, max_user_events_per_day=1_000, max_user_clicks_per_day=100, max_clicks_per_request=50, history_length=3)


def event(request: str | None, item: str, action: str = "exposure", *, user: str | None = "u", minute: float | None = 0, **more: Any) -> dict[str, Any]:
    time = None if minute is None else START + datetime.timedelta(minutes=minute)
    return {"request_id": request, "user_id": user, "timestamp": time, "query": "q", "item_id": item, "action": action, **more}


def assemble(*events: dict[str, Any], rules: AssemblyRules = RULES) -> Assembled:
    loose = pa.schema([one.with_nullable(True) for one in EVENTS])
    return assemble_requests(pa.Table.from_pylist(list(events), schema=loose), rules)


def rows_of(assembled: Assembled) -> dict[str, dict[str, Any]]:
    return {row["request_id"]: row for row in assembled.requests.to_pylist()}


def test_page_order_clicks_purchases_and_grades() -> None:
    row = rows_of(
        assemble(
            event("r", "b", position=1, grade=2.5),
            event("r", "a", position=0),
            event("r", "a", "purchase", minute=9),
            event("r", "b", "click", minute=2),
            event("r", "a", "click", minute=3),
            event("r", "c", "cart", minute=1),
        )
    )["r"]
    assert row["exposed"] == ["a", "b", "c"]  # c was never logged as shown, yet it was put in the cart
    assert row["grades"] == [None, 2.5, None]
    assert row["clicked"] == ["c", "b", "a"]  # in the order of the first click
    assert row["purchased"] == ["a"]
    assert row["timestamp"] == START
    assert row["history"] == []


def test_repeated_events_count_once_at_their_earliest_time() -> None:
    outcome = assemble(event("r", "a", "click", minute=5), event("r", "a", "click", minute=1), event("r", "a", "click", minute=1))
    assert outcome.counts == {"duplicate": 2, "bot": 0}
    assert [row["timestamp"] for row in outcome.events.to_pylist()] == [START + datetime.timedelta(minutes=1)]


def test_history_holds_the_last_clicks_strictly_before_the_request() -> None:
    rows = rows_of(
        assemble(
            event("r1", "a", "click", minute=1),
            event("r1", "a", "purchase", minute=2),
            event("r2", "b", "click", minute=3),
            event("r3", "c", "click", minute=4),
            event("r3", "d", "click", minute=20),  # clicked only after r4 began
            event("r4", "e", minute=10),
            event("r5", "f", minute=20),
            event("r6", "x", user="other", minute=60),
            event("r7", "x", user=None, minute=60),
        )
    )
    assert rows["r1"]["history"] == []
    assert rows["r2"]["history"] == ["a"]  # click and purchase of one request are one entry
    assert rows["r4"]["history"] == ["a", "b", "c"]
    assert rows["r5"]["history"] == ["a", "b", "c"]  # d falls on the very moment of r5
    assert rows["r6"]["history"] == rows["r7"]["history"] == []


def test_history_is_cut_to_its_length() -> None:
    events = [event(f"r{number}", f"i{number}", "click", minute=number) for number in range(6)]
    assert rows_of(assemble(*events))["r5"]["history"] == ["i2", "i3", "i4"]


def test_sequence_breaks_ties_in_time_and_stands_in_for_it() -> None:
    rows = rows_of(assemble(event("r2", "b", "click", sequence=2), event("r1", "a", "click", sequence=1)))
    assert rows["r2"]["history"] == ["a"]
    rows = rows_of(assemble(event("r2", "b", "click", minute=None, sequence=2), event("r1", "a", "click", minute=None, sequence=1)))
    assert rows["r2"]["history"] == ["a"]
    assert rows["r2"]["timestamp"] is None
    assert rows["r2"]["sequence"] == 2


def test_rows_without_request_ids_are_joined_by_query_until_a_long_gap() -> None:
    outcome = assemble(
        event(None, "a", minute=0),
        event(None, "b", minute=29),
        event(None, "x", minute=5, query="other"),
        event(None, "c", minute=60),
        event(None, "d", minute=0, user="v"),
        event("given", "e", minute=1),
    )
    rows = outcome.requests.to_pylist()
    assert sorted((row["user_id"], row["query"], tuple(row["exposed"])) for row in rows) == [
        ("u", "other", ("x",)),
        ("u", "q", ("a", "b")),
        ("u", "q", ("c",)),  # 31 minutes after b
        ("u", "q", ("e",)),
        ("v", "q", ("d",)),
    ]
    assert len({row["request_id"] for row in rows}) == 5
    assert "given" in {row["request_id"] for row in rows}


def test_without_a_clock_another_query_in_between_opens_a_new_request() -> None:
    outcome = assemble(
        *(event(None, item, minute=None, sequence=place, query=query) for place, (item, query) in enumerate([("a", "q"), ("b", "q"), ("c", "x"), ("d", "q")]))
    )
    assert sorted(row["exposed"] for row in outcome.requests.to_pylist()) == [["a", "b"], ["c"], ["d"]]


def test_one_request_id_under_two_shoppers_is_two_requests() -> None:
    outcome = assemble(event("r", "a"), event("r", "b", user="v"))
    assert sorted((row["user_id"], row["exposed"]) for row in outcome.requests.to_pylist()) == [("u", ["a"]), ("v", ["b"])]


def test_bots_go_with_all_their_events() -> None:
    rules = AssemblyRules(session_gap_minutes=30, max_user_events_per_day=4, max_user_clicks_per_day=2, max_clicks_per_request=2, history_length=3)
    day = 24 * 60
    outcome = assemble(
        *(event("many", f"i{number}", user="viewer", minute=number) for number in range(5)),
        event("later", "i", user="viewer", minute=3 * day),
        *(event(f"c{number}", "i", "click", user="clicker", minute=number) for number in range(3)),
        *(event("wild", f"i{number}", "click", user=None) for number in range(3)),
        *(event(f"h{number}", "i", "click", user="human", minute=number * day) for number in range(3)),
        rules=rules,
    )
    assert outcome.counts["bot"] == 5 + 1 + 3 + 3
    assert {row["request_id"] for row in outcome.requests.to_pylist()} == {"h0", "h1", "h2"}


def test_nothing_gives_nothing() -> None:
    outcome = assemble()
    assert len(outcome.requests) == len(outcome.events) == len(outcome.event_request) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["u", "v", None]),
            st.integers(0, 5),
            st.sampled_from("abcd"),
            st.sampled_from(["exposure", "click", "purchase"]),
            st.integers(0, 20),
        ),
        max_size=40,
    )
)
def test_equals_a_plain_reference(draws: list[tuple[str | None, int, str, str, int]]) -> None:
    events = [event(f"r{request}{user}", item, action, user=user, minute=minute, query=f"q{request}") for user, request, item, action, minute in draws]
    outcome = assemble(*events)
    rows = rows_of(outcome)
    assert set(rows) == {one["request_id"] for one in events}
    began = {name: min(one["timestamp"] for one in events if one["request_id"] == name) for name in rows}
    for name, row in rows.items():
        mine = [one for one in events if one["request_id"] == name]
        assert row["timestamp"] == began[name]
        assert sorted(row["exposed"]) == sorted({one["item_id"] for one in mine})
        assert sorted(row["clicked"]) == sorted({one["item_id"] for one in mine if one["action"] != "exposure"})
        assert sorted(row["purchased"]) == sorted({one["item_id"] for one in mine if one["action"] == "purchase"})
        first_click: dict[tuple[str, str], Any] = {}
        for one in events:
            if row["user_id"] is not None and one["user_id"] == row["user_id"] and one["action"] != "exposure":
                key = (one["request_id"], one["item_id"])
                first_click[key] = min(first_click.get(key, one["timestamp"]), one["timestamp"])
        before = sorted(moment for moment in first_click.values() if moment < began[name])[-RULES.history_length :]
        assert len(row["history"]) == len(before)
        assert set(row["history"]) <= {item for (_, item), moment in first_click.items() if before and before[0] <= moment < began[name]}
    owners = [outcome.requests["request_id"][int(place)].as_py() for place in outcome.event_request]
    assert owners == outcome.events["request_id"].to_pylist()
    assert np.array_equal(outcome.users < 0, [user is None for user in outcome.requests["user_id"].to_pylist()])
