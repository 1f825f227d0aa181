"""The requests of one split in memory, with items as catalogue rows, and what training reads off them: pairs and popularity.

Shapes: R requests; a ragged column is a list of R int32 arrays of item rows (views into one flat array). "clicked" includes
what was put in the cart or bought. `times` are microseconds since 1970 UTC, or the source's sequence numbers where it has no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecall.data.catalog import Catalog, with_large_text
from genrecall.data.schema import REQUESTS, SPLITS, DataError
from genrecall.storage import Artifact

CLICK_WEIGHT = 1.0
PURCHASE_WEIGHT = 2.0
_FIRST_TIME = 10**14  # microseconds: in 1973, before any search log; beside later dates, what is below is a sequence number


@dataclass(frozen=True)
class Requests:
    """Requests ordered by time, then request id; every column has R entries.

    Attributes:
        user_ids, genders, age_bands: None where unknown.
        times: int64.
        exposed: item rows in page order, whatever was clicked included. grades: float32 beside it, nan where not judged.
        clicked, purchased: item rows in the order of the first click or purchase.
        history: item rows clicked or bought by the shopper before this request, oldest first.
    """

    request_ids: list[str]
    user_ids: list[str | None]
    queries: list[str]
    genders: list[str | None]
    age_bands: list[str | None]
    times: np.ndarray
    exposed: list[np.ndarray]
    clicked: list[np.ndarray]
    purchased: list[np.ndarray]
    history: list[np.ndarray]
    grades: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.request_ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> Requests:
        """The requests at `indices` (int [n]), in that order."""
        chosen = [int(index) for index in indices]
        columns = {name: [column[index] for index in chosen] for name, column in vars(self).items() if name != "times"}
        return Requests(times=self.times[np.asarray(chosen, dtype=np.int64)], **columns)


def load_requests(dataset: Artifact, split: str, catalog: Catalog) -> Requests:
    """Read the requests of one split ("train", "validation" or "test").

    Raises:
        ValueError: an unknown split.
        DataError: a request names an item that the catalogue lacks.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    table = pq.read_table(dataset.file(f"requests/{split}"), schema=REQUESTS)
    times = pc.coalesce(table["timestamp"].cast(pa.int64()), table["sequence"])
    order = pc.sort_indices(pa.table({"time": times, "id": table["request_id"]}), sort_keys=[("time", "ascending"), ("id", "ascending")])
    # Lists of ids become lists of numbers where they are, and only their pieces are put in order: there may be more text than Arrow moves at once.
    places = order.to_numpy()
    items = {
        name: _item_rows(table[name], places, catalog, f"{dataset.uri}/requests/{split}: {name}") for name in ("exposed", "clicked", "purchased", "history")
    }
    grades, offsets = _flat(table["grades"])
    single = with_large_text(table.select(["request_id", "user_id", "query", "gender", "age_band"])).take(order)
    return Requests(
        request_ids=single["request_id"].to_pylist(),
        user_ids=single["user_id"].to_pylist(),
        queries=single["query"].to_pylist(),
        genders=single["gender"].to_pylist(),
        age_bands=single["age_band"].to_pylist(),
        times=np.asarray(times.take(order).to_numpy(), dtype=np.int64),
        grades=_pieces(pc.fill_null(grades, np.float32("nan")).to_numpy().astype(np.float32, copy=False), offsets, places),
        **items,
    )


def query_item_pairs(requests: Requests) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The clicked or bought items of each request.

    Returns:
        request index int32 [P], item row int32 [P], weight float32 [P] (1 for a click, 2 for a purchase), in request order.
    """
    owner, rows = flattened(requests.clicked)
    bought_owner, bought_rows = flattened(requests.purchased)
    width = int(max(rows.max(initial=0), bought_rows.max(initial=0))) + 1
    bought = np.isin(owner * width + rows, bought_owner * width + bought_rows)
    return owner.astype(np.int32), rows, np.where(bought, PURCHASE_WEIGHT, CLICK_WEIGHT).astype(np.float32)


def popularity(requests: Requests, num_items: int) -> np.ndarray:
    """Clicks plus purchases of each item: float64 [N]; call it with training requests only."""
    _, clicked = flattened(requests.clicked)
    _, purchased = flattened(requests.purchased)
    return (np.bincount(clicked, minlength=num_items) + np.bincount(purchased, minlength=num_items)).astype(np.float64)


def known_at_split(catalog: Catalog, requests: Requests) -> np.ndarray:
    """bool [N]: items not first seen after the last of `requests` (give it the training ones); all of them where the catalogue has no dates."""
    dated = ~np.isnat(catalog.first_seen)
    if not dated.any() or not len(requests):
        return np.ones(len(catalog), dtype=bool)
    seen, last = catalog.first_seen.astype("datetime64[us]").astype(np.int64), int(requests.times.max())
    known = ~dated | (seen <= last)
    # Requests ordered by a sequence number instead of a time say nothing about dates.
    by_sequence = last < _FIRST_TIME <= int(seen[dated].max())
    return known if known.any() and not by_sequence else np.ones(len(catalog), dtype=bool)


def _item_rows(column: pa.ChunkedArray, order: np.ndarray, catalog: Catalog, where: str) -> list[np.ndarray]:
    values, offsets = _flat(column)
    rows = catalog.rows_of(values)
    if (unknown := np.flatnonzero(rows < 0)).size:
        raise DataError(f"{where}: item {values[int(unknown[0])].as_py()!r} is not in the catalogue; rerun jobs/prepare_data.py with --force")
    return _pieces(rows, offsets, order)


def _flat(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The values of a list column end to end, and int64 [R + 1] offsets into them."""
    lengths = np.asarray(pc.list_value_length(column).to_numpy(), dtype=np.int64)
    values = pc.list_flatten(column)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return values, offsets


def _pieces(values: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """The pieces `values[offsets[i]:offsets[i + 1]]` for each i of `order`."""
    return [values[start:end] for start, end in zip(offsets[order].tolist(), offsets[order + 1].tolist(), strict=True)]


def flattened(lists: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A ragged column as two aligned arrays: the list that each value came from, int64 [P], and the values, int32 [P]."""
    lengths = np.fromiter((len(one) for one in lists), dtype=np.int64, count=len(lists))
    values = np.concatenate(lists) if len(lists) else np.zeros(0, dtype=np.int32)
    return np.repeat(np.arange(len(lists), dtype=np.int64), lengths), values.astype(np.int32, copy=False)
