"""Amazon reviews in the community's `X.item.json` + `X.inter.json` form, as canonical tables with derived queries.

Source: `X.item.json` maps an item id to title, description, brand and categories (levels joined by a comma with no space
after it; a name may itself hold ", "); `X.inter.json` maps a user to the item ids reviewed, in order. Each review is taken as
one purchase. There are no queries and no times, so queries are derived from the item bought, as in the literature on
personalised product search (Van Gysel et al., CIKM 2016; Ai et al., SIGIR 2017: terms of the category path), but varied:

- `category` (35 %): the deepest category name, or two levels joined, without stop words.
- `title` (40 %): two to four words of the title, drawn with probability rising with rarity (words of one item alone and very
  common words are drawn last), in title order; in half of them no word of the item's category path is used.
- `brand` (25 %): brand and product type (deepest category, or one telling title word where there is none).

A kind that an item cannot give falls back to `title`. The kind is the end of the request id (`...#title`), so that slices can
be made; `shares_category_word` tells which queries hand over the category. All choices hang on blake2b(seed, user, place),
so they do not change with the order of reading or with library versions. The words come from the item itself: lexical
baselines are strong here by construction.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genrecall.data.adapters.source_files import Chunks, SourceError, find_file, read_json_object, to_chunks
from genrecall.data.schema import EVENTS, ITEMS, USERS, RawTables

QUERY_KINDS = ("category", "title", "brand")
_KIND_BOUNDS = (0.35, 0.75, 1.0)
_WORD = re.compile(r"[a-z0-9]+(?:[./'-][a-z0-9]+)*")
_STOP_WORDS = frozenset(
    (
        "a",
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "into",
        "is",
        "it",
        "its",
        "not",
        "of",
        "on",
        "or",
        "per",
        "the",
        "this",
        "to",
        "up",
        "with",
        "w",
        "x",
        "other",
        "others",
    )
)
_CATEGORY_SEPARATOR = re.compile(r",(?!\s)")


def read(root: Path, *, seed: int = 0) -> RawTables:
    """Read one Amazon category.

    Args:
        root: folder with one `*.item.json[.gz]` and the matching `*.inter.json[.gz]`.
        seed: of the derived queries.

    Raises:
        SourceError: a file or field is missing or of the wrong type.
    """
    item_file, interaction_file = _find_pair(root)
    records = _read_items(item_file)
    purchases = read_json_object(interaction_file)
    return RawTables(
        items=Chunks(lambda: to_chunks(_items(records), ITEMS)),
        users=Chunks(lambda: to_chunks(({"user_id": user} for user in purchases), USERS)),
        events=Chunks(lambda: to_chunks(_events(records, purchases, interaction_file, seed), EVENTS)),
        query_kind="derived",
        split="leave_last_out",
    )


def split_category_path(text: str) -> list[str]:
    """Levels of a joined category path, root first: `"A,B, C"` gives `["A", "B, C"]`; empty levels are dropped."""
    return [level.strip() for level in _CATEGORY_SEPARATOR.split(html.unescape(text)) if level.strip()]


def query_kind_of(request_id: str) -> str:
    """The kind of a derived query, read off its request id.

    Raises:
        ValueError: the request id is not one of this adapter's.
    """
    _, separator, kind = request_id.rpartition("#")
    if not separator or kind not in QUERY_KINDS:
        raise ValueError(f"request id {request_id!r}: expected it to end in one of {', '.join('#' + kind for kind in QUERY_KINDS)}")
    return kind


def shares_category_word(query: str, category_path: Sequence[str]) -> bool:
    """Whether a query holds a word of the category path (compared without plural endings)."""
    return not _stems(words_of(query)).isdisjoint(_category_stems(category_path))


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order; stop words are kept."""
    return _WORD.findall(html.unescape(text).lower())


def _find_pair(root: Path) -> tuple[Path, Path]:
    candidates = sorted({*root.glob("*.item.json"), *root.glob("*.item.json.gz")}) if root.is_dir() else []
    if len(candidates) != 1:
        found = f"{len(candidates)} of them: {', '.join(p.name for p in candidates)}" if candidates else "none"
        raise SourceError(f"{root}: expected exactly one file *.item.json or *.item.json.gz, found {found}")
    stem = candidates[0].name.split(".item.json")[0]
    return candidates[0], find_file(root, [f"{stem}.inter.json"], what="purchases")


