from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from genrecall.data.catalog import Catalog
from genrecall.encoders.embed import MAX_DESCRIPTION_WORDS, compose_item_text, embed_catalog, item_text, load_item_embeddings
from genrecall.encoders.text_encoder import TowerEncoder
from genrecall.encoders.towers import NgramTowers


def catalog_of(titles: list[str], brands: list[str], paths: list[tuple[str, ...]], texts: list[str]) -> Catalog:
    n = len(titles)
    return Catalog(
        item_ids=np.array([str(row) for row in range(n)], object),
        titles=titles,
        brands=brands,
        category_paths=paths,
        texts=texts,
        prices=np.full(n, np.nan),
        prior_scores=np.zeros(n),
        first_seen=np.full(n, "NaT", "datetime64[us]"),
    )


def test_an_item_is_its_title_brand_last_categories_and_first_words_of_its_description():
    assert compose_item_text("Angle", "Simpson", ("Home", "Hardware", "Brackets"), "12 gauge\nsteel") == "Angle Simpson Hardware Brackets 12 gauge steel"


def test_a_brand_that_the_title_holds_is_not_repeated():
    assert compose_item_text("SIMPSON Angle", "Simpson") == "SIMPSON Angle"


def test_descriptions_are_cut():
    assert len(compose_item_text("", text="word " * 1000).split()) == MAX_DESCRIPTION_WORDS


def test_an_item_with_no_text_is_an_empty_string():
    assert item_text(catalog_of(["", "Angle"], ["", ""], [(), ()], ["", ""])) == ["", "Angle"]


def test_embeddings_of_a_catalogue_are_in_catalogue_order_and_float32(tmp_path: Path):
    torch.manual_seed(0)
    encoder = TowerEncoder(NgramTowers(dim=8, hidden=8, num_buckets=300))
    catalog = catalog_of(["Angle", "Lamp", ""], ["Simpson", "", ""], [("Hardware",), (), ()], ["", "", ""])
    embed_catalog(encoder, catalog, tmp_path)
    vectors = load_item_embeddings(tmp_path)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode_items(["Angle Simpson Hardware", "Lamp", ""]), atol=1e-6)
