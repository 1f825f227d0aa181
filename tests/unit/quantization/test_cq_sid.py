"""The quantiser's stage without its cluster: configuration, training data, batches, the four variants, placements."""

import json

import numpy as np
import pytest
import torch

from genrecall.config import ConfigError, apply_overrides
from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.quantization import cq_sid
from genrecall.quantization.cq_sid import (
    QuantizerConfig,
    TrainingData,
    _starting_rows,
    draw_batch,
    freeze,
    make_model,
    refit_codebooks,
    training_data,
    update_codebooks,
    write_placements,
)
from genrecall.quantization.rqvae import rqvae_loss

NUM_ITEMS = 120
SMALL = QuantizerConfig(level_sizes=(16, 8, 8), latent_dim=8, hidden_dim=16, steps=20, batch_size=32, min_items=5)


def catalog_of(first_seen=None):
    nothing = np.full(NUM_ITEMS, np.datetime64("NaT", "us"))
    return Catalog(
        item_ids=np.array([f"i{row:03d}" for row in range(NUM_ITEMS)], dtype=object),
        titles=["t"] * NUM_ITEMS,
        category_paths=[("root", f"c{row % 4}") if row % 5 else () for row in range(NUM_ITEMS)],
        brands=[""] * NUM_ITEMS,
        texts=[""] * NUM_ITEMS,
        prices=np.full(NUM_ITEMS, np.nan),
        prior_scores=np.zeros(NUM_ITEMS),
        first_seen=nothing if first_seen is None else first_seen,
    )


def requests_of(queries=("q0", "q1", "q0", " ")):
    clicked = [np.array([0, 1]), np.array([1]), np.array([2]), np.array([3])][: len(queries)]
    clicked = [rows.astype(np.int32) for rows in clicked]
    count = len(queries)
    empty = [np.zeros(0, np.int32)] * count
    return Requests(
        request_ids=[f"r{row}" for row in range(count)],
        user_ids=[None] * count,
        queries=list(queries),
        genders=[None] * count,
        age_bands=[None] * count,
        times=np.arange(count, dtype=np.int64) + 1000,
        exposed=clicked,
        clicked=clicked,
        purchased=empty,
        history=empty,
        grades=[np.full(len(rows), np.nan, np.float32) for rows in clicked],
    )


