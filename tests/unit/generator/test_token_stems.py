"""Tokens that say the same word: by hand on a small vocabulary, and what must hold for any token."""

from __future__ import annotations

import numpy as np
import pytest

from genrecall.generator.token_stems import token_stems
from genrecall.generator.tokenizer import MARKERS, QueryTokenizer

WORDS = ["cordless", "drill", "drills", "drilling", "12", "m12", "bücher", "buch", "häuser", "haus"]
TOKENIZER = QueryTokenizer.train([f"{one} {other}" for one in WORDS for other in WORDS], 500, genders=["f"])


def counts_as(text: str, language: str = "english") -> str:
    """The token that a text of a single token counts as, as it is spelt."""
    ids, _ = TOKENIZER.encode_batch([text], 8)
    assert len(ids) == 1, f"{text!r} is not one token: {[TOKENIZER.tokens()[token] for token in ids]}"
    return str(TOKENIZER.tokens()[token_stems(TOKENIZER, language)[ids[0]]])


def test_words_of_one_stem_count_as_one_token() -> None:
    assert counts_as("drill") == counts_as("drills") == counts_as("drilling")
    assert counts_as("drill") != counts_as("cordless")
    assert counts_as("häuser", "german") == counts_as("haus", "german")
    assert counts_as("häuser") != counts_as("haus")


def test_a_space_before_a_token_makes_no_difference() -> None:
    stems, tokens = token_stems(TOKENIZER, "english"), TOKENIZER.tokens()
    pairs = [(tokens.index(token[1:]), identity) for identity, token in enumerate(tokens) if token and token.startswith("Ġ") and token[1:] in tokens]
    assert {tokens[inside] for inside, _ in pairs} >= {"m", "12"}
    assert all(stems[inside] == stems[after] for inside, after in pairs)


def test_every_token_counts_as_one_that_counts_as_itself() -> None:
    stems = token_stems(TOKENIZER, "english")
    assert stems.dtype == np.int32
    assert np.array_equal(stems[stems], stems)
    assert (stems <= np.arange(TOKENIZER.vocab_size)).all()
    special = [*range(len(MARKERS)), TOKENIZER.gender_id("f")]
    assert [TOKENIZER.tokens()[identity] for identity in special] == [None] * len(special)
    assert stems[special].tolist() == special
    assert not set(stems.tolist()) - set(special) & set(special)
    pieces = [identity for identity, token in enumerate(TOKENIZER.tokens()) if token in ("Ã", "¤", "¼", "Ġ")]  # bytes of a letter, and a space
    assert len(pieces) == 4
    assert stems[pieces].tolist() == pieces


def test_an_unknown_language_is_an_error() -> None:
    with pytest.raises(KeyError):
        token_stems(TOKENIZER, "klingon")
