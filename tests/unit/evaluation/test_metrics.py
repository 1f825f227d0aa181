"""Each metric on a case worked by hand, and against a plain-Python reference on random cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.evaluation.metrics import (
    NOT_FOUND,
    Targets,
    any_found,
    click_hit_rate,
    cluster_order,
    condensed,
    cut_hit_rate,
    exposure_hit_rate,
    grades_of,
    hit_at,
    hit_items,
    judged_at,
    junk_at,
    marginal_of_missed,
    marginal_recall,
    mean_over_requests,
    ndcg_at,
    page_view_recall,
    ranking_positions,
    recall_at,
    share,
    sid_hit_rate,
    sid_ranks,
    union_recall,
)

# Eight items in three clusters: SID 0 = {0, 1, 2}, SID 1 = {3, 4}, SID 2 = {5, 6, 7}.
ITEM_SID = np.array([0, 0, 0, 1, 1, 2, 2, 2])
OFFSETS = np.array([0, 3, 5, 8])
ITEMS = np.arange(8)
# Request 0 gets SIDs 1, 0; request 1 only SID 2; request 2 SIDs 0, 2.
SIDS = np.array([[1, 0], [2, -1], [0, 2]], dtype=np.int32)


def targets(*lists: list[int]) -> Targets:
    return Targets.from_lists([np.array(one, dtype=np.int64) for one in lists])


def test_repeated_target_counts_once() -> None:
    made = targets([3, 3, 0], [], [5])
    assert made.request.tolist() == [0, 0, 2]
    assert made.item.tolist() == [0, 3, 5]


def test_clk_is_the_mean_share_of_clicked_items_in_the_top_sids() -> None:
    clicked = targets([3, 0], [0], [])  # request 0: item 3 in the first SID, item 0 in the second; request 1: SID 0 not listed; request 2: none
    ranks = sid_ranks(SIDS, ITEM_SID, clicked)
    assert ranks.tolist() == [1, 0, NOT_FOUND]  # pairs (0, 0), (0, 3), (1, 0)
    np.testing.assert_array_equal(click_hit_rate(ranks, clicked, 1), [0.5, 0.0, np.nan])
    np.testing.assert_array_equal(click_hit_rate(ranks, clicked, 2), [1.0, 0.0, np.nan])
    assert mean_over_requests(click_hit_rate(ranks, clicked, 1)) == 0.25  # the request without a click takes no part


def test_exp_asks_for_any_and_pvr_for_the_share_of_exposed_items() -> None:
    exposed = targets([3, 4, 5, 6], [0, 1], [7])
    ranks = sid_ranks(SIDS, ITEM_SID, exposed)
    np.testing.assert_array_equal(exposure_hit_rate(ranks, exposed, 1), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(page_view_recall(ranks, exposed, 1), [0.5, 0.0, 0.0])
    np.testing.assert_array_equal(page_view_recall(ranks, exposed, 2), [0.5, 0.0, 1.0])


def test_a_tier_without_targets_gives_none() -> None:
    none = targets([], [], [])
    assert mean_over_requests(click_hit_rate(sid_ranks(SIDS, ITEM_SID, none), none, 1)) is None


def test_sid_level_counts_each_cluster_once() -> None:
    clicked = targets([0, 1, 2, 3], [], [])  # three targets in SID 0, one in SID 1: item share at 1 is 1/4, SID share 1/2
    assert click_hit_rate(sid_ranks(SIDS, ITEM_SID, clicked), clicked, 1)[0] == 0.25
    assert sid_hit_rate(SIDS, ITEM_SID, clicked, 1)[0] == 0.5


def test_item_without_sid_is_never_found() -> None:
    item_sid = ITEM_SID.copy()
    item_sid[0] = -1
    clicked = targets([], [0], [])
    assert sid_ranks(SIDS, item_sid, clicked).tolist() == [NOT_FOUND]  # the padding -1 of request 1 must not match


def test_cluster_order_finds_ties() -> None:
    order = cluster_order(ITEM_SID, 3, np.array([1.0, 5.0, 1.0, 2.0, 2.0, 9.0, np.nan, 3.0]))
    assert order.sizes.tolist() == [3, 2, 3]
    assert order.tie_start.tolist() == [1, 0, 1, 0, 0, 0, 2, 1]  # SID 0: item 1, then 0 and 2; SID 1: a tie; SID 2: 5, 7, 6 (nan last)
    assert order.tie_size.tolist() == [2, 1, 2, 2, 2, 1, 1, 1]


def test_hit_items_shares_a_tie_and_random_order_shares_the_cluster() -> None:
    order = cluster_order(ITEM_SID, 3, np.array([1.0, 5.0, 1.0, 2.0, 2.0, 9.0, 0.0, 3.0]))
    clicked = targets([0], [6], [])
    # Request 0 serves {3, 4}, then 1, then the tie {0, 2}: item 0 is 4th or 5th, so 1/2 of it fits into 4 items.
    served = hit_items(SIDS, ITEM_SID, order, clicked, [3, 4, 5])
    assert [one[0] for one in served] == [0.0, 0.5, 1.0]
    # Request 1 serves 5, 7, 6.
    assert [one[1] for one in served] == [1.0, 1.0, 1.0]
    assert hit_items(SIDS, ITEM_SID, order, clicked, [2])[0][1] == 0.0
    # With the whole cluster at random, item 0 is one of places 3 to 5: 1/3 in 3 items, 2/3 in 4; item 6 one of places 1 to 3.
    shuffled = hit_items(SIDS, ITEM_SID, order, clicked, [3, 4], random_order=True)
    assert [one[0] for one in shuffled] == pytest.approx([1 / 3, 2 / 3])
    assert hit_items(SIDS, ITEM_SID, order, clicked, [2], random_order=True)[0][1] == pytest.approx(2 / 3)


def test_a_wider_beam_pushes_targets_out_of_the_cut() -> None:
    scores = np.array([9.0, 8.0, 7.0, 1.0, 2.0, 0.0, 0.0, 0.0])
    clicked = targets([3], [], [])
    # Beam 1 of request 0 is {3, 4}: item 3 is second, inside a cut of 2. Beam 2 adds 0, 1, 2 with higher scores: it falls out.
    at1, at2 = cut_hit_rate(SIDS, ITEM_SID, OFFSETS, ITEMS, scores, clicked, [1, 2], 2)
    assert (at1[0], at2[0]) == (1.0, 0.0)
    # With all scores equal, a cut of 2 keeps 2 of the 5 items.
    _, tied = cut_hit_rate(SIDS, ITEM_SID, OFFSETS, ITEMS, np.zeros(8), clicked, [1, 2], 2)
    assert tied[0] == pytest.approx(2 / 5)


RANKED = np.array([[3, 0, 7, -1], [5, 6, 1, 2]], dtype=np.int32)


def test_recall_and_hit_of_a_ranking() -> None:
    clicked = targets([0, 7, 4], [2])
    positions = ranking_positions(RANKED, clicked)
    assert positions.tolist() == [1, NOT_FOUND, 2, 3]
    np.testing.assert_allclose(recall_at(positions, clicked, 2), [1 / 3, 0.0])
    np.testing.assert_allclose(recall_at(positions, clicked, 3), [2 / 3, 0.0])
    np.testing.assert_allclose(hit_at(positions, clicked, 2), [1.0, 0.0])


def test_marginal_recall_is_what_the_others_miss() -> None:
    clicked = targets([0, 1, 2, 3], [4])
    ours, first, second = (np.array(one) for one in ([0, 0, 9, NOT_FOUND, 1], [0, NOT_FOUND, 2, NOT_FOUND, 0], [NOT_FOUND, 50, 3, NOT_FOUND, NOT_FOUND]))
    # At 10: ours has items 0, 1, 2 of request 0; the others have 0 and 2. Only item 1 is new: 1 of 4. Missed by them: 1 and 3, we find 1 of 2.
    np.testing.assert_allclose(marginal_recall(ours, [first, second], clicked, 10), [0.25, 0.0])
    np.testing.assert_allclose(union_recall([ours, first, second], clicked, 10), [0.75, 1.0])
    np.testing.assert_allclose(marginal_of_missed(ours, [first, second], clicked, 10), [0.5, np.nan])


JUDGED = targets([0, 3, 4], [1])
GRADES = np.array([1.0, 3.0, 2.0, 2.5])  # items 0, 3, 4 of request 0; item 1 of request 1


def test_judged_and_junk_shares() -> None:
    grades = grades_of(RANKED, JUDGED, GRADES, 8)
    np.testing.assert_array_equal(grades, [[3.0, 1.0, np.nan, np.nan], [np.nan, np.nan, 2.5, np.nan]])
    np.testing.assert_allclose(judged_at(RANKED, grades, 4), [2 / 3, 1 / 4])  # request 0 has three answers only
    np.testing.assert_allclose(junk_at(grades, 4), [1 / 2, 0.0])  # of the judged answers 3.0 and 1.0 one is below 2.0
    assert np.isnan(junk_at(grades, 2)[1])


def test_condensed_list_drops_unjudged_items() -> None:
    short, grades = condensed(RANKED, grades_of(RANKED, JUDGED, GRADES, 8))
    assert short.tolist() == [[3, 0, -1, -1], [1, -1, -1, -1]]
    np.testing.assert_array_equal(grades[1], [2.5, np.nan, np.nan, np.nan])
    clicked = targets([], [1])
    assert recall_at(ranking_positions(RANKED, clicked), clicked, 1)[1] == 0.0
    assert recall_at(ranking_positions(short, clicked), clicked, 1)[1] == 1.0


def test_ndcg_worked_by_hand() -> None:
    grades = grades_of(RANKED, JUDGED, GRADES, 8)
    # Gains 2, 0, - at ranks 1, 2; ideal: 2, 1, 0.
    expected = 2.0 / (2.0 + 1.0 / math.log2(3))
    # Request 1: gain 1.5 at rank 3, ideal 1.5 at rank 1.
    np.testing.assert_allclose(ndcg_at(grades, JUDGED, GRADES, 3), [expected, 1.0 / math.log2(4)])
    worthless = ndcg_at(grades_of(RANKED, JUDGED, np.ones(4), 8), JUDGED, np.ones(4), 3)
    assert np.isnan(worthless).all()


def test_no_judgement_at_all() -> None:
    nothing = targets([], [])
    assert np.isnan(grades_of(RANKED, nothing, np.zeros(0), 8)).all()


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[int]]]:
    num_sids = draw(st.integers(1, 5))
    item_sid = np.array(draw(st.lists(st.integers(0, num_sids - 1), min_size=1, max_size=12)))
    scores = np.array(draw(st.lists(st.integers(0, 2), min_size=len(item_sid), max_size=len(item_sid))), dtype=np.float64)
    requests = draw(st.integers(1, 4))
    width = draw(st.integers(1, num_sids))
    lists = [draw(st.permutations(range(num_sids)))[:width] for _ in range(requests)]
    clicked = [draw(st.lists(st.integers(0, len(item_sid) - 1), unique=True, max_size=4)) for _ in range(requests)]
    return item_sid, scores, np.array(lists, dtype=np.int32), clicked


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(1, 6), st.integers(1, 14))
def test_fast_paths_equal_plain_python(world: tuple[np.ndarray, np.ndarray, np.ndarray, list[list[int]]], n: int, budget: int) -> None:
    item_sid, scores, lists, clicked = world
    num_sids = int(item_sid.max()) + 1
    lists = np.where(lists < num_sids, lists, -1)
    pairs = targets(*clicked)
    by_sid = [[item for item in range(len(item_sid)) if item_sid[item] == sid] for sid in range(num_sids)]
    index_items = np.array([item for one in by_sid for item in one])
    offsets = np.cumsum([0] + [len(one) for one in by_sid])
    order = cluster_order(item_sid, num_sids, scores)
    clk, served, shuffled, cut = [], [], [], []
    for row, wanted in zip(lists, clicked, strict=True):
        top = [by_sid[sid] for sid in row[:n] if sid >= 0]
        clk.append([float(any(item in one for one in top)) for item in wanted])
        served.append([_expected_share(item, [by_sid[sid] for sid in row if sid >= 0], scores, budget, by_score=True) for item in wanted])
        shuffled.append([_expected_share(item, [by_sid[sid] for sid in row if sid >= 0], scores, budget, by_score=False) for item in wanted])
        union = [item for one in top for item in one]
        cut.append([_expected_share(item, [union], scores, budget, by_score=True) for item in wanted])
    expected = [np.array([np.mean(one) if one else np.nan for one in rows]) for rows in (clk, served, shuffled, cut)]
    np.testing.assert_allclose(click_hit_rate(sid_ranks(lists, item_sid, pairs), pairs, n), expected[0])
    np.testing.assert_allclose(hit_items(lists, item_sid, order, pairs, [budget])[0], expected[1])
    np.testing.assert_allclose(hit_items(lists, item_sid, order, pairs, [budget], random_order=True)[0], expected[2])
    np.testing.assert_allclose(cut_hit_rate(lists, item_sid, offsets, index_items, scores, pairs, [n], budget)[0], expected[3])


def _expected_share(item: int, groups: list[list[int]], scores: np.ndarray, budget: int, *, by_score: bool) -> float:
    """Chance that `item` is among the first `budget` of the groups' items, ties (or whole groups) in random order."""
    before = 0
    for group in groups:
        if item not in group:
            before += len(group)
            continue
        higher = sum(scores[other] > scores[item] for other in group) if by_score else 0
        tied = sum(scores[other] == scores[item] for other in group) if by_score else len(group)
        return min(max((budget - before - higher) / tied, 0.0), 1.0)
    return 0.0


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_hits_never_fall_with_a_wider_beam_or_a_larger_budget(world: tuple[np.ndarray, np.ndarray, np.ndarray, list[list[int]]]) -> None:
    item_sid, scores, lists, clicked = world
    lists = np.where(lists <= item_sid.max(), lists, -1)
    pairs = targets(*clicked)
    order = cluster_order(item_sid, int(item_sid.max()) + 1, scores)
    budgets = hit_items(lists, item_sid, order, pairs, list(range(1, 14)))
    assert all((np.nan_to_num(after) >= np.nan_to_num(before) - 1e-12).all() for before, after in itertools.pairwise(budgets))
    ranks = sid_ranks(lists, item_sid, pairs)
    widest = click_hit_rate(ranks, pairs, lists.shape[1])
    np.testing.assert_allclose(budgets[-1], widest)  # a budget of all items is the whole expansion


def test_share_and_any_differ_only_in_how_they_count() -> None:
    pairs = targets([0, 1], [])
    found = np.array([True, False])
    np.testing.assert_array_equal(share(found, pairs), [0.5, np.nan])
    np.testing.assert_array_equal(any_found(found, pairs), [1.0, np.nan])
