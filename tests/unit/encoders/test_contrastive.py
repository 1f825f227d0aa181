from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.config import ConfigError, from_dict
from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.encoders.contrastive import (
    EncoderConfig,
    contrastive_loss,
    draw_batch,
    info_nce,
    make_towers,
    not_negative,
    row_counts,
    train_encoder,
    training_pairs,
)
from genrecall.encoders.embed import item_text
from genrecall.encoders.text_encoder import TowerEncoder
from genrecall.storage import Artifact
from genrecall.train_worker import TrainSettings

NOUNS = ["bracket", "hammer", "lantern", "faucet", "curtain", "shovel", "ladder", "mirror"]
FINISHES = ["bronze", "chrome", "walnut", "ivory", "copper"]
SMALL = EncoderConfig(dim=16, hidden=16, num_buckets=1024, batch_size=16, steps=5)


def shop(*, categories: bool = True, first_seen: list[str] | None = None) -> Catalog:
    titles = [f"{finish} {noun}" for noun in NOUNS for finish in FINISHES]
    paths = [("Home", f"{noun}s") if categories else () for noun in NOUNS for _ in FINISHES]
    n = len(titles)
    return Catalog(
        item_ids=np.array([f"i{row:02d}" for row in range(n)], object),
        titles=titles,
        category_paths=paths,
        brands=[""] * n,
        texts=[""] * n,
        prices=np.full(n, np.nan),
        prior_scores=np.zeros(n),
        first_seen=np.array(first_seen or ["NaT"] * n, "datetime64[us]"),
    )


def asked(queries: list[str], clicked: list[list[int]], purchased: list[list[int]] | None = None, times: list[int] | None = None) -> Requests:
    n = len(queries)
    rows = [np.array(one, np.int32) for one in clicked]
    return Requests(
        request_ids=[f"r{row}" for row in range(n)],
        user_ids=[None] * n,
        queries=queries,
        genders=[None] * n,
        age_bands=[None] * n,
        times=np.array(times or range(n), np.int64),
        exposed=rows,
        clicked=rows,
        purchased=[np.array(one, np.int32) for one in purchased] if purchased else [np.zeros(0, np.int32)] * n,
        history=[np.zeros(0, np.int32)] * n,
        grades=[np.full(len(one), np.nan, np.float32) for one in clicked],
    )


def test_info_nce_by_hand():
    # Cosines 1 and 0, temperature 0.5: logits [[2, 0], [0, 2]]; each direction -log(e^2 / (e^2 + 1)).
    vectors = torch.eye(2)
    loss, accuracy = info_nce(vectors, vectors, torch.zeros(2, 2, dtype=torch.bool), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    assert accuracy.item() == 1.0


def test_info_nce_leaves_excluded_items_out_of_both_directions():
    queries = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.3, 1.0], [1.0, 1.0]]), dim=1)
    items = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 1.0]]), dim=1)
    excluded = torch.zeros(3, 3, dtype=torch.bool)
    excluded[0, 2] = True
    cosine = (queries @ items.T).tolist()
    by_query, by_item = [], []
    for row in range(3):
        by_query.append(cosine[row][row] - math.log(sum(math.exp(cosine[row][j]) for j in range(3) if (row, j) != (0, 2))))
        by_item.append(cosine[row][row] - math.log(sum(math.exp(cosine[i][row]) for i in range(3) if (i, row) != (0, 2))))
    loss, _ = info_nce(queries, items, excluded, 1.0)
    assert loss.item() == pytest.approx(-(sum(by_query) / 3 + sum(by_item) / 3) / 2, abs=1e-6)


def test_info_nce_of_a_row_without_negatives_is_zero_and_has_a_finite_gradient():
    queries = torch.nn.functional.normalize(torch.randn(2, 4, generator=torch.manual_seed(0)), dim=1).requires_grad_()
    loss, _ = info_nce(queries, torch.eye(4)[:2], ~torch.eye(2, dtype=torch.bool), 0.05)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert queries.grad is not None
    assert torch.isfinite(queries.grad).all()


