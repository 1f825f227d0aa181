"""Query-like views of an item made from its own words: some of them, now and then misspelt or out of order.

The idea is that of the inverse cloze task (Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question Answering", ACL 2019): a part of a
text is a free query for the whole. Shoppers type a few words with errors, so that is what a view looks like.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genrecall.encoders.ngram_hash import words_of

MIN_MISSPELT_CHARS = 4  # shorter words are mostly units, sizes and codes, where one letter changes the meaning
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def query_view(text: str, extra_words: Sequence[str], rng: np.random.Generator, *, max_words: int, misspelling_rate: float) -> str:
    """A query that the item could have been found by.

    Args:
        text: the title.
        extra_words: further words that a shopper may use for it (brand, category); as likely as the title's.
        rng: the only source of chance.
        max_words: the view has 1 to `max_words` distinct words (fewer where there are fewer).
        misspelling_rate: probability of an edit in each word of letters.

    Returns:
        The words joined by spaces, in their order three times out of four; "" where there is no word.
    """
    words = list(dict.fromkeys([*words_of(text), *extra_words]))
    if not words:
        return ""
    wanted = int(rng.integers(1, max_words + 1))
    chosen = rng.permutation(len(words))[:wanted]
    if rng.random() < 0.75:
        chosen.sort()
    return misspell(" ".join(words[place] for place in chosen), rng, misspelling_rate=misspelling_rate)


def misspell(query: str, rng: np.random.Generator, *, misspelling_rate: float) -> str:
    """The query with one edit (a letter lost, doubled, swapped with the one before or replaced) in some of its longer words."""
    words = query.split()
    for place in np.flatnonzero(rng.random(len(words)) < misspelling_rate):
        word = words[place]
        if len(word) >= MIN_MISSPELT_CHARS and word.isalpha():
            words[place] = _edit(word, int(rng.integers(4)), int(rng.integers(1, len(word))), _LETTERS[int(rng.integers(26))])
    return " ".join(words)


def _edit(word: str, kind: int, at: int, letter: str) -> str:
    """`word` with its character `at` (1 or later: first letters are rarely wrong) lost, replaced, doubled or swapped with the one before."""
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + letter + word[at + 1 :]
    if kind == 2:
        return word[:at] + word[at] + word[at:]
    return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
