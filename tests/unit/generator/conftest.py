"""A tiny shop of fifty items with known SIDs, and an encoder that needs no training."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.encoders.embed import item_text
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.lexicon import build_lexicon
from genrecall.generator.model import Decoder
from genrecall.generator.retriever import Retriever
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.sid.index import SidIndex
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie

KINDS = ("bracket", "faucet", "drill", "lamp", "carpet")
COLOURS = ("red", "blue", "green", "black", "white", "brass", "steel", "oak", "gold", "grey")


class WordEncoder:
    """Sums a fixed random vector per word: `TextEncoder` without training."""

    dim = 16

    def encode_items(self, texts: Sequence[str], category_paths: object = None) -> np.ndarray:
        return self.encode_queries(texts)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row] += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.dim).astype(np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


@pytest.fixture(scope="session")
def encoder() -> WordEncoder:
    return WordEncoder()


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Item row 10 k + c is the c-th colour of the k-th kind."""
    count = len(KINDS) * len(COLOURS)
    return Catalog(
        item_ids=np.array([f"i{row:02d}" for row in range(count)], dtype=object),
        titles=[f"{colour} {kind} no {row}" for row, (kind, colour) in enumerate((kind, colour) for kind in KINDS for colour in COLOURS)],
        category_paths=[("shop", kind) for kind in KINDS for _ in COLOURS],
        brands=[""] * count,
        texts=[""] * count,
        prices=np.full(count, np.nan),
        prior_scores=np.zeros(count),
        first_seen=np.full(count, np.datetime64("NaT"), dtype="datetime64[us]"),
    )


@pytest.fixture(scope="session")
def table() -> SidTable:
    """The SID of item 10 k + c is <k, c, 0>: kind, colour."""
    rows = np.arange(50)
    return SidTable.from_item_tokens(SidSpace((5, 10, 2)), np.stack([rows // 10, rows % 10, np.zeros(50, int)], axis=1).astype(np.int32))


def _make_requests(queries: Sequence[str], clicked: Sequence[Sequence[int]], **columns: Sequence) -> Requests:
    """Requests with the given queries and clicks; nothing bought, no shopper unless given."""
    count = len(queries)

    def rows(values: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [np.array(one, dtype=np.int32) for one in values]

    return Requests(
        request_ids=[f"r{row}" for row in range(count)],
        user_ids=[None] * count,
        queries=list(queries),
        genders=list(columns.get("genders", [None] * count)),
        age_bands=list(columns.get("age_bands", [None] * count)),
        times=np.arange(count, dtype=np.int64),
        exposed=rows(clicked),
        clicked=rows(clicked),
        purchased=rows(columns.get("purchased", [[]] * count)),
        history=rows(columns.get("history", [[]] * count)),
        grades=[np.full(len(one), np.nan, np.float32) for one in clicked],
    )


@pytest.fixture(scope="session")
def make_requests() -> Callable[..., Requests]:
    return _make_requests


@pytest.fixture(scope="session")
def requests() -> Requests:
    """Every item is asked for by colour and kind; a bare kind is clicked by f on its first colour and by m on its second."""
    queries = [f"{colour} {kind}" for kind in KINDS for colour in COLOURS]
    clicked = [[row] for row in range(50)]
    genders: list[str | None] = [None] * 50
    for kind_row, kind in enumerate(KINDS):
        for gender, at in (("f", 0), ("m", 1)):
            queries.append(kind)
            clicked.append([10 * kind_row + at])
            genders.append(gender)
    return _make_requests(queries, clicked, genders=genders, history=[[]] * 50 + [[3], [4]] * 5)


@pytest.fixture(scope="session")
def untrained_retriever(catalog: Catalog, encoder: WordEncoder) -> Callable[..., Retriever]:
    """Makes a retriever over SIDs of the first items, whose decoder has not been trained: guided with a `sharpness`, also by words with `lexical` (of a `stemmer`), with `feedback`."""

    def make(
        table: SidTable, priors: np.ndarray, *, sharpness: float, lexical: float = 0.0, stemmer: str = "", feedback: float = 0.0, counted: int = 50
    ) -> Retriever:
        """`counted`: items whose words tell how much a word says."""
        sizes = table.space.level_sizes
        index = SidIndex.build(table.item_sid, len(table), priors)
        tokenizer = QueryTokenizer.train(catalog.titles, 500, genders=["f", "m"], age_bands=["18-24"])
        lexicon = build_lexicon(catalog, index.item_rows, tokenizer, np.arange(50) < counted, stemmer)
        config = DecoderConfig(
            text_vocab_size=tokenizer.vocab_size,
            level_sizes=sizes,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=16,
            soft_prompt_dim=encoder.dim,
            guide_sharpness=sharpness,
            guide_lexical=lexical,
            guide_feedback=feedback,
            guide_items=len(index.item_rows) if lexical else 0,
            guide_entries=len(lexicon.item_tokens) if lexical else 0,
        )
        model = Decoder(config, seed=1)
        with torch.no_grad():
            if model.guidance is not None:
                model.guidance.level_weights.copy_(torch.tensor([0.9, 1.1, 0.6]))
            if lexical:
                model.guidance.set_lexicon(lexicon)
        builder = PromptBuilder(tokenizer, config.level_offsets, max_history=2)
        trie = Trie.from_tokens(table.tokens, sizes).with_items(encoder.encode_items(item_text(catalog))[index.item_rows], index.offsets)
        return Retriever(model, builder, trie, index, table, encoder, support="trie" if sharpness else "level")

    return make
