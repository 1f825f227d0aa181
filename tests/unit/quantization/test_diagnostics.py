"""Numbers about the health of SIDs, worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecall.quantization.diagnostics import (
    churn,
    cluster_numbers,
    cluster_sizes,
    draw_pictures,
    gini,
    level_usage,
    neighbour_hit_rate,
    perplexity,
    prefix_purity,
    quantizer_diagnostics,
)


def test_perplexity_of_a_collapsed_book_is_one_and_of_an_even_book_its_size():
    assert perplexity(np.array([0, 9, 0])) == 1.0
    assert perplexity(np.array([4, 4, 4, 4])) == pytest.approx(4.0)
    assert perplexity(np.array([0, 0])) == 0.0


def test_gini_by_hand():
    assert gini(np.array([5, 5, 5])) == 0.0
    # |1-3| is the only difference: mean absolute difference 2 * 2 / 4 = 1, over twice the mean 2: .25.
    assert gini(np.array([1, 3])) == pytest.approx(0.25)


def test_level_usage_by_hand():
    usage = level_usage(np.array([[0, 1, 2], [0, 1, 2], [1, 1, 2], [2, 1, 0]], dtype=np.int32), (4, 2, 3))
    assert usage[0]["usage"] == 0.75
    assert usage[0]["top_share"] == 0.5
    assert usage[1] == {"codes": 2.0, "usage": 0.5, "perplexity": 1.0, "top_share": 1.0}


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40))
def test_cluster_numbers_follow_lexicographic_order(rows):
    order = {row: number for number, row in enumerate(sorted(set(rows)))}
    assert cluster_numbers(np.array(rows, dtype=np.int32)).tolist() == [order[row] for row in rows]


def test_cluster_sizes_by_hand():
    found = cluster_sizes(np.array([0, 0, 0, 2]))
    assert found["sids"] == 2
    assert found["items_per_sid"] == 2.0
    assert found["items_per_sid_of_an_item"] == 2.5  # three items see 3, one sees 1
    assert found["singletons"] == 0.5
    assert cluster_sizes(np.zeros(0, np.int64)) == {"sids": 0.0}


def test_purity_counts_the_commonest_category_under_each_prefix():
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=np.int32)
    # Level 1: code 0 holds 7, 7, 8 (2 right), code 1 holds 9 (right) and an unlabelled item. Level 2: all right.
    assert prefix_purity(codes, np.array([7, 7, 8, 9, -1])) == [0.75, 1.0, 1.0]


def test_neighbours_share_prefixes_where_codes_follow_the_embeddings():
    angle = np.array([0.0, 0.01, 1.5, 1.51])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    codes = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]], dtype=np.int32)
    assert neighbour_hit_rate(codes, x, neighbours=1) == [1.0, 1.0, 0.5]
    assert neighbour_hit_rate(codes[:1], x[:1]) == [0.0, 0.0, 0.0]


def test_churn_ignores_new_numbers_and_counts_broken_pairs():
    before = np.array([0, 0, 0, 1])
    assert churn(before, np.array([5, 5, 5, 2])) == 0.0
    assert churn(before, np.array([5, 5, 6, 6])) == pytest.approx(2 / 3)  # of the pairs 01, 02, 12 only 01 is kept
    assert churn(np.array([0, 1]), np.array([0, 0])) == 0.0


def test_numbers_and_pictures_are_written_for_a_small_catalogue(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (30, 3)).astype(np.int32)
    x = rng.normal(size=(30, 5)).astype(np.float32)
    numbers = quantizer_diagnostics(codes, x, x, [("a",), ("a", "b"), ()] * 10, (4, 4, 4))
    assert set(numbers) == {"levels", "clusters", "purity_root_category", "purity_leaf_category", "neighbour_hit_rate", "residual_norm_squared"}
    assert numbers["purity_root_category"] == [1.0, 1.0, 1.0]
    draw_pictures(tmp_path, codes, x, (4, 4, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster_sizes.png", "level1_map.png", "level_usage.png"]


def test_a_catalogue_of_one_item_has_numbers_and_pictures_too(tmp_path):
    codes, x = np.zeros((1, 3), np.int32), np.ones((1, 4), np.float32)
    assert quantizer_diagnostics(codes, x, x * 0, [()], (2, 2, 2))["clusters"]["sids"] == 1
    draw_pictures(tmp_path, codes, x, (2, 2, 2))
