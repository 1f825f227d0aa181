"""JDsearch (Liu et al., SIGIR 2023): one row a shopper, with the last search, its candidates and all actions before it.

Source: two tab-separated files, plain or gzip: behaviour (query, candidate_wid_list, candidate_label_list, history_qry_list,
history_wid_list, history_type_list, history_time_list) and products (wid, name, brand, four category levels, shop). List
elements are joined by `_`; the anonymous term ids of a text by octal 030, which become words joined by spaces. Labels: 0
none, 1 click, 2 cart, 3 purchase. How it is read:

- A row is a shopper (`u0`, `u1`, ... by place in the file: no ids are given). Neighbouring actions of the history under one
  query are one request; actions without a search (`-1`) have an empty query and are a request each. The row's own search is
  the last request. Only gaps in seconds are given, so `sequence` is the place in the row and the split is leave-last-out.
- The file lists acted-on candidates first, which would give them away: candidates come out ordered by id, without position.
- "Follow" (FLW) counts as a click. Products without metadata exist; they are rejected by `prepare_data` as unknown items.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from genrecall.data.adapters.source_files import Chunks, SourceError, find_file, read_delimited, to_chunks
from genrecall.data.schema import EVENTS, ITEMS, USERS, RawTables

BEHAVIOUR_COLUMNS = ("query", "candidate_wid_list", "candidate_label_list", "history_qry_list", "history_wid_list", "history_type_list", "history_time_list")
PRODUCT_COLUMNS = ("wid", "name", "brand_name", "cate_name_1", "cate_name_2", "cate_name_3", "cate_name_4")
_TERM_SEPARATOR = "\x18"
_NO_QUERY = "-1"
_ACTION_OF_TYPE = {"CLICK": "click", "FLW": "click", "CART": "cart", "ORD": "purchase"}
_ACTION_OF_LABEL = {1.0: "click", 2.0: "cart", 3.0: "purchase"}


def read(root: Path, *, seed: int = 0) -> RawTables:
    """Read a folder of JDsearch files.

    Args:
        root: folder with `user_behavior_data[_sample].txt` and `product_meta_data[_sample].txt` (plain or .gz).
        seed: unused (nothing is drawn); here so that all adapters are called alike.

    Raises:
        SourceError: a file or column is missing, or lists of one row differ in length (while the chunks are read).
    """
    behaviour = find_file(root, ["user_behavior_data.txt", "user_behavior_data_sample.txt"], what="shoppers' behaviour")
    products = find_file(root, ["product_meta_data.txt", "product_meta_data_sample.txt"], what="products")
    return RawTables(
        items=Chunks(lambda: to_chunks(_items(products), ITEMS)),
        users=Chunks(lambda: to_chunks(({"user_id": f"u{n}"} for n, _ in enumerate(_rows(behaviour, BEHAVIOUR_COLUMNS))), USERS)),
        events=Chunks(lambda: to_chunks(_events(behaviour), EVENTS)),
        query_kind="real",
        split="leave_last_out",
    )


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    return read_delimited(path, columns, delimiter="\t", quoting=False)


def _words(text: str) -> str:
    return " ".join(term for term in text.split(_TERM_SEPARATOR) if term)


def _items(path: Path) -> Iterator[dict[str, Any]]:
    for _, row in _rows(path, PRODUCT_COLUMNS):
        levels: list[str] = []
        for level in (1, 2, 3, 4):
            name = _words(row[f"cate_name_{level}"])
            if not name:
                break
            levels.append(name)
        yield {"item_id": row["wid"], "title": _words(row["name"]), "category_path": levels, "brand": _words(row["brand_name"]) or None}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    for number, (line, row) in enumerate(_rows(path, BEHAVIOUR_COLUMNS)):
        queries, items, types = (_list(row[name]) for name in ("history_qry_list", "history_wid_list", "history_type_list"))
        _same_length(path, line, {"history_qry_list": queries, "history_wid_list": items, "history_type_list": types})
        sequence = 0
        for query, group in groupby(zip(queries, items, types, strict=True), key=lambda action: action[0]):
            actions = list(group)
            for request in [[action] for action in actions] if query == _NO_QUERY else [actions]:
                event = _request(number, sequence, "" if query == _NO_QUERY else _words(query))
                for _, item_id, kind in request:
                    if kind not in _ACTION_OF_TYPE:
                        expected = ", ".join(_ACTION_OF_TYPE)
                        raise SourceError(f"{path}: line {line}, column 'history_type_list': expected {expected}, got {kind!r}; correct or remove the row")
                    yield {**event, "item_id": item_id, "action": _ACTION_OF_TYPE[kind]}
                sequence += 1
        candidates, labels = _list(row["candidate_wid_list"]), _list(row["candidate_label_list"])
        _same_length(path, line, {"candidate_wid_list": candidates, "candidate_label_list": labels})
        event = _request(number, sequence, _words(row["query"]))
        for item_id, label in sorted(zip(candidates, labels, strict=True)):
            yield {**event, "item_id": item_id, "action": "exposure"}
            action = _action_of_label(label, path, line)
            if action is not None:
                yield {**event, "item_id": item_id, "action": action}


def _request(number: int, sequence: int, query: str) -> dict[str, Any]:
    return {"request_id": f"u{number}-{sequence}", "user_id": f"u{number}", "sequence": sequence, "query": query}


def _list(text: str) -> list[str]:
    return text.split("_") if text else []


def _same_length(path: Path, line: int, lists: dict[str, list[str]]) -> None:
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in lists.items())
        raise SourceError(f"{path}: line {line}: lists that belong together differ in length: {lengths}; the row may be cut off: correct or remove it")


def _action_of_label(label: str, path: Path, line: int) -> str | None:
    try:
        value = float(label)
    except ValueError:
        value = -1.0
    if value != 0.0 and value not in _ACTION_OF_LABEL:
        raise SourceError(f"{path}: line {line}, column 'candidate_label_list': expected 0, 1, 2 or 3, got {label!r}; correct or remove the row")
    return _ACTION_OF_LABEL.get(value)
