"""User Behavior Insights 1.3, the open log standard of OpenSearch, Solr and Elasticsearch sites, as canonical tables.

Source: the UBI 1.3.0 schemas (github.com/o19s/ubi). Read are all `*.ndjson` and `*.jsonl` files of a folder (plain or gzip):
in bulk form (an action line naming the index, then the document) or one document a line, then told apart by file name
(`...queries...`, `...events...`). An optional `products.jsonl` is the catalogue, one object a line with the columns of the
canonical items table; without it items are derived from the object ids seen (title from the event's object description).

How it is read: the request is `query_id`; its text comes from `ubi_queries`, else from the event's `user_query`, else from the
message of a search event of the same id. `query_response_hit_ids` and impressions are exposures; other action names map by
`ACTIONS` (give your own mapping for your own names). `position.ordinal` is taken as it is. The shopper is `user_id`, else
`client_id`; queries have no `user_id` in the standard, so that a client's whole request goes to the user whom any of its documents names. Events
without query id, object id or a mapped action are left out, and counted in a log line. The text of every query id is held in memory (about 300
bytes a query, 500 where a user is named); the events are streamed.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrecall.data.adapters.source_files import Chunks, SourceError, field_of, read_json_lines, to_chunks
from genrecall.data.schema import ACTIONS as CANONICAL_ACTIONS
from genrecall.data.schema import EVENTS, ITEMS, USERS, RawTables

ACTIONS: Mapping[str, str] = {
    "impression": "exposure",
    "view": "exposure",
    "click": "click",
    "item_click": "click",
    "product_click": "click",
    "watch": "click",
    "add_to_cart": "cart",
    "purchase": "purchase",
    "checkout": "purchase",
    "buy": "purchase",
}
SEARCH_ACTIONS = frozenset({"search", "on_search"})
_SUFFIXES = (".ndjson", ".jsonl", ".ndjson.gz", ".jsonl.gz")
_BULK_VERBS = frozenset({"index", "create", "delete"})
_PRODUCT_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "item_id": ((str, int), "text or a whole number"),
    "title": ((str,), "text"),
    "category_path": ((list,), "a list of names, root first"),
    "brand": ((str,), "text"),
    "text": ((str,), "text"),
    "price": ((int, float), "a number"),
    "prior_score": ((int, float), "a number"),
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Query:
    text: str
    user_id: str | None
    time: datetime.datetime | None


@dataclass(frozen=True)
class _Log:
    """What is known of a log before its events are streamed: queries by query id, and users by query id and client id where a document names both."""

    queries: Mapping[str, _Query]
    users: Mapping[tuple[str, str], str]

    def shopper(self, record: Mapping[str, Any]) -> str | None:
        """The shopper of a document, as its whole request has it."""
        found = _shopper(record)
        return None if found is None else self.users.get((str(record.get("query_id") or ""), found), found)


def read(root: Path, *, seed: int = 0, actions: Mapping[str, str] = ACTIONS) -> RawTables:
    """Read a folder of UBI files.

    Args:
        root: folder with UBI queries and events, and optionally `products.jsonl[.gz]`.
        seed: unused (nothing is drawn); here so that all adapters are called alike.
        actions: canonical action by UBI `action_name`; names not in it are left out.

    Raises:
        SourceError: no UBI file in the folder, a broken line, a document without its required fields, a product's field of another type, a mapping to an
            unknown action.
    """
    wrong = {name: action for name, action in actions.items() if action not in CANONICAL_ACTIONS}
    if wrong:
        raise SourceError(f"actions: expected one of {', '.join(CANONICAL_ACTIONS)}, got {wrong}")
    files = _log_files(root)
    products = next((path for name in ("products.jsonl", "products.jsonl.gz") if (path := root / name).is_file()), None)
    log = _read_queries(files)
    return RawTables(
        items=Chunks(lambda: to_chunks(_items(products) if products else _derived_items(files, actions), ITEMS)),
        users=Chunks(lambda: to_chunks(_users(files, log, actions), USERS)),
        events=Chunks(lambda: to_chunks(_events(files, log, actions), EVENTS)),
        query_kind="real",
        split="time",
    )


def _log_files(root: Path) -> list[Path]:
    files = sorted(p for p in root.iterdir() if p.name.endswith(_SUFFIXES) and not p.name.startswith("products.")) if root.is_dir() else []
    if not files:
        raise SourceError(f"{root}: expected UBI logs (*.ndjson or *.jsonl, plain or .gz) in this folder, found none")
    return files


def _documents(files: list[Path]) -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """Yield ("queries" | "events", file, line, document) over all files; documents of other indices are passed over."""
    for path in files:
        kind_of_file = _kind_of(path.name)
        kind = kind_of_file
        document_follows = False
        for line, record in read_json_lines(path):
            verb = next(iter(record)) if len(record) == 1 else None
            if verb in _BULK_VERBS and isinstance(record[verb], dict) and not document_follows:
                index = record[verb].get("_index")
                kind = kind_of_file if index is None else _kind_of(str(index)) or "other"
                document_follows = verb != "delete"
                continue
            document_follows = False
            kind_of_document = kind or _kind_by_content(record)
            if kind_of_document != "other":
                yield kind_of_document, path, line, record


def _kind_of(name: str) -> str | None:
    """What a file or index name says; None where it says both or neither."""
    queries, events = "queries" in name, "events" in name
    return None if queries == events else "queries" if queries else "events"


def _kind_by_content(record: Mapping[str, Any]) -> str:
    return "events" if "action_name" in record else "queries" if "user_query" in record else "other"


def _read_queries(files: list[Path]) -> _Log:
    """Text, shopper and time by query id, from ubi_queries, completed from search events; and the users behind clients."""
    queries: dict[str, _Query] = {}
    searched: dict[str, _Query] = {}
    users: dict[tuple[str, str], str] = {}
    for kind, path, line, record in _documents(files):
        query_id = str(record.get("query_id") or "")
        if not query_id:
            continue
        if record.get("user_id") and record.get("client_id"):
            users.setdefault((query_id, str(record["client_id"])), str(record["user_id"]))
        if kind == "queries":
            text = str(field_of(record, "user_query", path, line) or "").strip()
            queries[query_id] = _Query(text, _shopper(record), _time(record, path, line))
        elif record.get("action_name") in SEARCH_ACTIONS and record.get("message"):
            searched[query_id] = _Query(str(record["message"]).strip(), _shopper(record), _time(record, path, line))
    return _Log({**searched, **queries}, users)


def _events(files: list[Path], log: _Log, actions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    left_out: Counter[str] = Counter()
    for kind, path, line, record in _documents(files):
        if kind == "queries":
            yield from _hits(record, log, path, line)
            continue
        name = str(field_of(record, "action_name", path, line))
        if name not in actions:
            left_out[f"action {name}"] += 1
            continue
        query_id, item_id = str(record.get("query_id") or ""), _object_id(record)
        if not query_id or not item_id:
            left_out["no query id" if not query_id else f"{name} without object id"] += 1
            continue
        query = log.queries.get(query_id)
        yield {
            "request_id": query_id,
            "user_id": log.shopper(record) or (log.users.get((query_id, query.user_id), query.user_id) if query and query.user_id else None),
            "timestamp": _time(record, path, line),
            "query": query.text if query else str(record.get("user_query") or "").strip(),
            "item_id": item_id,
            "action": actions[name],
            "position": _ordinal(record),
        }
    if left_out:
        _log.warning("UBI events left out: %s", ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common()))


def _hits(record: Mapping[str, Any], log: _Log, path: Path, line: int) -> Iterator[dict[str, Any]]:
    hits = record.get("query_response_hit_ids") or []
    if not isinstance(hits, list):
        raise SourceError(f"{path}: line {line}, field 'query_response_hit_ids': expected a list of ids, got {type(hits).__name__}")
    query_id = str(record.get("query_id") or "")
    if not query_id:
        return
    query, shopper = log.queries[query_id], log.shopper(record)
    for position, item_id in enumerate(hits):
        yield {
            "request_id": query_id,
            "user_id": shopper,
            "timestamp": query.time,
            "query": query.text,
            "item_id": str(item_id),
            "action": "exposure",
            "position": position,
        }


def _derived_items(files: list[Path], actions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Items named by the log itself, for sites that give no catalogue."""
    titles: dict[str, str] = {}
    for kind, _, _, record in _documents(files):
        if kind == "queries":
            for item_id in record.get("query_response_hit_ids") or []:
                titles.setdefault(str(item_id), "")
        elif record.get("action_name") in actions and record.get("query_id") and (item_id := _object_id(record)):
            title = _object(record).get("description") or _object(record).get("title") or ""
            titles[item_id] = titles.get(item_id) or str(title).strip()
    for item_id, title in titles.items():
        yield {"item_id": item_id, "title": title, "category_path": []}