@pytest.fixture
def embeddings():
    x = np.random.default_rng(0).normal(size=(NUM_ITEMS, 12)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_only_items_known_at_the_split_are_fitted_on(embeddings):
    first_seen = np.full(NUM_ITEMS, np.datetime64(0, "us"))
    first_seen[7] = np.datetime64(2000, "us")  # the last training request is at 1003
    data = training_data(SMALL, catalog_of(first_seen), requests_of(), embeddings)
    assert 7 not in data.rows
    assert len(data.rows) == NUM_ITEMS - 1


def test_pairs_leave_out_empty_queries_and_later_items(embeddings):
    first_seen = np.full(NUM_ITEMS, np.datetime64(0, "us"))
    first_seen[2] = np.datetime64(2000, "us")
    data = training_data(SMALL, catalog_of(first_seen), requests_of(), embeddings)
    assert len(data.pairs) == 3  # (q0, 0), (q0, 1), (q1, 1); not (q0, 2), not (" ", 3)
    assert data.queries == ["q0", "q1"]


def test_categories_fill_at_most_their_share_of_the_book(embeddings):
    data = training_data(apply_overrides(SMALL, ["category_share=0.2"]), catalog_of(), requests_of(), embeddings)
    assert len(data.categories) <= 3
    assert data.level1[5] == -1  # no category path


def test_missing_categories_and_queries_are_said(embeddings, caplog):
    data = training_data(apply_overrides(SMALL, ["min_items=1000"]), catalog_of(), requests_of(("",)), embeddings)
    assert data.pairs is None
    assert "no category has 1000 items" in caplog.text
    assert "no training request has a query and a click" in caplog.text


def test_a_batch_is_the_same_whenever_its_step_comes(embeddings):
    data = training_data(SMALL, catalog_of(), requests_of(), embeddings)
    queries = torch.randn(2, 12)
    first, again = (draw_batch(data, queries, rows=16, seed=1, step=5, rank=0) for _ in range(2))
    other = draw_batch(data, queries, rows=16, seed=1, step=5, rank=1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert len(torch.unique(first[0], dim=0)) == 16  # no item twice


def test_a_draw_to_start_from_misses_no_category(embeddings, monkeypatch):
    monkeypatch.setattr(cq_sid, "_START_ROWS", 20)
    level1 = np.repeat([0, 1, -1, 2], [3, 30, 60, 27])
    data = TrainingData(embeddings, np.arange(NUM_ITEMS), level1, None, None, [])
    x, codes, weights = _starting_rows(SMALL, data)
    drawn = {code: int((codes == code).sum()) for code in (-1, 0, 1, 2)}
    assert drawn[0] == 3  # all that there are
    assert all(drawn[code] >= 16 for code in (-1, 1, 2))
    assert sum(drawn.values()) < NUM_ITEMS
    for code, count in ((-1, 60), (0, 3), (1, 30), (2, 27)):  # together, the rows of a category stand for all of it
        assert weights[codes == code].tolist() == pytest.approx([count / drawn[code]] * drawn[code])
        rows = embeddings[level1 == code].tolist()
        assert all(row in rows for row in x[codes == code].tolist())
    plain = TrainingData(embeddings, np.arange(NUM_ITEMS), None, None, None, [])
    x, codes, weights = _starting_rows(SMALL, plain)
    assert (len(x), codes, weights) == (20, None, None)


def fit(config, embeddings):
    data = training_data(config, catalog_of(), requests_of(), embeddings)
    queries = (
        None if data.pairs is None else torch.nn.functional.normalize(torch.randn(len(data.queries), 12, generator=torch.Generator().manual_seed(0)), dim=1)
    )
    model = make_model(config, data, query_dim=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    for step in range(config.steps):
        refit_codebooks(config, data, model, step=step)
        batch = draw_batch(data, queries, rows=config.batch_size, seed=config.seed, step=step, rank=0)
        parts = rqvae_loss(model, *batch, config.beta, config.gamma, config.temperature)
        optimizer.zero_grad()
        parts.loss.backward()
        optimizer.step()
        update_codebooks(config, model, parts, step=step)
    return freeze(model, data.categories), parts


@pytest.mark.parametrize("use_category", [True, False])
@pytest.mark.parametrize("use_query", [True, False])
def test_the_four_variants_are_one_code(embeddings, use_category, use_query):
    config = apply_overrides(SMALL, [f"use_category={str(use_category).lower()}", f"use_query={str(use_query).lower()}", "min_items=10"])
    quantizer, parts = fit(config, embeddings)
    assert ("query_contrast" in parts.metrics) == use_query
    paths = catalog_of().category_paths
    codes, _ = quantizer.place(embeddings, paths)
    if use_category:
        # Four leaves of 24 items each and 24 items without a category: every leaf keeps to one code.
        assert all(len(np.unique(codes[[path == ("root", f"c{leaf}") for path in paths], 0])) == 1 for leaf in range(4))
    else:
        assert quantizer.categories is None
    assert torch.isfinite(parts.loss)


def test_fitting_twice_gives_the_same_codes(embeddings):
    (first, _), (again, _) = fit(SMALL, embeddings), fit(SMALL, embeddings)
    for mine, theirs in zip(first.codebooks, again.codebooks, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_placements_are_written_for_every_item(embeddings, tmp_path):
    quantizer, _ = fit(apply_overrides(SMALL, ["steps=2"]), embeddings)
    write_placements(tmp_path, quantizer, embeddings, catalog_of().category_paths)
    assert np.load(tmp_path / "codes.npy").shape == (NUM_ITEMS, 3)
    residuals = np.load(tmp_path / "residuals.npy")
    assert residuals.shape == (NUM_ITEMS, 8)
    assert residuals.dtype == np.float16
    assert json.loads((tmp_path / "diagnostics.json").read_text())["levels"][0]["codes"] == 16


def test_settings_that_cannot_take_effect_are_refused():
    with pytest.raises(ConfigError, match="have no effect with method=rqkmeans"):
        apply_overrides(QuantizerConfig(), ["method=rqkmeans"])
    with pytest.raises(ConfigError, match="set use_query=false to say so"):
        apply_overrides(QuantizerConfig(), ["gamma=0"])
    with pytest.raises(ConfigError, match="each level needs at least 2 codes"):
        apply_overrides(QuantizerConfig(), ["level_sizes=[64,1,32]", "decay=2"])
    control = ["method=rqkmeans", "use_category=false", "use_query=false"]
    assert apply_overrides(QuantizerConfig(), [*control, "kmeans_iterations=50"]).method == "rqkmeans"
    for setting, switch in (
        ("min_items=20", "use_category=false"),
        ("category_share=0.5", "use_category=false"),
        ("gamma=0.2", "use_query=false"),
        ("temperature=0.2", "use_query=false"),
    ):
        name, _ = setting.split("=")
        with pytest.raises(ConfigError, match=f"{name}: has no effect with {switch}; leave it at {getattr(QuantizerConfig, name)}"):
            apply_overrides(QuantizerConfig(), [setting, switch])
        assert apply_overrides(QuantizerConfig(), [setting]) != QuantizerConfig()
    with pytest.raises(ConfigError, match="steps: has no effect with method=rqkmeans; leave it at 600"):
        apply_overrides(QuantizerConfig(), [*control, "steps=700"])
