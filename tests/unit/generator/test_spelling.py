"""What is corrected and what is left alone, by hand; and what must hold for any text."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrecall.generator.spelling import LEAST_QUERIES, SpellingCorrector, SpellingError, words_of

ITEMS = {
    "shower": 40,
    "curtain": 30,
    "vanity": 20,
    "light": 30,
    "toilet": 25,
    "powder": 12,
    "power": 60,
    "tool": 50,
    "tile": 30,
    "grout": 3,
    "rare": 2,
    "größe": 5,
    "lamp": 9,
    "lasp": 3,
    "gardenia": 5,
    "garden": 40,
    "ants": 20,
    "pan": 30,
    "span": 15,
    "art": 11,
    "part": 90,
    "said": 0,
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
        ("lazp", "lamp"),  # one slip from both; more items hold it
        ("gardenants", "garden ants"),  # two words come before a word two slips away
        ("spanart", "span art"),  # not "spa nart"
        ("panpart", "pan part"),
        ("grösse", "größe"),
        (unicodedata.normalize("NFD", "grösse"), "größe"),
        ("ｓｈｗｏｅｒ", "shower"),
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
        "said",  # none does, but it is known to be right
        "excavator",  # nothing is near
        "til tol",  # too short to say
        "tmle1 24toilit x_toilit",  # model numbers
        "grouttile",  # too few items hold "grout" for half a word
        "rarw",  # what is near is held by too few
        unicodedata.normalize("NFD", "größe"),
        "ｓｈｏｗｅｒ",  # right, so it stays as it is typed
        "水龙头水龙 กระเป๋าเดิน ກະເປົາ トイレ 々々々々 दीवार ㄅㄆㄇㄈ 𠀀𠀁𠀂𠀃",
        "shower's end",
        "",
    ],
)
def test_what_is_right_or_nobody_can_tell_is_left_alone(spelling: SpellingCorrector, typed: str) -> None:
    assert spelling.corrected(typed) == typed


def test_a_word_two_slips_away_is_the_last_resort() -> None:
    assert SpellingCorrector({"gardenia": 99}).corrected("gardenants") == "gardenants"  # three slips
    near = {"gardenant": 0, "gardenings": 99}
    assert SpellingCorrector(near).corrected("gardenanys") == "gardenings"
    assert SpellingCorrector(near | {"garden": 10, "anys": 10}).corrected("gardenanys") == "garden anys"


def test_short_words_are_allowed_one_slip_and_longer_ones_two(spelling: SpellingCorrector) -> None:
    assert spelling.corrected("tixx") == "tixx"
    assert spelling.corrected("toixxt") == "toilet"


def test_words_that_come_later_are_right_but_nothing_is_corrected_to_them(spelling: SpellingCorrector) -> None:
    later = spelling.with_words(spelling.unknown_words("Toilex 3000 shower"))
    assert later.corrected("toilex toilett toilexx") == "toilex toilet toilet"
    assert spelling.corrected("toilex") == later.with_words(()).corrected("toilex") == "toilet"  # the first one is as it was
    assert later.with_words(["toilex"]) is later


def test_an_item_counts_once_for_a_word_and_only_if_it_is_counted() -> None:
    assert SpellingCorrector.of_texts(["lamp lamp lamp", "lamp"], [True] * 2).corrected("lanp") == "lanp"
    texts = ["Lamp", "lamp 2", "a lamp", "lanp"]
    assert SpellingCorrector.of_texts(texts, [True] * 4).corrected("lanp lemp") == "lanp lamp"
    assert SpellingCorrector.of_texts(texts, [True, True, False, True]).corrected("lanp lemp") == "lanp lemp"


def test_words_of_enough_queries_are_right() -> None:
    texts = ["bridge"] * 3
    queries = [f"fridge {row}" for row in range(LEAST_QUERIES)]
    assert SpellingCorrector.of_texts(texts, [True] * 3, queries).corrected("fridge bridgx") == "fridge bridge"
    assert SpellingCorrector.of_texts(texts, [True] * 3, queries[1:] * 2).corrected("fridge") == "bridge"  # different ones
    assert SpellingCorrector.of_texts(texts, [True] * 3, [*queries, "bridge"]).corrected("bridgx") == "bridge"  # a count of items stays


def test_of_many_misspelt_words_the_first_are_looked_up(spelling: SpellingCorrector) -> None:
    assert spelling.corrected(" ".join(["toilit"] * 12)) == " ".join(["toilet"] * 4 + ["toilit"] * 8)


def test_what_is_saved_reads_back(spelling: SpellingCorrector, tmp_path) -> None:
    spelling.with_words(["toilex"]).save(tmp_path / "spelling.json")
    again = SpellingCorrector.load(tmp_path / "spelling.json")
    assert again.corrected("shwoer grösse toilex said") == "shower größe toilet said"
    assert json.loads((tmp_path / "spelling.json").read_text(encoding="utf-8")) == ITEMS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b"[]", "expected an object"),
        (b'{"a": "b"}', "expected an object"),
        (b'{"a": true}', "expected an object"),
        (b'{"a": -3}', "expected an object"),
    ],
)
def test_other_files_are_refused(tmp_path, content: bytes, said: str) -> None:
    (tmp_path / "spelling.json").write_bytes(content)
    with pytest.raises(SpellingError, match=rf"spelling\.json: {said}.*rerun jobs/train_generator\.py"):
        SpellingCorrector.load(tmp_path / "spelling.json")


@st.composite
def mistyped(draw: st.DrawFn) -> str:
    """A word of the shop with letters at a place replaced by others."""
    word = draw(st.sampled_from([*ITEMS, "excavator"]))
    at, count = draw(st.integers(0, len(word))), draw(st.integers(0, 2))
    return word[:at] + draw(st.text("abcdefgo é2", max_size=2)) + word[at + count :]


@given(st.lists(mistyped(), max_size=4))
def test_what_is_written_is_a_word_of_the_shop_or_what_was_typed(words: list[str]) -> None:
    spelling = SpellingCorrector(ITEMS)
    typed = " ".join(words)
    read = spelling.corrected(typed)
    assert {*read.split()} - {*typed.split()} <= {*ITEMS}
    if len(words_of(typed)) <= 4:
        assert spelling.corrected(read) == read


@given(st.lists(mistyped(), max_size=4))
def test_case_and_compatibility_forms_make_no_difference(words: list[str]) -> None:
    spelling = SpellingCorrector(ITEMS)
    typed = " ".join(words)
    for other in (typed.upper(), unicodedata.normalize("NFD", typed)):
        if unicodedata.normalize("NFKC", other).lower() == typed:  # not so where upper case writes a letter as two
            assert unicodedata.normalize("NFKC", spelling.corrected(other)).lower() == spelling.corrected(typed)