def _items(path: Path) -> Iterator[dict[str, Any]]:
    for line, record in read_json_lines(path):
        unknown = set(record) - set(ITEMS.names)
        if unknown:
            raise SourceError(f"{path}: line {line}: unknown field {', '.join(map(repr, sorted(unknown)))}; a product has {', '.join(ITEMS.names)}")
        for name, (kinds, expected) in _PRODUCT_FIELDS.items():
            required = name in ("item_id", "title")
            value = field_of(record, name, path, line) if required else record.get(name)
            if (required or value is not None) and not _is_a(value, kinds):
                raise _wrong_field(path, line, name, expected, value)
        category_path = record.get("category_path") or []
        if not all(_is_a(level, (str, int)) for level in category_path):
            raise _wrong_field(path, line, "category_path", _PRODUCT_FIELDS["category_path"][1], category_path)
        first_seen = record.get("first_seen")
        yield {
            **record,
            "item_id": str(record["item_id"]),
            "category_path": [str(level) for level in category_path],
            "price": _float(record, "price", path, line),
            "prior_score": _float(record, "prior_score", path, line),
            "first_seen": None if first_seen is None else _parse_time(first_seen, path, line, field="first_seen"),
        }


def _is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)  # JSON's true is no number


def _float(record: Mapping[str, Any], name: str, path: Path, line: int) -> float | None:
    try:
        return None if record.get(name) is None else float(record[name])
    except OverflowError as error:
        raise _wrong_field(path, line, name, "a number below 1.8e308", record[name]) from error


