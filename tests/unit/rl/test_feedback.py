"""Feedback per SID: tiers, best tier wins, requests without feedback."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from genrecall.data.interactions import Requests
from genrecall.rl.feedback import CLICKED, EXPOSED, INVALID, PURCHASED, VALID, build_feedback

ITEM_SID = np.array([0, 0, 1, 2, 3, -1], dtype=np.int32)


def requests_of(exposed, clicked, purchased) -> Requests:
    count = len(exposed)

    def arrays(lists):
        return [np.array(one, dtype=np.int32) for one in lists]

    return Requests(
        request_ids=[f"r{i}" for i in range(count)],
        user_ids=[None] * count,
        queries=[""] * count,
        genders=[None] * count,
        age_bands=[None] * count,
        times=np.arange(count, dtype=np.int64),
        exposed=arrays(exposed),
        clicked=arrays(clicked),
        purchased=arrays(purchased),
        history=arrays([[]] * count),
        grades=[np.full(len(one), np.nan, dtype=np.float32) for one in exposed],
    )


def test_a_sid_has_the_best_tier_of_its_items():
    # request 0: items 0 and 1 share SID 0; item 0 exposed, item 1 bought. SID 1 clicked, SID 2 only exposed.
    feedback = build_feedback(requests_of([[0, 1, 2, 3]], [[1, 2]], [[1]]), ITEM_SID, 4)
    assert feedback.sid_rows.tolist() == [0, 1, 2]
    assert feedback.tiers.tolist() == [PURCHASED, CLICKED, EXPOSED]


def test_tiers_of_answers():
    feedback = build_feedback(requests_of([[0, 1, 2, 3], [4]], [[1, 2], []], [[1], []]), ITEM_SID, 4)
    tiers = feedback.tiers_of(np.array([0, 1, 0]), np.array([[0, 1, 2, 3, -1], [3, 0, 0, -1, 2], [3, 3, 3, 3, 3]], dtype=np.int32))
    assert tiers.tolist() == [
        [PURCHASED, CLICKED, EXPOSED, VALID, INVALID],
        [EXPOSED, VALID, VALID, INVALID, VALID],
        [VALID] * 5,
    ]


def test_items_without_sid_give_no_feedback():
    feedback = build_feedback(requests_of([[5], [5, 2]], [[5], []], [[], []]), ITEM_SID, 4)
    assert feedback.with_feedback().tolist() == [1]


def test_requests_with_feedback_of_a_tier():
    feedback = build_feedback(requests_of([[0], [0], []], [[], [0], []], [[], [], []]), ITEM_SID, 4)
    assert feedback.with_feedback().tolist() == [0, 1]
    assert feedback.with_feedback(CLICKED).tolist() == [1]
    assert [part.tolist() for part in feedback.of(2)] == [[], []]


def test_no_feedback_at_all():
    feedback = build_feedback(requests_of([[]], [[]], [[]]), ITEM_SID, 4)
    assert feedback.tiers_of(np.array([0]), np.array([[2, -1]], dtype=np.int32)).tolist() == [[VALID, INVALID]]


items = st.lists(st.integers(0, 5), max_size=6)


@given(st.lists(st.tuples(items, items, items), min_size=1, max_size=5), st.lists(st.integers(-1, 3), min_size=1, max_size=6))
def test_tiers_equal_a_plain_reference(rows, answers):
    feedback = build_feedback(requests_of(*map(list, zip(*rows, strict=True))), ITEM_SID, 4)
    got = feedback.tiers_of(np.arange(len(rows)), np.tile(np.array(answers, dtype=np.int32), (len(rows), 1)))

    def tier(row, sid):
        exposed, clicked, purchased = (set(ITEM_SID[list(one)]) if one else set() for one in row)
        return INVALID if sid < 0 else PURCHASED if sid in purchased else CLICKED if sid in clicked else EXPOSED if sid in exposed else VALID

    assert got.tolist() == [[tier(row, sid) for sid in answers] for row in rows]