def _read_items(path: Path) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for item_id, fields in read_json_object(path).items():
        if not isinstance(fields, dict):
            raise SourceError(f"{path}: item {item_id!r}: expected an object with title, brand, description and categories, got {type(fields).__name__}")
        absent = [name for name in ("title", "categories") if not isinstance(fields.get(name), str)]
        if absent:
            raise SourceError(f"{path}: item {item_id!r}: field {absent[0]!r} is missing or not a string; write an empty string where it is unknown")
        title = html.unescape(fields["title"]).strip()
        records[item_id] = {
            "title": title,
            "path": split_category_path(fields["categories"]),
            "brand": html.unescape(str(fields.get("brand") or "")).strip(),
            "text": html.unescape(str(fields.get("description") or "")).strip(),
            "words": list(dict.fromkeys(word for word in words_of(title) if word not in _STOP_WORDS)),
        }
    if not records:
        raise SourceError(f"{path}: holds no items")
    return records


def _items(records: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for item_id, record in records.items():
        yield {
            "item_id": item_id,
            "title": record["title"],
            "category_path": record["path"],
            "brand": record["brand"] or None,
            "text": record["text"] or None,
        }


def _events(records: Mapping[str, Mapping[str, Any]], purchases: Mapping[str, Any], path: Path, seed: int) -> Iterator[dict[str, Any]]:
    frequencies = Counter(word for record in records.values() for word in record["words"])
    weights = {word: _word_weight(count, len(records)) for word, count in frequencies.items()}
    for user, item_ids in purchases.items():
        if not isinstance(item_ids, list):
            raise SourceError(f"{path}: user {user!r}: expected a list of item ids, got {type(item_ids).__name__}")
        for place, one in enumerate(item_ids):
            item_id = str(one)
            record = records.get(item_id)
            # An unknown item gives no words; the event goes on with an empty query so that prepare_data counts and rejects it.
            kind, query = ("title", "") if record is None else derive_query(record, weights, _Draws(f"{seed}|{user}|{place}"))
            yield {
                "request_id": f"{user}-{place}#{kind}",
                "user_id": user,
                "sequence": place,
                "query": query,
                "item_id": item_id,
                "action": "purchase",
            }


def derive_query(record: Mapping[str, Any], weights: Mapping[str, float], draws: _Draws) -> tuple[str, str]:
    """A query for a purchase of `record` (title words, category path, brand): its kind and its text."""
    u = draws.next()
    kind = next(name for name, bound in zip(QUERY_KINDS, _KIND_BOUNDS, strict=True) if u < bound)
    levels = [level for level in (_plain(name) for name in record["path"][1:]) if level]  # the root is the same for all
    if kind == "category" and levels:
        deepest = levels[-1]
        two_levels = len(levels) > 1 and draws.next() < 0.4
        return kind, _without_repeats(f"{levels[-2]} {deepest}" if two_levels else deepest)
    if kind == "brand" and record["brand"]:
        brand = " ".join(words_of(record["brand"])[:2])
        product = levels[-1] if levels and draws.next() < 0.7 else " ".join(_salient(record["words"], weights, 1, draws))
        if brand and product:
            return kind, _without_repeats(f"{brand} {product}")
    words = record["words"]
    if draws.next() < 0.5:
        barred = _category_stems(record["path"])
        words = [word for word in words if _stem(word) not in barred] or words
    return "title", " ".join(_salient(words, weights, 2 + int(3 * draws.next()), draws)) or _without_repeats(_plain(record["title"]))


def _salient(words: Sequence[str], weights: Mapping[str, float], count: int, draws: _Draws) -> list[str]:
    """Draw `count` different words, each with probability in proportion to its weight (Efraimidis-Spirakis), in title order."""
    keyed = sorted(words, key=lambda word: math.log(max(draws.next(), 1e-12)) / weights[word], reverse=True)
    chosen = set(keyed[:count])
    return [word for word in words if word in chosen]


def _word_weight(count: int, items: int) -> float:
    """How telling a title word is: its inverse document frequency; nearly nothing for words of one item only (part numbers)."""
    return 0.05 if count == 1 else max(math.log(items / count), 0.05)


def _plain(text: str) -> str:
    return " ".join(word for word in words_of(text) if word not in _STOP_WORDS)


def _without_repeats(text: str) -> str:
    return " ".join(dict.fromkeys(text.split()))


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _stems(words: Sequence[str]) -> set[str]:
    return {_stem(word) for word in words if word not in _STOP_WORDS}


def _category_stems(path: Sequence[str]) -> set[str]:
    return {stem for level in path for stem in _stems(words_of(level))}


class _Draws:
    """Uniform numbers in [0, 1) from a text key: the same on every machine and in any order of reading."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._block = b""
        self._used = 0

    def next(self) -> float:
        if self._used % 8 == 0:
            self._block = hashlib.blake2b(f"{self._key}|{self._used // 8}".encode(), digest_size=64).digest()
        start = (self._used % 8) * 8
        self._used += 1
        return int.from_bytes(self._block[start : start + 8], "little") / 2.0**64