def _wrong_field(path: Path, line: int, name: str, expected: str, value: Any) -> SourceError:
    return SourceError(f"{path}: line {line}, field {name!r}: expected {expected}, got {json.dumps(value)[:100]}; correct or remove the field")


def _users(files: list[Path], log: _Log, actions: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    seen: set[str | None] = {log.users.get((query_id, query.user_id), query.user_id) for query_id, query in log.queries.items() if query.user_id}
    seen |= {log.shopper(record) for kind, _, _, record in _documents(files) if kind == "events" and record.get("action_name") in actions}
    for user_id in sorted(user for user in seen if user):
        yield {"user_id": user_id}


def _shopper(record: Mapping[str, Any]) -> str | None:
    return str(record.get("user_id") or record.get("client_id") or "") or None


def _attributes(record: Mapping[str, Any]) -> Mapping[str, Any]:
    attributes = record.get("event_attributes")
    return attributes if isinstance(attributes, dict) else {}


def _object(record: Mapping[str, Any]) -> Mapping[str, Any]:
    value = _attributes(record).get("object")
    return value if isinstance(value, dict) else {}


def _object_id(record: Mapping[str, Any]) -> str:
    value = _object(record).get("object_id")
    return "" if value is None else str(value)


def _ordinal(record: Mapping[str, Any]) -> int | None:
    position = _attributes(record).get("position")
    ordinal = position.get("ordinal") if isinstance(position, dict) else None
    return ordinal if isinstance(ordinal, int) and 0 <= ordinal < 2**31 else None


def _time(record: Mapping[str, Any], path: Path, line: int) -> datetime.datetime | None:
    value = record.get("timestamp")
    return None if value is None else _parse_time(value, path, line)


def _parse_time(value: Any, path: Path, line: int, *, field: str = "timestamp") -> datetime.datetime:
    """ISO 8601 (UTC where it names no zone) or milliseconds since 1970, as OpenSearch takes both."""
    try:
        if isinstance(value, int):
            return datetime.datetime.fromtimestamp(value / 1000, datetime.UTC)
        moment = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise SourceError(
            f"{path}: line {line}, field {field!r}: expected ISO 8601 or milliseconds since 1970, got {value!r}; correct or remove the row"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
