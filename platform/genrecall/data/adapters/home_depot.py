"""Query-product judgements in the form of the Home Depot search relevance competition, as canonical tables.

Source: `products.csv` (product_uid, product_title) and `judgments.csv` (id, product_uid, search_term, relevance: the mean of
human raters on 1 to 3), plain or gzip. There are no shoppers, clicks or categories, so feedback is read off the judgements:
a judged pair is an exposure (with its grade), relevance >= 2.33 also a click, relevance 3 also a purchase. A request is a
distinct search term; requests are split by query. There is no order in time: `sequence` is the place of the term's first
appearance in the file, and positions are null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genrecall.data.adapters.source_files import Chunks, SourceError, find_file, read_delimited, to_chunks
from genrecall.data.schema import EVENTS, ITEMS, USERS, RawTables

CLICK_GRADE = 2.33
PURCHASE_GRADE = 3.0
_ROUNDING = 1e-6


def read(root: Path, *, seed: int = 0) -> RawTables:
    """Read a folder of judgements.

    Args:
        root: folder with `products.csv[.gz]` and `judgments.csv[.gz]`.
        seed: unused (nothing is drawn); here so that all adapters are called alike.

    Raises:
        SourceError: a file or column is missing, or a relevance is not a number from 1 to 3 (while the chunks are read).
    """
    products = find_file(root, ["products.csv"], what="judged products")
    judgments = find_file(root, ["judgments.csv"], what="query-product judgements")
    return RawTables(
        items=Chunks(lambda: to_chunks(_items(products), ITEMS)),
        users=Chunks(lambda: to_chunks(iter(()), USERS)),
        events=Chunks(lambda: to_chunks(_events(judgments), EVENTS)),
        query_kind="real",
        split="by_query",
    )


def request_id_of(search_term: str) -> str:
    """The request id of a search term: the same in every run and in every split of the file."""
    return "q" + hashlib.blake2b(search_term.encode(), digest_size=8).hexdigest()


def _items(path: Path) -> Iterator[dict[str, Any]]:
    for _, row in read_delimited(path, ["product_uid", "product_title"]):
        yield {"item_id": row["product_uid"], "title": row["product_title"].strip(), "category_path": []}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    order: dict[str, int] = {}
    for line, row in read_delimited(path, ["product_uid", "search_term", "relevance"]):
        term = row["search_term"].strip()
        grade = _grade(row["relevance"], path, line)
        event = {
            "request_id": request_id_of(term),
            "sequence": order.setdefault(term, len(order)),
            "query": term,
            "item_id": row["product_uid"],
        }
        yield {**event, "action": "exposure", "grade": grade}
        if grade >= CLICK_GRADE - _ROUNDING:
            yield {**event, "action": "click"}
        if grade >= PURCHASE_GRADE - _ROUNDING:
            yield {**event, "action": "purchase"}


def _grade(text: str, path: Path, line: int) -> float:
    try:
        grade = float(text)
    except ValueError as error:
        raise SourceError(f"{path}: line {line}, column 'relevance': expected a number from 1 to 3, got {text!r}; correct or remove the row") from error
    if not 1.0 <= grade <= 3.0:
        raise SourceError(f"{path}: line {line}, column 'relevance': expected a number from 1 to 3, got {text!r}; correct or remove the row")
    return grade
