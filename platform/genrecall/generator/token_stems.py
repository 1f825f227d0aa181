"""Which tokens of the text vocabulary say the same word: those whose text has one Snowball stem, with or without the space before it.

For guidance (`generator/guidance.py`), which counts the words that query and item share: "drills" and " drill" are one token there. A word that the
vocabulary cuts into pieces is compared piece by piece. The decoder itself reads tokens as they are.
"""

from __future__ import annotations

import numpy as np
import Stemmer
from numpy.typing import NDArray
from tokenizers import decoders

from genrecall.generator.tokenizer import QueryTokenizer

LANGUAGES = tuple(Stemmer.algorithms())
"""Snowball's."""


def token_stems(tokenizer: QueryTokenizer, language: str) -> NDArray[np.int32]:
    """For each token id the lowest one that has the same stem, int32 [V]; markers, and tokens that are no text by themselves, have their own.

    Args:
        language: one of `LANGUAGES`.

    Raises:
        KeyError: an unknown language.
    """
    stemmer, decoder = Stemmer.Stemmer(language), decoders.ByteLevel()
    stems = np.arange(tokenizer.vocab_size, dtype=np.int32)
    first: dict[str, int] = {}
    for identity, token in enumerate(tokenizer.tokens()):
        word = "" if token is None else decoder.decode([token]).strip()
        if word and "\ufffd" not in word:  # not part of a character
            stems[identity] = first.setdefault(stemmer.stemWord(word) if word.isalpha() else word, identity)
    return stems
