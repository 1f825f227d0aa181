"""Misspelt words of a query, corrected by the catalogue's own words before the query becomes tokens.

A query's word counts as misspelt where no item's text holds it. Three things are tried, in this order: a word one slip away, two words written as one, a word two slips
away; a slip is a missing, added or wrong letter, or two neighbours swapped (optimal string alignment distance). Among equals the word that more items
hold wins. Words of few letters, words beside digits (model numbers) and scripts without spaces are left alone.

The encoder reads what was typed: its character n-grams bridge slips by themselves.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from rapidfuzz.distance import OSA
from rapidfuzz.process import extractOne

LEAST_LETTERS = 4
"""Shorter words are left alone."""

_LETTERS_FOR_TWO_SLIPS = 6
_LEAST_ITEMS, _LEAST_LETTERS_FOUND = 3, 3
"""What a word must have to be written in place of another."""

_LEAST_ITEMS_OF_HALF, _LEAST_LETTERS_OF_HALF = 10, 3
"""What each of two words must have to be found in one."""

_MOST_WORDS = 50_000
"""Words that are looked through for a misspelt one, those that most items hold."""

_MOST_CORRECTIONS = 8
"""Misspelt words of a text that are looked up, the first ones."""

_REMEMBERED = 1 << 14

# Letters of scripts that put spaces between words; not next to a digit.
_WORD = re.compile(r"(?<!\w)[^\W\d_぀-ヿ㐀-䶿一-鿿ก-๛]+(?!\w)")


class SpellingError(ValueError):
    """A file that is not a corrector's."""


class SpellingCorrector:
    """The words of a catalogue.

    Args:
        items_of_word: lower-case word -> how many items hold it.
    """

    def __init__(self, items_of_word: Mapping[str, int]) -> None:
        self._items_of_word = dict(sorted(items_of_word.items(), key=lambda entry: (-entry[1], entry[0])))
        self._known = set(self._items_of_word)
        frequent = (word for word, items in self._items_of_word.items() if items >= _LEAST_ITEMS and len(word) >= _LEAST_LETTERS_FOUND)
        self._choices = [word for word, _ in zip(frequent, range(_MOST_WORDS), strict=False)]
        self._correction = functools.lru_cache(maxsize=_REMEMBERED)(self._find)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> SpellingCorrector:
        """From the text of each item."""
        return cls(Counter(word for text in texts for word in _words(text)))

    def learn(self, texts: Iterable[str]) -> None:
        """Words of items that came later: right from now on, but not written in place of others."""
        self._known.update(*map(_words, texts))

    def corrected(self, text: str) -> str:
        """The text with its misspelt words corrected, in lower case; all else stays as it is."""
        left = _MOST_CORRECTIONS

        def right(match: re.Match[str]) -> str:
            nonlocal left
            word = match.group().lower()
            if len(word) < LEAST_LETTERS or word in self._known or not left:
                return match.group()
            left -= 1
            return self._correction(word) or match.group()

        return _WORD.sub(right, text)

    def _find(self, word: str) -> str | None:
        """What a misspelt word is corrected to; None where nothing is near."""
        slips = 1 if len(word) < _LETTERS_FOR_TWO_SLIPS else 2
        found = extractOne(word, self._choices, scorer=OSA.distance, score_cutoff=slips)  # the first of equals, which more items hold
        if found is not None and found[1] <= 1:
            return str(found[0])
        return self._two_words(word) or (None if found is None else str(found[0]))

    def _two_words(self, word: str) -> str | None:
        """The word as two; of several ways the one whose rarer word most items hold."""
        best, most = None, _LEAST_ITEMS_OF_HALF - 1
        for at in range(_LEAST_LETTERS_OF_HALF, len(word) - _LEAST_LETTERS_OF_HALF + 1):
            halves = word[:at], word[at:]
            items = min(self._items_of_word.get(half, 0) for half in halves)
            if items > most:
                best, most = " ".join(halves), items
        return best

    def save(self, path: Path) -> None:
        """Write `path`, a JSON object of words and the items that hold them; words that were learnt later are not in it."""
        path.write_text(json.dumps(self._items_of_word, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> SpellingCorrector:
        """Read what `save` wrote.

        Raises:
            SpellingError: not such a file.
        """
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise SpellingError(f"{path}: not JSON ({error}); rerun jobs/train_generator.py") from error
        if not isinstance(found, dict) or not all(isinstance(items, int) for items in found.values()):
            raise SpellingError(f"{path}: expected an object of words and numbers of items; rerun jobs/train_generator.py")
        return cls(found)


def _words(text: str) -> set[str]:
    return {match.group().lower() for match in _WORD.finditer(text)}
