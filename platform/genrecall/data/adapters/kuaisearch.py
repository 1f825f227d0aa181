"""KuaiSearch (Kuaishou e-commerce search logs) in its published JSON-lines form, as canonical tables.

Source: `items.jsonl` (title, brand, three category levels), `users.jsonl` (gender, age bucket) and `recall.jsonl` (one search:
impressed, clicked and purchased item ids), plain or gzip. `rank.jsonl` repeats the same searches candidate by candidate and
`relevance.jsonl` judges texts without item ids; neither is read. The log's `time_index` counts up over the whole log in an
unstated unit, so it becomes `sequence` and timestamps stay null; the split is by that order. Impressed ids that the item
file lacks (nearly all in the published 200-row sample) are passed on and rejected by `prepare_data` as unknown items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genrecall.data.adapters.source_files import Chunks, SourceError, field_of, find_file, read_json_lines, to_chunks
from genrecall.data.schema import EVENTS, ITEMS, USERS, RawTables

_UNKNOWN_CATEGORY = "UNKNOWN"
_NO_BRAND = frozenset({"", "无品牌", "其他/other", "UNKNOWN"})


def read(root: Path, *, seed: int = 0) -> RawTables:
    """Read a folder of KuaiSearch files.

    Args:
        root: folder with `items.jsonl`, `users.jsonl` and `recall.jsonl` (plain or .gz).
        seed: unused (nothing is drawn); here so that all adapters are called alike.

    Raises:
        SourceError: a file or field is missing or of the wrong type (fields: while the chunks are read).
    """
    items = find_file(root, ["items.jsonl"], what="items")
    users = find_file(root, ["users.jsonl"], what="users")
    recall = find_file(root, ["recall.jsonl"], what="searches")
    return RawTables(
        items=Chunks(lambda: to_chunks(_items(items), ITEMS)),
        users=Chunks(lambda: to_chunks(_users(users), USERS)),
        events=Chunks(lambda: to_chunks(_events(recall), EVENTS)),
        query_kind="real",
        split="time",
    )


def _items(path: Path) -> Iterator[dict[str, Any]]:
    for line, record in read_json_lines(path):
        levels: list[str] = []
        for level in (1, 2, 3):
            name = str(field_of(record, f"category_level{level}_name", path, line) or "").strip()
            if name in ("", _UNKNOWN_CATEGORY):
                break  # below an unknown level nothing is known
            levels.append(name)
        brand = str(record.get("brand_name") or "").strip()
        yield {
            "item_id": str(field_of(record, "item_id", path, line)),
            "title": str(field_of(record, "item_title", path, line)).strip(),
            "category_path": levels,
            "brand": None if brand in _NO_BRAND else brand,
            "text": str(record.get("seller_name") or "").strip() or None,
        }


def _users(path: Path) -> Iterator[dict[str, Any]]:
    for line, record in read_json_lines(path):
        yield {
            "user_id": str(field_of(record, "user_id", path, line)),
            "gender": _known(record.get("gender")),
            "age_band": _known(record.get("age_bucket")),
        }


def _known(value: Any) -> str | None:
    text = str(value or "").strip()
    return None if text in ("", "UNKNOWN", "unknown") else text


def _events(path: Path) -> Iterator[dict[str, Any]]:
    for line, record in read_json_lines(path):
        query = str(field_of(record, "query", path, line) or "").strip()
        user, session = field_of(record, "user_id", path, line), field_of(record, "session_id", path, line)
        time_index = field_of(record, "time_index", path, line)
        if not isinstance(time_index, int):
            raise SourceError(f"{path}: line {line}, field 'time_index': expected an integer, got {time_index!r}; correct or remove the row")
        # A session holds several searches; the query's digest tells those of one moment apart.
        digest = hashlib.blake2b(query.encode(), digest_size=4).hexdigest()
        request = {"request_id": f"{user}-{session}-{time_index}-{digest}", "user_id": str(user), "sequence": time_index, "query": query}
        impressed = _ids(record, "impressed_item_ids", path, line)
        places = {item_id: place for place, item_id in reversed(list(enumerate(impressed)))}
        for item_id, place in sorted(places.items(), key=lambda pair: pair[1]):
            yield {**request, "item_id": item_id, "action": "exposure", "position": place}
        for field, action in (("clicked_item_ids", "click"), ("purchased_item_ids", "purchase")):
            for item_id in dict.fromkeys(_ids(record, field, path, line)):
                yield {**request, "item_id": item_id, "action": action, "position": places.get(item_id)}


def _ids(record: dict[str, Any], field: str, path: Path, line: int) -> list[str]:
    values = field_of(record, field, path, line)
    if not isinstance(values, list):
        raise SourceError(f"{path}: line {line}, field {field!r}: expected a list of item ids, got {type(values).__name__}; correct or remove the row")
    return [str(value) for value in values]
