"""Semantic IDs: tokens, text and the table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecall.sid.semantic_id import SidError, SidSpace, SidTable

SPACE = SidSpace((4, 3, 5), ((1, 1), (1, 2), (4, 1)))


def codes_of_one(*values):
    return np.array([values], dtype=np.int32)


def test_group_zero_keeps_the_code_as_token():
    assert SPACE.tokens_of(codes_of_one(3, 2, 4), np.array([0])).tolist() == [[3, 2, 4]]


def test_a_code_group_pair_gets_the_token_after_the_codes():
    # Level 3 has 5 codes, so the pairs (1,1), (1,2), (4,1) are tokens 5, 6, 7.
    assert SPACE.alphabet_sizes == (4, 3, 8)
    assert SPACE.tokens_of(np.array([[0, 0, 1], [0, 0, 1], [2, 1, 4]]), np.array([1, 2, 1])).tolist() == [[0, 0, 5], [0, 0, 6], [2, 1, 7]]


def test_text_names_codes_and_group():
    assert SPACE.text_of([3, 2, 4]) == "<3,2,4>"
    assert SPACE.text_of([3, 2, 6]) == "<3,2,1.2>"


@given(st.integers(0, 3), st.integers(0, 2), st.integers(0, 7))
def test_text_and_codes_lead_back_to_the_tokens(first, second, third):
    tokens = np.array([[first, second, third]], dtype=np.int32)
    assert SPACE.parse(SPACE.text_of(tokens[0])).tolist() == tokens[0].tolist()
    assert SPACE.tokens_of(*SPACE.codes_of(tokens)).tolist() == tokens.tolist()
    assert SPACE.texts_of(tokens) == [SPACE.text_of(tokens[0])]


def test_space_survives_json():
    assert SidSpace.from_json(SPACE.to_json()) == SPACE


def test_pairs_are_collected_from_what_occurs():
    codes = np.array([[0, 0, 4], [1, 2, 1], [3, 1, 1], [0, 0, 0], [2, 2, 1]], dtype=np.int32)
    assert SidSpace.with_pairs((4, 3, 5), codes, np.array([1, 2, 1, 0, 2])) == SPACE


@pytest.mark.parametrize("text", ["", "12,5,7", "<1,2>", "<1,2,3.>", "<1, 2,3>", "<1,2,-3>", "<1,2,3>x"])
def test_other_text_is_refused(text):
    with pytest.raises(SidError, match="expected a semantic ID such as"):
        SPACE.parse(text)


def test_text_out_of_range_or_with_an_unknown_group_is_refused():
    with pytest.raises(SidError, match=r"level 1: expected 0 to 3, got 4"):
        SPACE.parse("<4,0,0>")
    with pytest.raises(SidError, match=r"no pair \(code 0, group 1\)"):
        SPACE.parse("<0,0,0.1>")


def test_bad_spaces_are_refused():
    with pytest.raises(SidError, match="three sizes of at least 1"):
        SidSpace((4, 0, 5))
    with pytest.raises(SidError, match="sorted and without repeats"):
        SidSpace((4, 3, 5), ((1, 2), (1, 1)))
    with pytest.raises(SidError, match="group >= 1"):
        SidSpace((4, 3, 5), ((1, 0),))


def test_table_sorts_sids_and_points_every_item_at_its_own():
    item_tokens = np.array([[3, 0, 0], [0, 2, 7], [3, 0, 0], [0, 1, 7]], dtype=np.int32)
    table = SidTable.from_item_tokens(SPACE, item_tokens)
    assert table.tokens.tolist() == [[0, 1, 7], [0, 2, 7], [3, 0, 0]]
    assert table.item_sid.tolist() == [2, 1, 2, 0]
    assert table.tokens_of_items(np.array([[0, 1], [2, 3]])).tolist() == item_tokens.reshape(2, 2, 3).tolist()
    assert table.text(0) == "<0,1,4.1>"
    assert len(table) == 3


def test_table_refuses_tokens_outside_the_space():
    with pytest.raises(SidError, match=r"item_tokens: row 1, level 3: expected 0 to 7, got 8"):
        SidTable.from_item_tokens(SPACE, np.array([[0, 0, 0], [0, 0, 8]]))
