"""What is corrected and what is left alone, by hand; and what must hold for any text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecall.generator.spelling import SpellingCorrector, SpellingError

ITEMS = {
    "shower": 40,
    "curtain": 30,
    "vanity": 20,
    "light": 30,
    "lighting": 9,
    "toilet": 25,
    "powder": 12,
    "power": 60,
    "tool": 50,
    "tile": 30,
    "grout": 3,
    "rare": 2,
    "größe": 5,
}


@pytest.fixture
def spelling() -> SpellingCorrector:
    return SpellingCorrector(ITEMS)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("shwoer curtian", "shower curtain"),  # neighbours swapped
        ("showr curtaain lught", "shower curtain light"),  # a letter missing, added, wrong
        ("VANTIY  Lihgt, 24", "vanity  light, 24"),
        ("vannitty", "vanity"),  # two slips
        ("powertool", "power tool"),
        ("powerr", "power"),  # one slip comes before two words, and "powder" has fewer items
        ("grösse", "größe"),
        ("shower's end", "shower's end"),
    ],
)
def test_slips_are_corrected(spelling: SpellingCorrector, typed: str, read: str) -> None:
    assert spelling.corrected(typed) == read


@pytest.mark.parametrize(
    "typed",
    [
        "shower curtain",
        "Shower CURTAIN",
        "rare",  # an item holds it
        "excavator",  # nothing is near
        "til tol",  # too short to say
        "tmle1 24toilit x_toilit",  # model numbers
        "grouttile",  # too few items hold "grout" for half a word
        "rarw",  # what is near is held by too few
        "水龙头水龙",
        "",
    ],
)
def test_what_is_right_or_nobody_can_tell_is_left_alone(spelling: SpellingCorrector, typed: str) -> None:
    assert spelling.corrected(typed) == typed


def test_short_words_are_allowed_one_slip_and_longer_ones_two(spelling: SpellingCorrector) -> None:
    assert spelling.corrected("tixx") == "tixx"
    assert spelling.corrected("toixxt") == "toilet"


def test_words_that_come_later_are_right_but_nothing_is_corrected_to_them(spelling: SpellingCorrector) -> None:
    assert spelling.corrected("toilex toilett") == "toilet toilet"
    spelling.learn(["Toilex 3000 seat"] * 5)
    assert spelling.corrected("toilex toilett toilexx") == "toilex toilet toilet"


def test_an_item_counts_once_for_a_word() -> None:
    assert SpellingCorrector.of_texts(["lamp lamp lamp", "lamp"]).corrected("lanp") == "lanp"
    assert SpellingCorrector.of_texts(["Lamp", "lamp 2", "a lamp"]).corrected("lanp") == "lamp"


def test_of_many_misspelt_words_the_first_are_looked_up(spelling: SpellingCorrector) -> None:
    assert spelling.corrected(" ".join(["toilit"] * 12)) == " ".join(["toilet"] * 8 + ["toilit"] * 4)


def test_what_is_saved_reads_back(spelling: SpellingCorrector, tmp_path) -> None:
    spelling.learn(["toilex"])
    spelling.save(tmp_path / "spelling.json")
    again = SpellingCorrector.load(tmp_path / "spelling.json")
    assert again.corrected("shwoer grösse toilex") == "shower größe toilet"
    assert json.loads((tmp_path / "spelling.json").read_text()) == ITEMS


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "expected an object"), ('{"a": "b"}', "expected an object")])
def test_other_files_are_refused(tmp_path, text: str, said: str) -> None:
    (tmp_path / "spelling.json").write_text(text)
    with pytest.raises(SpellingError, match=rf"spelling\.json: {said}.*rerun jobs/train_generator\.py"):
        SpellingCorrector.load(tmp_path / "spelling.json")


@st.composite
def mistyped(draw: st.DrawFn) -> str:
    """A word of the shop with letters at a place replaced by others."""
    word = draw(st.sampled_from([*ITEMS, "excavator"]))
    at, count = draw(st.integers(0, len(word))), draw(st.integers(0, 2))
    return word[:at] + draw(st.text("abcdefgo é2", max_size=2)) + word[at + count :]


@given(st.lists(mistyped(), max_size=8))
def test_what_is_written_is_a_word_of_the_shop_or_what_was_typed(words: list[str]) -> None:
    spelling = SpellingCorrector(ITEMS)
    typed = " ".join(words)
    read = spelling.corrected(typed)
    assert {*read.split()} - {*typed.split()} <= {*ITEMS}
    if len(typed.split()) <= 8:
        assert spelling.corrected(read) == read
