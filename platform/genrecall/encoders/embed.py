"""The text that stands for an item, and the vectors of a whole catalogue.

Shapes: N items, d = the encoder's `dim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genrecall.data.catalog import Catalog
from genrecall.encoders.text_encoder import TextEncoder

ITEM_EMBEDDINGS_FILE = "item_embeddings.npy"
MAX_DESCRIPTION_WORDS = 24  # a sum of n-grams is diluted by long descriptions; what tells an item apart comes first
_ROWS_AT_ONCE = 8192


def compose_item_text(title: str, brand: str = "", category_path: Sequence[str] = (), text: str = "") -> str:
    """One item's text: title, brand unless the title holds it, the last two category names, the first words of the description."""
    parts = [title]
    if brand and brand.lower() not in title.lower():
        parts.append(brand)
    parts += category_path[-2:]
    if text:
        parts.append(" ".join(text.split(None, MAX_DESCRIPTION_WORDS)[:MAX_DESCRIPTION_WORDS]))
    return " ".join(part for part in parts if part)


def item_text(catalog: Catalog) -> list[str]:
    """The text of each item in catalogue order, as encoders are trained on and read it: N strings, "" where an item has no text at all."""
    return [compose_item_text(*fields) for fields in zip(catalog.titles, catalog.brands, catalog.category_paths, catalog.texts, strict=True)]


def embed_catalog(encoder: TextEncoder, catalog: Catalog, folder: Path) -> Path:
    """Write the vectors of all items, in catalogue order, to `folder/item_embeddings.npy` (float32 [N, d]); a part at a time, never whole in memory."""
    texts = item_text(catalog)
    path = folder / ITEM_EMBEDDINGS_FILE
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(texts), encoder.dim))
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        vectors[start : start + _ROWS_AT_ONCE] = encoder.encode_items(texts[start : start + _ROWS_AT_ONCE])
    vectors.flush()
    return path


def load_item_embeddings(folder: Path) -> np.ndarray:
    """float32 [N, d] of an encoder artifact, memory-mapped and read-only."""
    return np.asarray(np.load(folder / ITEM_EMBEDDINGS_FILE, mmap_mode="r", allow_pickle=False))