def test_possible_matches_are_no_negatives_by_hand():
    # Rows: a title view of item 5; query 0 -> item 5; query 0 -> item 7; query 1 -> item 8; category 3 -> item 9 (item 8 is of category 3 too).
    # Query 1 is also known to go with item 7.
    items = np.array([5, 5, 7, 8, 9])
    excluded = not_negative(
        items,
        np.array([-1, 0, 0, 1, -1]),
        np.array([-1, -1, -1, -1, 3]),
        np.array([-1, -1, 2, 3, 3]),
        np.array([0 * 10 + 5, 0 * 10 + 7, 1 * 10 + 7, 1 * 10 + 8]),
        10,
    )
    assert [tuple(place) for place in np.argwhere(excluded)] == [
        (0, 1),  # the same item
        (1, 0),  # the same item
        (1, 2),  # the same query
        (2, 0),  # query 0 -> item 5 is a pair
        (2, 1),  # the same query
        (3, 2),  # query 1 -> item 7 is a pair
        (4, 3),  # item 8 is of the category that row 4 asks for
    ]


def plain_not_negative(items, queries, leaves, item_leaves, pairs):
    n = len(items)
    return [
        [
            i != j
            and (
                items[i] == items[j]
                or (queries[i] >= 0 and queries[i] == queries[j])
                or (queries[i], items[j]) in pairs
                or (leaves[i] >= 0 and leaves[i] == item_leaves[j])
            )
            for j in range(n)
        ]
        for i in range(n)
    ]


@settings(max_examples=80)
@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(-1, 4), st.integers(-1, 2), st.integers(-1, 2)), max_size=8),
    pairs=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 6))),
)
def test_vectorised_mask_equals_plain_loops(rows, pairs):
    items, queries, leaves, item_leaves = (np.array([row[column] for row in rows], np.int64) for column in range(4))
    keys = np.array(sorted(query * 7 + item for query, item in pairs), np.int64)
    assert not_negative(items, queries, leaves, item_leaves, keys, 7).tolist() == plain_not_negative(items, queries, leaves, item_leaves, pairs)


def test_pairs_of_one_query_text_are_joined_and_drawn_by_the_root_of_their_weight():
    # "bracket" clicks item 0 twice and buys it once (1 + 1 + 2 = 4), "hammer" clicks item 6 once: chances 2 and 1.
    source = training_pairs(shop(), asked(["bracket", "hammer", "bracket", "bracket", ""], [[0], [6], [0], [0], [1]], [[], [], [], [0], []]))
    assert source.queries == ["bracket", "hammer"]
    assert source.pair_keys.tolist() == [0, 40 + 6]
    np.testing.assert_allclose(source.pair_cumulative, [2 / 3, 1.0])


def test_items_first_seen_after_the_last_training_request_are_not_trained_on():
    dates = ["2024-01-01"] * 39 + ["2024-03-01"]
    last = np.datetime64("2024-02-01", "us").astype(np.int64)
    source = training_pairs(shop(first_seen=dates), asked(["bracket"], [[0]], times=[int(last)]))
    assert source.known_items.tolist() == list(range(39))
    assert 39 not in source.leaf_items


@pytest.mark.parametrize(("objective", "expected"), [("text", (16, 0, 0)), ("contrastive", (6, 10, 0)), ("category", (6, 8, 2))])
def test_objectives_are_cumulative(objective, expected):
    source = training_pairs(shop(), asked(["bracket"], [[0]]))
    assert row_counts(EncoderConfig(objective=objective, text_fraction=0.4, category_fraction=0.1), source, 16) == expected


