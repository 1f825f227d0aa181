"""The text vocabulary: deterministic, closed over all text, and deaf to markers typed by shoppers."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from tokenizers.decoders import ByteLevel

from genrecall.generator.tokenizer import MARKERS, MAX_PROFILE_VALUES, QueryTokenizer, TokenizerError

TITLES = ["Simpson Strong-Tie 12-Gauge Angle", "Delta Vero 1-Handle Shower Faucet", "angle bracket 90 degree", "shower faucet chrome"] * 3
TOKENIZER = QueryTokenizer.train(TITLES, 400, genders=["f", "m", None, "f"], age_bands=["18-24", None])


def ids_of(text: str, max_tokens: int = 64) -> list[int]:
    ids, offsets = TOKENIZER.encode_batch([text], max_tokens)
    assert offsets.tolist() == [0, len(ids)]
    return ids.tolist()


def text_of(ids: list[int]) -> str:
    return str(ByteLevel().decode([TOKENIZER._tokenizer.id_to_token(token) for token in ids])).strip()


def test_markers_come_first_and_profile_values_get_a_token_each():
    assert [TOKENIZER._tokenizer.token_to_id(marker) for marker in MARKERS] == list(range(7))
    assert (TOKENIZER.genders, TOKENIZER.age_bands) == (("f", "m"), ("18-24",))
    assert [TOKENIZER.gender_id("f"), TOKENIZER.gender_id(" M "), TOKENIZER.age_band_id("18-24")] == [7, 8, 9]


@pytest.mark.parametrize("value", [None, "", "unseen"])
def test_unknown_profile_values_have_no_token(value):
    assert TOKENIZER.gender_id(value) == TOKENIZER.age_band_id(value) == -1


def test_the_order_of_the_texts_changes_nothing():
    assert QueryTokenizer.train(TITLES[::-1], 400, genders=["m", "f", "f"], age_bands=["18-24"]).to_json() == TOKENIZER.to_json()


@pytest.mark.parametrize("text", ["angle", "shower faucet 90", "日本語 ähnlich", "simpson strong-tie 12-gauge"])
def test_lower_case_text_survives_the_round_trip(text):
    assert text_of(ids_of(text)) == text


def test_case_width_and_spacing_do_not_matter():
    assert ids_of("  Angle\tBRACKET ") == ids_of("angle bracket") == ids_of("ａｎｇｌｅ bracket")


@pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase(), normalizers.BertNormalizer(), normalizers.NFKC()])
def test_a_foreign_tokenizer_is_not_taken_to_fold_what_it_may_read(tmp_path, normalizer):
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE())
    if normalizer is not None:
        foreign.normalizer = normalizer
    foreign.save(str(tmp_path / "tokenizer.json"))
    assert not QueryTokenizer.from_pretrained(tmp_path).folds_text
    assert TOKENIZER.folds_text
    assert QueryTokenizer.from_json(TOKENIZER.to_json()).folds_text


def test_letters_and_digits_never_share_a_token():
    pieces = [TOKENIZER._tokenizer.id_to_token(token) for token in ids_of("90degree 12-gauge")]
    assert not any(any(c.isdigit() for c in piece) and any(c.isalpha() and c != "Ġ" for c in piece) for piece in pieces)


def test_a_marker_in_a_query_is_read_as_text():
    for marker in (*MARKERS, "[GENDER=f]"):
        assert min(ids_of(f"angle {marker}")) > 9
    assert text_of(ids_of("[ANSWER]")) == "[answer]"


def test_texts_are_cut_to_the_limit_and_an_empty_text_has_no_tokens():
    assert len(ids_of("x" * 10_000, 32)) == 32
    assert len(ids_of("angle bracket " * 1000, 32)) == 32
    assert ids_of("") == ids_of(" \n ") == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5))
def test_encoding_by_words_equals_the_library_on_whole_texts(texts):
    ids, offsets = TOKENIZER.encode_batch(texts, 1000)
    for row, text in enumerate(texts):
        whole = TOKENIZER._tokenizer.encode(" " + " ".join(text.split()), add_special_tokens=False).ids if text.strip() else []
        assert ids[offsets[row] : offsets[row + 1]].tolist() == whole


def test_saved_tokenizers_read_back_equal(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = QueryTokenizer.load(tmp_path / "tokenizer.json")
    assert again.to_json() == TOKENIZER.to_json()
    assert again.encode_batch(["[ANSWER] angle"], 9)[0].tolist() == ids_of("[ANSWER] angle", 9)


def test_a_site_with_many_age_bands_keeps_the_most_frequent():
    bands = [str(age) for age in range(100)] + ["77"]
    tokenizer = QueryTokenizer.train(TITLES, 400, age_bands=bands)
    assert len(tokenizer.age_bands) == MAX_PROFILE_VALUES
    assert "77" in tokenizer.age_bands


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match=r"expected at least 263 .*got 200"):
        QueryTokenizer.train(TITLES, 200)


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer here; expected a tokenizer\.json"):
        QueryTokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json .*rerun jobs/train_generator"):
        QueryTokenizer.load(tmp_path / "tokenizer.json")


def test_a_foreign_tokenizer_without_markers_is_refused_and_from_pretrained_adds_them(tmp_path):
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE())
    foreign.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"missing \[PAD\]"):
        QueryTokenizer.load(tmp_path / "tokenizer.json")
    assert QueryTokenizer.from_pretrained(tmp_path, genders=["f"]).gender_id("f") == 7
