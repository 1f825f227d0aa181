"""Misspelt words of a query, corrected by the catalogue's own words before the query becomes tokens.

A query's word counts as misspelt where no item's text holds it and hardly a training query does. Three things are tried, in this order: a word one
slip away, two words written as one, a word two slips away; a slip is a missing, added or wrong letter, or two neighbours swapped (optimal string
alignment distance). Among equals the word that more items hold wins. Words of few letters, words with digits (model numbers) and scripts other than
Latin, Greek and Cyrillic are left alone.

The encoder reads what was typed: its character n-grams bridge slips by themselves.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rapidfuzz.distance import OSA
from rapidfuzz.process import extractOne

LEAST_LETTERS = 4
"""Shorter words are left alone."""

LEAST_QUERIES = 5
"""A word that so many training queries hold is right even where no item holds it: shoppers' words are learnt from their clicks."""

_LETTERS_FOR_TWO_SLIPS = 6
_LEAST_ITEMS, _LEAST_LETTERS_FOUND = 3, 3
"""What a word must have to be written in place of another."""

_LEAST_ITEMS_OF_HALF, _LEAST_LETTERS_OF_HALF = 10, 3
"""What each of two words must have to be found in one."""

_MOST_WORDS = 50_000
"""Words that are looked through for a misspelt one, those that most items hold."""

_MOST_LOOKUPS = 4
"""Misspelt words of a text that are looked up, the first ones; each takes a search through the words of about its length."""

_REMEMBERED = 1 << 14

_MARK = r"\w\u0300-\u036f"
_LETTER = "A-Za-zªºÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿḀ-ỿἀ-῿"
_WORD = re.compile(f"(?<![{_MARK}])[{_LETTER}]+(?![{_MARK}])")


class SpellingError(ValueError):
    """A file that is not a corrector's."""


class _Vocabulary:
    """Words by how many items hold them; what a word is corrected to depends on nothing else, and is remembered."""

    def __init__(self, items_of_word: Mapping[str, int]) -> None:
        self.items_of_word = dict(sorted(items_of_word.items(), key=lambda entry: (-entry[1], entry[0])))
        frequent = (word for word, items in self.items_of_word.items() if items >= _LEAST_ITEMS and len(word) >= _LEAST_LETTERS_FOUND)
        self._rank = {word: rank for rank, (word, _) in enumerate(zip(frequent, range(_MOST_WORDS), strict=False))}
        self._by_length: dict[int, list[str]] = {}
        for word in self._rank:
            self._by_length.setdefault(len(word), []).append(word)
        self.correction = functools.lru_cache(maxsize=_REMEMBERED)(self._find)

    def _find(self, word: str) -> str | None:
        """What a misspelt word is corrected to; None where nothing is near."""
        slips = 1 if len(word) < _LETTERS_FOR_TWO_SLIPS else 2
        found = [
            (int(best[1]), self._rank[best[0]], best[0])
            for length in range(len(word) - slips, len(word) + slips + 1)
            if (best := extractOne(word, self._by_length.get(length, ()), scorer=OSA.distance, score_cutoff=slips)) is not None  # the first of equals
        ]
        distance, _, nearest = min(found, default=(slips + 1, 0, None))
        return nearest if distance <= 1 else self._two_words(word) or nearest

    def _two_words(self, word: str) -> str | None:
        """The word as two; of several ways the one whose rarer word most items hold."""
        best, most = None, _LEAST_ITEMS_OF_HALF - 1
        for at in range(_LEAST_LETTERS_OF_HALF, len(word) - _LEAST_LETTERS_OF_HALF + 1):
            halves = word[:at], word[at:]
            items = min(self.items_of_word.get(half, 0) for half in halves)
            if items > most:
                best, most = " ".join(halves), items
        return best


class SpellingCorrector:
    """The words of a catalogue. Nothing changes it; `with_words` makes another over the same vocabulary.

    Args:
        items_of_word: lower-case word -> how many items hold it; 0 for one that is right though none does.
    """

    def __init__(self, items_of_word: Mapping[str, int]) -> None:
        self._vocabulary = _Vocabulary(items_of_word)
        self._later: frozenset[str] = frozenset()

    @classmethod
    def of_texts(cls, texts: Sequence[str], counted: Iterable[bool], queries: Iterable[str] = ()) -> SpellingCorrector:
        """From N items' texts and the training queries.

        Args:
            texts: N strings, whose words are right.
            counted: N, whether an item's words may be written in place of others.
            queries: a word that `LEAST_QUERIES` different ones hold is right.
        """
        items, said = Counter[str](), Counter(word for query in set(queries) for word in words_of(query))
        for text, counts in zip(texts, counted, strict=True):
            items.update(dict.fromkeys(words_of(text), int(counts)))
        return cls({word: 0 for word, count in said.items() if count >= LEAST_QUERIES} | items)

    def with_words(self, words: Iterable[str]) -> SpellingCorrector:
        """The corrector to which these lower-case words are right too, but none is corrected to them: those of items that came later."""
        later = frozenset(words)
        if later == self._later:
            return self
        changed = SpellingCorrector.__new__(SpellingCorrector)
        changed._vocabulary, changed._later = self._vocabulary, later
        return changed

    def unknown_words(self, text: str) -> frozenset[str]:
        """Those of the text that the catalogue's own vocabulary does not have."""
        return frozenset(word for word in words_of(text) if word not in self._vocabulary.items_of_word)

    def corrected(self, text: str) -> str:
        """The text with its misspelt words corrected, NFKC-normalised and corrected words in lower case; the very text where there is nothing to correct."""
        lookups_left, changed = _MOST_LOOKUPS, False

        def replacement(match: re.Match[str]) -> str:
            nonlocal lookups_left, changed
            word = match.group().lower()
            if len(word) < LEAST_LETTERS or word in self._vocabulary.items_of_word or word in self._later or not lookups_left:
                return match.group()
            lookups_left -= 1
            found = self._vocabulary.correction(word)
            changed = changed or found is not None
            return found or match.group()

        read = _WORD.sub(replacement, unicodedata.normalize("NFKC", text))
        return read if changed else text

    def save(self, path: Path) -> None:
        """Write `path`, a JSON object of words and the items that hold them; those of `with_words` are not in it."""
        path.write_text(json.dumps(self._vocabulary.items_of_word, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SpellingCorrector:
        """Read what `save` wrote.

        Raises:
            SpellingError: not such a file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SpellingError(f"{path}: not JSON ({error}); rerun jobs/train_generator.py") from error
        if not isinstance(found, dict) or not all(type(items) is int and items >= 0 for items in found.values()):
            raise SpellingError(f"{path}: expected an object of words and numbers of items; rerun jobs/train_generator.py")
        return cls(found)


def words_of(text: str) -> set[str]:
    """The words of a text that can be told right from wrong, in lower case."""
    return {match.group().lower() for match in _WORD.finditer(unicodedata.normalize("NFKC", text))}
