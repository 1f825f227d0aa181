"""Text to hashed n-grams: words, pairs of neighbouring words and character trigrams, each with a bucket number.

Source: Nigam et al., "Semantic Product Search" (KDD 2019), section 4.3: a bag of word unigrams, word bigrams and character trigrams, with
words outside the vocabulary hashed to bins. Deviations: there is no vocabulary at all, every n-gram is hashed; letters and digits are separate
words ("4ft" is "4 ft"); each Chinese or Japanese character is a word, so that the pairs are the usual character bigrams.

The hash depends on nothing but the text (blake2b for words, a fixed 64-bit mixer for the rest): a text has the same buckets on every machine.
All work is per distinct word of a call; the assembly is vectorised over all texts.

Shapes: n texts, M n-grams of all texts together.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HASH_VERSION = 1  # stored with every encoder; a change of anything below that moves a bucket raises it

MAX_WORDS = 128  # per text; the rest is not read
MAX_WORD_CHARS = 32  # per word; longer ones are cut
_MAX_CHARS = 8 * 1024  # per text, before anything else, so that a hostile query costs no more than a long one

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Vowel signs and other marks of scripts whose words need them; Python's \w leaves them out.
_MARKS = "\u0591-\u05c7\u064b-\u065f\u0900-\u109f\u1780-\u17d3"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|(?:[^\W\d_{_IDEOGRAPHS}]|[{_MARKS}])+|\d+")
_ASCII_WORD = re.compile(r"[a-z]+|[0-9]+")
_ACCENTS = re.compile("[\u0300-\u036f]")

_PAIR_SALT = np.uint64(0x9E3779B97F4A7C15)
_TRIGRAM_SALT = np.uint64(0xD1B54A32D192ED03)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_BOUNDARY = ord(" ")  # never inside a word


@dataclass(frozen=True)
class NgramBatch:
    """The n-grams of some texts, text after text.

    Attributes:
        buckets: int64 [M], in [0, num_buckets).
        offsets: int64 [n + 1]; text i has `buckets[offsets[i]:offsets[i + 1]]`, none where the text holds no word.
    """

    buckets: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> NgramBatch:
        """The texts at `rows` (int [m]), in that order."""
        starts, lengths = self.offsets[rows], self.offsets[np.asarray(rows) + 1] - self.offsets[rows]
        return NgramBatch(self.buckets[ragged_positions(starts, lengths)], _offsets_of(lengths))


def words_of(text: str) -> list[str]:
    """The normalised words of a text: compatibility forms folded, lower case, accents off, letters and digits apart.

    At most `MAX_WORDS` words of `MAX_WORD_CHARS` characters each.
    """
    text = text[:_MAX_CHARS]
    if text.isascii():
        words = _ASCII_WORD.findall(text.lower())
    else:
        folded = unicodedata.normalize("NFKC", _ACCENTS.sub("", unicodedata.normalize("NFKD", text))).casefold()
        words = _WORD.findall(folded)
    return [word[:MAX_WORD_CHARS] for word in words[:MAX_WORDS]]


def hash_ngrams(texts: Sequence[str], num_buckets: int) -> NgramBatch:
    """Words, word pairs and character trigrams (with word boundaries) of each text, as bucket numbers.

    Args:
        texts: n texts of any length.
        num_buckets: size of the table that the numbers index, at most 2^31.

    Returns:
        The n-grams of each text; for word after word: the word, its trigrams, the pair it opens.
    """
    if not 0 < num_buckets <= 2**31:
        raise ValueError(f"num_buckets: expected 1 to 2^31, got {num_buckets}")
    distinct: dict[str, int] = {}
    word_counts = np.zeros(len(texts), np.int64)
    flat: list[int] = []
    for row, text in enumerate(texts):
        words = words_of(text)
        word_counts[row] = len(words)
        flat += [distinct.setdefault(word, len(distinct)) for word in words]
    if not flat:
        return NgramBatch(np.zeros(0, np.int64), np.zeros(len(texts) + 1, np.int64))
    vocabulary = list(distinct)
    occurrences = np.array(flat, np.int64)
    word_hashes = np.array([int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in vocabulary], np.uint64)

    # A block per distinct word: its own hash, its trigrams, and one free place for the pair that it opens.
    trigrams, word_chars = _trigrams(vocabulary)
    block_lengths = word_chars + 2
    block_starts = _offsets_of(block_lengths)[:-1]
    blocks = np.zeros(int(block_lengths.sum()), np.uint64)
    blocks[block_starts] = word_hashes
    is_trigram = np.ones(len(blocks), bool)
    is_trigram[block_starts] = False
    is_trigram[block_starts + block_lengths - 1] = False
    blocks[is_trigram] = trigrams

    lengths = block_lengths[occurrences]
    hashes = blocks[ragged_positions(block_starts[occurrences], lengths)]
    pair_places = np.cumsum(lengths) - 1
    # The word's own hash times three keeps (a, b) apart from (b, a).
    hashes[pair_places[:-1]] = _mix(word_hashes[occurrences[:-1]] * np.uint64(3) + word_hashes[occurrences[1:]] + _PAIR_SALT)
    ends = np.cumsum(word_counts)
    last_words = ends[word_counts > 0] - 1
    keep = np.ones(len(hashes), bool)
    keep[pair_places[last_words]] = False

    buckets = (hashes[keep] % np.uint64(num_buckets)).astype(np.int64)
    per_text = np.add.reduceat(lengths, (ends - word_counts)[word_counts > 0]) - 1
    text_lengths = np.zeros(len(texts), np.int64)
    text_lengths[word_counts > 0] = per_text
    return NgramBatch(buckets, _offsets_of(text_lengths))


def ragged_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [sum(lengths)]: start, start + 1, ... of each run, run after run."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    positions: np.ndarray = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return positions


def _offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _trigrams(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64) of the trigrams of " word ", word after word, and their number (int64) in each: as many as it has characters."""
    counts = np.array([len(word) for word in words], np.int64)
    points = np.frombuffer((" " + "  ".join(words) + " ").encode("utf-32-le"), np.uint32).astype(np.uint64)
    starts = ragged_positions(_offsets_of(counts + 2)[:-1], counts)
    code = points[starts] << np.uint64(42) | points[starts + 1] << np.uint64(21) | points[starts + 2]
    return _mix(code ^ _TRIGRAM_SALT), counts


def _mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: every input bit reaches every output bit."""
    values = (values ^ values >> np.uint64(30)) * _MULTIPLIERS[0]
    values = (values ^ values >> np.uint64(27)) * _MULTIPLIERS[1]
    values = values ^ values >> np.uint64(31)
    return values
