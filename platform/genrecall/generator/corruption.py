"""Cheap texts for an item: its title with words dropped, swapped and misspelt, a few of its words, its brand and type.

Source: denoising inputs as in BART (Lewis et al. 2020, token deletion and permutation), with typing slips instead of masks,
because shoppers leave words out and mistype them. Plain functions of a numpy Generator: the same seed gives the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genrecall.encoders.ngram_hash import words_of
from genrecall.encoders.title_views import misspell, query_view

_NAMES_ALONE = 1 / 4
"""Share of short texts that are brand and type, nothing else."""


def corrupt(text: str, random: np.random.Generator, *, drop: float = 0.15, misspelling_rate: float = 0.05) -> str:
    """The text with each word dropped with probability `drop` and misspelt at `misspelling_rate`, and in a third of the cases two neighbours swapped.

    At least one word stays; an empty text stays empty.
    """
    words = text.split()
    if not words:
        return ""
    kept = [word for word, draw in zip(words, random.random(len(words)), strict=True) if draw >= drop] or [words[int(random.integers(len(words)))]]
    if len(kept) > 1 and random.random() < 1 / 3:
        at = int(random.integers(len(kept) - 1))
        kept[at], kept[at + 1] = kept[at + 1], kept[at]
    return misspell(" ".join(kept), random, misspelling_rate=misspelling_rate)


def short_text(title: str, brand: str, category_path: Sequence[str], random: np.random.Generator, *, max_words: int = 4, misspelling_rate: float = 0.05) -> str:
    """What a shopper might type for the item: brand and category leaf, or one to `max_words` words of these and the title."""
    leaf = category_path[-1] if category_path else ""
    if leaf and random.random() < _NAMES_ALONE:
        return misspell(f"{brand} {leaf}".strip() if random.random() < 0.5 else leaf, random, misspelling_rate=misspelling_rate)
    return query_view(title, words_of(f"{brand} {leaf}"), random, max_words=max_words, misspelling_rate=misspelling_rate)