def test_what_the_data_lacks_goes_to_the_title_views():
    no_pairs = training_pairs(shop(), asked(["", "?"], [[0], [1]]))
    no_categories = training_pairs(shop(categories=False), asked(["bracket"], [[0]]))
    assert row_counts(EncoderConfig(text_fraction=0.4, category_fraction=0.1), no_pairs, 16) == (14, 0, 2)
    assert row_counts(EncoderConfig(text_fraction=0.4, category_fraction=0.1), no_categories, 16) == (6, 10, 0)


def test_a_batch_depends_on_seed_step_and_rank_only():
    source = training_pairs(shop(), asked(["bracket", "hammer"], [[0, 1], [6]]))
    first = draw_batch(SMALL, source, step=3, rank=1, rows=8)
    draw_batch(SMALL, source, step=4, rank=1, rows=8)
    again = draw_batch(SMALL, source, step=3, rank=1, rows=8)
    assert (first.queries, first.items) == (again.queries, again.items)
    assert draw_batch(SMALL, source, step=3, rank=0, rows=8).items != first.items
    assert draw_batch(SMALL, source, step=4, rank=1, rows=8).items != first.items


def test_a_catalogue_of_one_item_has_a_batch_and_a_finite_loss():
    one = shop()
    catalog = Catalog(**{name: column[:1] for name, column in vars(one).items()})
    source = training_pairs(catalog, asked(["bracket"], [[0]]))
    batch = draw_batch(SMALL, source, step=0, rank=0, rows=4)
    towers = make_towers(SMALL, source.item_texts)
    loss, _ = contrastive_loss(
        towers, towers.tokenize(batch.queries, "query"), towers.tokenize(batch.items, "item"), torch.from_numpy(batch.not_negative), 0.05
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_brief_training_brings_misspelt_queries_and_unseen_synonyms_to_their_items():
    # "sconce" occurs in no title; the clicks say that it means lantern. Only copper ones are left out of training.
    catalog = shop()
    lanterns = list(range(10, 15))
    source = training_pairs(catalog, asked([f"{finish} sconce" for finish in FINISHES[:4]], [[row] for row in lanterns[:4]]))
    config = EncoderConfig(dim=64, hidden=32, num_buckets=4096, batch_size=64, learning_rate=1e-2, misspelling_rate=0.4)
    towers = make_towers(config, source.item_texts)
    optimizer = torch.optim.Adam(towers.parameters(), lr=config.learning_rate)
    for step in range(80):
        batch = draw_batch(config, source, step=step, rank=0, rows=config.batch_size)
        loss, _ = contrastive_loss(
            towers, towers.tokenize(batch.queries, "query"), towers.tokenize(batch.items, "item"), torch.from_numpy(batch.not_negative), config.temperature
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder = TowerEncoder(towers)
    items = encoder.encode_items(item_text(catalog))
    best = (encoder.encode_queries(["bronz bracet", "chrme hamer", "walnut mirorr", "coppr sconce"]) @ items.T).argmax(1)
    assert [catalog.titles[row] for row in best] == ["bronze bracket", "chrome hammer", "walnut mirror", "copper lantern"]


def test_a_batch_too_small_for_its_workers_is_refused_before_anything_starts(tmp_path):
    dataset = Artifact(uri="nowhere", path=tmp_path, manifest={})
    with pytest.raises(ValueError, match=r"encoder\.batch_size: 4 rows for 3 workers leave fewer than 2 each"):
        train_encoder(EncoderConfig(batch_size=4), dataset=dataset, uri=str(tmp_path / "encoder"), train=TrainSettings(num_workers=3))


def test_all_problems_of_a_config_are_listed():
    with pytest.raises(ConfigError) as caught:
        from_dict(EncoderConfig, {"text_fraction": 0.9, "category_fraction": 0.2, "temperature": 0.0, "query_prefix": "query: ", "steps": -1})
    message = str(caught.value)
    for part in (
        "text_fraction + category_fraction: must be at most 1, got 1.1",
        "temperature: must be above 0",
        "have no effect with backbone=ngrams",
        "steps: must be at least 0",
    ):
        assert part in message
