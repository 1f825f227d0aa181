"""The query constraint against plain loops."""

import math

import numpy as np
import pytest
import torch

from genrecall.quantization.query_constraint import QueryPairs, bidirectional_info_nce


def plain_info_nce(items, queries, has_query, positive, temperature):
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], items[None], dim=-1) / temperature
    rows = [row for row in range(len(items)) if has_query[row]]
    total = 0.0
    for own in rows:
        for score, is_positive in ((cosine[own], positive[own]), (cosine[:, own], positive[:, own])):
            others = [row for row in rows if row == own or not is_positive[row]]
            total += 0.5 * (math.log(sum(math.exp(score[row]) for row in others)) - float(score[own]))
    return total / max(1, len(rows))


@pytest.mark.parametrize("seed", range(5))
def test_info_nce_equals_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    items, queries = torch.randn(7, 4, generator=generator), torch.randn(7, 4, generator=generator)
    has_query = torch.rand(7, generator=generator) < 0.7
    positive = (torch.rand(7, 7, generator=generator) < 0.3) | torch.eye(7, dtype=torch.bool)
    found = bidirectional_info_nce(items, queries, has_query, positive, temperature=0.5)
    assert found.item() == pytest.approx(plain_info_nce(items, queries, has_query, positive, 0.5), abs=1e-5)


def test_two_rows_by_hand():
    # Cosines at temperature 1: own pairs 1, cross pairs 0; each of the four terms is log(e + 1) - 1.
    eye = torch.eye(2)
    found = bidirectional_info_nce(eye, eye, torch.tensor([True, True]), torch.eye(2, dtype=torch.bool), temperature=1.0)
    assert found.item() == pytest.approx(math.log(math.e + 1) - 1, abs=1e-6)


def test_without_pairs_the_term_and_its_gradient_are_zero():
    items = torch.randn(4, 3, requires_grad=True)
    found = bidirectional_info_nce(items, torch.randn(4, 3), torch.zeros(4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool), temperature=0.1)
    found.backward()
    assert found.item() == 0.0
    assert items.grad.abs().max().item() == 0.0


def test_pairs_draw_queries_of_the_item_and_mark_all_positives_of_the_batch():
    # Query 0 goes with items 0 and 2, query 1 with item 2, query 2 with item 4; item 1 and 3 have none.
    pairs = QueryPairs(np.array([0, 0, 1, 2, 0]), np.array([0, 2, 2, 4, 0]), np.ones(5), num_queries=3, num_items=5)
    assert len(pairs) == 4
    queries, positive = pairs.draw(np.array([2, 1, 0, 4]), np.random.default_rng(0))
    assert queries[0] in (0, 1)
    assert queries[1:].tolist() == [-1, 0, 2]
    expected = np.zeros((4, 4), dtype=bool)
    expected[0] = [True, False, queries[0] == 0, False]
    expected[2] = [True, False, True, False]
    expected[3, 3] = True
    assert positive.tolist() == expected.tolist()


def test_queries_are_drawn_by_weight():
    pairs = QueryPairs(np.array([0, 1, 1]), np.array([1, 1, 1]), np.array([1.0, 2.0, 1.0]), num_queries=2, num_items=3)
    rng = np.random.default_rng(0)
    drawn = [int(pairs.draw(np.array([1]), rng)[0][0]) for _ in range(400)]
    assert 0.68 < np.mean(drawn) < 0.82  # weight 3 of 4


def test_the_look_up_for_very_large_catalogues_gives_the_same(monkeypatch):
    rng = np.random.default_rng(3)
    arguments = (rng.integers(0, 20, 200), rng.integers(0, 50, 200), np.ones(200))
    small = QueryPairs(*arguments, num_queries=20, num_items=50)
    large = QueryPairs(*arguments, num_queries=20, num_items=50)
    monkeypatch.setattr(large, "_num_items", 2_000_000)
    items = rng.permutation(50)[:30]
    for mine, theirs in zip(small.draw(items, np.random.default_rng(1)), large.draw(items, np.random.default_rng(1)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_no_pairs_at_all():
    pairs = QueryPairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), num_queries=0, num_items=3)
    queries, positive = pairs.draw(np.array([0, 2]), np.random.default_rng(0))
    assert queries.tolist() == [-1, -1]
    assert not positive.any()
