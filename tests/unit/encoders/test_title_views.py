from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from genrecall.encoders.ngram_hash import words_of
from genrecall.encoders.title_views import _edit, misspell, query_view


def test_each_kind_of_edit():
    assert _edit("bracket", 0, 3, "z") == "braket"
    assert _edit("bracket", 1, 3, "z") == "brazket"
    assert _edit("bracket", 2, 3, "z") == "braccket"
    assert _edit("bracket", 3, 3, "z") == "brcaket"


def test_short_words_and_numbers_are_never_misspelt():
    assert misspell("3 in lag 2x4 1000", np.random.default_rng(0), misspelling_rate=1.0) == "3 in lag 2x4 1000"


@given(word=st.text(alphabet="abcdefghij", min_size=4, max_size=12), seed=st.integers(0, 1000))
def test_a_misspelling_keeps_the_first_letter_or_swaps_it_and_changes_the_length_by_one_at_most(word, seed):
    wrong = misspell(word, np.random.default_rng(seed), misspelling_rate=1.0)
    assert abs(len(wrong) - len(word)) <= 1
    assert word[0] in wrong[:2]


@given(seed=st.integers(0, 1000), max_words=st.integers(1, 6))
def test_a_view_holds_distinct_words_of_the_item_and_no_more_than_asked_for(seed, max_words):
    view = query_view("Zinc angle bracket angle 4in", ["simpson"], np.random.default_rng(seed), max_words=max_words, misspelling_rate=0.0).split()
    assert 1 <= len(view) <= max_words
    assert len(set(view)) == len(view)
    assert set(view) <= {*words_of("Zinc angle bracket 4in"), "simpson"}


def test_a_view_of_an_item_without_words_is_empty():
    assert query_view("--", [], np.random.default_rng(0), max_words=3, misspelling_rate=0.5) == ""


def test_the_same_generator_gives_the_same_view():
    views = [query_view("Zinc angle bracket for timber", ["simpson"], np.random.default_rng(5), max_words=4, misspelling_rate=0.5) for _ in range(2)]
    assert views[0] == views[1]
