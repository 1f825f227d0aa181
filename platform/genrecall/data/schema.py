"""The canonical tables, as Arrow schemas. Every job reads and writes only these; adapters turn outside data into them.

`requests` is derived from `events` by `prepare_data` (one row per request, with the shopper's history before it), so that
training and evaluation never group events again. `grade` is a human judgement (1 to 3) where the source has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

ACTIONS = ("exposure", "click", "cart", "purchase")
SPLITS = ("train", "validation", "test")

MAX_ID_BYTES = 64  # of UTF-8; indexes keep ids at one width

TIMESTAMP = pa.timestamp("us", tz="UTC")

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("category_path", pa.list_(pa.string()), nullable=False),  # root first; empty when unknown
        pa.field("brand", pa.string()),
        pa.field("text", pa.string()),  # attributes and description
        pa.field("price", pa.float64()),
        pa.field("prior_score", pa.float64()),  # what the site orders by when it must cut
        pa.field("first_seen", TIMESTAMP),
    ]
)

EVENTS = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string()),  # a salted hash
        pa.field("timestamp", TIMESTAMP),
        pa.field("sequence", pa.int64()),  # required where timestamp is null
        pa.field("query", pa.string(), nullable=False),  # may be empty
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),  # one of ACTIONS
        pa.field("position", pa.int32()),  # 0-based place on the page
        pa.field("grade", pa.float32()),
    ]
)

USERS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("gender", pa.string()),
        pa.field("age_band", pa.string()),
    ]
)

REQUESTS = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string()),
        pa.field("timestamp", TIMESTAMP),
        pa.field("sequence", pa.int64()),
        pa.field("query", pa.string(), nullable=False),
        pa.field("gender", pa.string()),
        pa.field("age_band", pa.string()),
        pa.field("exposed", pa.list_(pa.string()), nullable=False),  # item ids in page order, whatever was clicked or bought included
        pa.field("grades", pa.list_(pa.float32()), nullable=False),  # beside `exposed`; null where not judged
        pa.field("clicked", pa.list_(pa.string()), nullable=False),  # includes carted and purchased ones
        pa.field("purchased", pa.list_(pa.string()), nullable=False),
        pa.field("history", pa.list_(pa.string()), nullable=False),  # clicked or purchased before this request, oldest first, last N
    ]
)

REJECTED = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),  # items, events or users
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64()),  # 0-based row in the file, where the reader knows it
        pa.field("column", pa.string()),
        pa.field("reason", pa.string(), nullable=False),  # a short constant, e.g. unknown_item
        pa.field("value", pa.string()),  # what came, cut to 200 characters
    ]
)


class DataError(ValueError):
    """Input data that cannot be used; the message names the file, the rows, the column, and what to do."""


@dataclass(frozen=True)
class RawTables:
    """What a source's reader hands to `prepare_data`: streams of canonical tables, each read once.

    `query_kind` says where the queries come from ("real", "derived" or "simulated"); `split` is the way to split that fits the
    source ("time", "leave_last_out" or "by_query").
    """

    items: Iterable[pa.Table]
    users: Iterable[pa.Table]
    events: Iterable[pa.Table]
    query_kind: str
    split: str
