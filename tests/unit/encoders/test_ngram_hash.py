from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.encoders.ngram_hash import MAX_WORD_CHARS, MAX_WORDS, NgramBatch, hash_ngrams, ragged_positions, words_of

MASK = 2**64 - 1


def plain_mix(value: int) -> int:
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def plain_buckets(text: str, num_buckets: int) -> list[int]:
    """The same n-grams by plain Python integers, word by word."""
    words = words_of(text)
    hashes = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in words]
    found = []
    for place, word in enumerate(words):
        marked = f" {word} "
        found.append(hashes[place])
        for a, b, c in zip(marked, marked[1:], marked[2:], strict=False):
            found.append(plain_mix((ord(a) << 42 | ord(b) << 21 | ord(c)) ^ 0xD1B54A32D192ED03))
        if place + 1 < len(words):
            found.append(plain_mix((hashes[place] * 3 + hashes[place + 1] + 0x9E3779B97F4A7C15) & MASK))
    return [value % num_buckets for value in found]


def buckets_of(batch: NgramBatch) -> list[list[int]]:
    return [batch.buckets[start:end].tolist() for start, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]


def test_words_are_lower_case_and_letters_stand_apart_from_digits():
    assert words_of("DeWalt 20V-Max 3/4in. Drill") == ["dewalt", "20", "v", "max", "3", "4", "in", "drill"]


def test_words_fold_accents_and_compatibility_forms():
    assert words_of("Café ½ Straße ＤＲＩＬＬ") == ["cafe", "1", "2", "strasse", "drill"]


def test_each_chinese_character_is_a_word_so_pairs_are_character_bigrams():
    assert words_of("红色手机壳 iPhone15") == ["红", "色", "手", "机", "壳", "iphone", "15"]


def test_words_of_scripts_with_vowel_signs_stay_whole():
    assert words_of("हिन्दी किताब") == ["हिन्दी", "किताब"]


def test_long_texts_and_words_are_cut():
    words = words_of("x" * 100 + " word" * 10_000)
    assert len(words) == MAX_WORDS
    assert len(words[0]) == MAX_WORD_CHARS


def test_buckets_are_these_on_every_machine():
    golden = [
        [7667, 32144, 37046, 37346, 60809, 56202, 26707, 3936, 40516, 3833, 50649, 49914, 37732, 22710, 51581],
        [],
        [44037, 11510, 36729, 50787, 33384],
    ]
    assert buckets_of(hash_ngrams(["angle bracket", "", "手机"], 65536)) == golden


def test_a_word_gives_itself_its_trigrams_and_the_pair_it_opens():
    # "ab c": word ab, " ab", "ab ", pair (ab, c), word c, " c ".
    assert np.diff(hash_ngrams(["ab c"], 1000).offsets).tolist() == [6]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=6), num_buckets=st.sampled_from([1, 257, 65536, 2**31]))
def test_vectorised_hash_equals_plain_python(texts, num_buckets):
    batch = hash_ngrams(texts, num_buckets)
    assert buckets_of(batch) == [plain_buckets(text, num_buckets) for text in texts]


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=6), data=st.data())
def test_take_gives_the_rows_asked_for(texts, data):
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=8))
    taken = hash_ngrams(texts, 4096).take(np.array(rows, np.int64))
    assert buckets_of(taken) == buckets_of(hash_ngrams([texts[row] for row in rows], 4096))


def test_word_order_changes_only_the_pairs():
    ab, ba = (set(row) for row in buckets_of(hash_ngrams(["red lamp", "lamp red"], 2**31)))
    assert len(ab ^ ba) == 2
    assert len(ab & ba) == 2 + 3 + 4  # two words, trigrams of "red" and of "lamp"


def test_texts_without_words_have_no_ngrams():
    batch = hash_ngrams(["", "  ", "?!-_", "\x00"], 100)
    assert len(batch) == 4
    assert len(batch.buckets) == 0
    assert batch.offsets.tolist() == [0, 0, 0, 0, 0]


def test_no_texts_give_no_rows():
    assert len(hash_ngrams([], 100)) == 0


def test_number_of_buckets_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"num_buckets: expected 1 to 2\^31, got 0"):
        hash_ngrams(["a"], 0)


def test_ragged_positions_by_hand():
    assert ragged_positions(np.array([10, 3, 7]), np.array([2, 0, 3])).tolist() == [10, 11, 7, 8, 9]


def test_ten_thousand_titles_take_well_under_two_seconds():
    titles = [f"Brand{i % 97} model {i} stainless steel angle bracket {i % 13} in. x {i % 7} ft." for i in range(10_000)]
    started = time.process_time()
    hash_ngrams(titles, 65536)
    assert time.process_time() - started < 2.0
