"""Where new items go: a bundle's own frozen encoder and codebooks give each a published SID, and say how well it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genrecall.encoders.embed import compose_item_text
from genrecall.generator.lexicon import LEXICON_TOKENS
from genrecall.quantization.residual_quantizer import load_quantizer
from genrecall.registry.bundle import Bundle
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.sid.assign import load_assigner

_SAMPLE = 2048
_NO_WORDS: frozenset[str] = frozenset()


class Fit(NamedTuple):
    """Where n items go, and how well they fit: SID rows int32 [n], vectors float32 [n, d], squared errors float32 [n], whether the category is unknown, bool [n]."""

    sid_rows: NDArray[np.int32]
    vectors: NDArray[np.float32]
    errors: NDArray[np.float32]
    unknown: NDArray[np.bool_]


class Placed(NamedTuple):
    """Where records go, and what a search needs of them: their vectors in `fit`, their text tokens as its lexicon has them, and the words that its
    spelling corrector does not know."""

    fit: Fit
    tokens: list[NDArray[np.integer]]
    new_words: list[frozenset[str]]


class ItemPlacer:
    """A bundle's frozen encoder and codebooks.

    Raises:
        QuantizerError, AssignError: parts that do not belong together.
    """

    def __init__(self, bundle: Bundle) -> None:
        folder = bundle.artifact.path
        self._retriever = bundle.retriever
        self._quantizer = load_quantizer(folder / "quantizer")
        self._assigner = load_assigner(quantizer=folder / "quantizer", sid_index=folder / "sid_index")
        self.catalogue_error = self._mean_error(bundle)
        """Mean squared distance of the latents of a sample of the bundle's items from their codes."""

    def place(self, records: Sequence[ItemRecord]) -> Placed:
        """The places of n records."""
        texts = [compose_item_text(one.title, one.brand, one.category_path, one.text) for one in records]
        ids, offsets = self._retriever.prompt_builder.tokenizer.encode_batch(texts, LEXICON_TOKENS)
        guidance = self._retriever.model.guidance
        words = ids if guidance is None else guidance.lexicon_ids(ids)
        spelling = self._retriever.prompt_builder.spelling
        new_words = [_NO_WORDS if spelling is None else spelling.unknown_words(text) for text in texts]
        return Placed(self.fit(texts, [one.category_path for one in records]), np.split(words, offsets[1:-1]), new_words)

    def fit(self, texts: Sequence[str], paths: Sequence[tuple[str, ...]]) -> Fit:
        """Where n items go, by their texts (see `compose_item_text`) and category paths, root first."""
        assert self._retriever.encoder is not None, "a bundle has its encoder"
        vectors = np.asarray(self._retriever.encoder.encode_items(texts), dtype=np.float32)
        codes, residuals = self._quantizer.place(vectors, paths)
        return Fit(self._assigner.assign_placed(codes, residuals), vectors, np.square(residuals).sum(axis=1, dtype=np.float32), self._unknown(paths))

    def _unknown(self, paths: Sequence[tuple[str, ...]]) -> NDArray[np.bool_]:
        """Whether an item names a category that no item of the bundle has or is below, bool [n]; by the quantiser's categories without posting lists."""
        distinct = sorted({path for path in paths if path})
        if self._retriever.filters is not None:
            ranges = self._retriever.filters.postings.categories.ranges(distinct)
            known = ranges[:, 0] < ranges[:, 1]
        elif self._quantizer.categories is not None:
            known = self._quantizer.categories.codes_of(distinct) >= 0
        else:
            known = np.ones(len(distinct), dtype=np.bool_)
        known_of = {**dict(zip(distinct, known.tolist(), strict=True)), (): True}
        return np.array([not known_of[path] for path in paths], dtype=np.bool_)

    def _mean_error(self, bundle: Bundle) -> float:
        """Of evenly spaced items; by the vectors that the trie holds, or, where it holds none, of their texts less the descriptions."""
        base = bundle.base_index
        rows = base.item_rows if base.num_published else np.arange(base.num_items, dtype=np.int32)
        places = np.arange(min(_SAMPLE, len(rows))) * len(rows) // max(min(_SAMPLE, len(rows)), 1)
        if not len(places):
            return 0.0
        shown = bundle.shown(rows[places])
        held = bundle.retriever.trie.item_vectors
        if held is not None and base.num_published:
            vectors = held[places.tolist()].float().cpu().numpy()
        else:
            assert bundle.retriever.encoder is not None, "a bundle has its encoder"
            vectors = bundle.retriever.encoder.encode_items([compose_item_text(one["title"], one["brand"], one["category_path"]) for one in shown])
        _, residuals = self._quantizer.place(vectors, [one["category_path"] for one in shown])
        return float(np.square(residuals).sum(axis=1).mean())
