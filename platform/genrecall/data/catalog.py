"""The catalogue of a dataset in memory, column by column, sorted by item id.

Shapes: N items; an *item row* is a position in this order (int32), the representation all later stages use for an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecall.data.schema import ITEMS, DataError
from genrecall.storage import Artifact


@dataclass(frozen=True)
class Catalog:
    """Items sorted by `item_id`; every column has N entries.

    Attributes:
        item_ids: object array of str.
        titles: may hold empty strings.
        category_paths: root first; an empty tuple where unknown.
        brands: "" where unknown.
        texts: attributes and description, "" where there are none.
        prices: float64, nan where unknown.
        prior_scores: float64, what the site orders by when it must cut; 0 where unknown.
        first_seen: datetime64[us] in UTC, NaT where unknown.
    """

    item_ids: np.ndarray
    titles: list[str]
    category_paths: list[tuple[str, ...]]
    brands: list[str]
    texts: list[str]
    prices: np.ndarray
    prior_scores: np.ndarray
    first_seen: np.ndarray

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def _id_array(self) -> pa.Array:
        return pa.array(self.item_ids, pa.string())

    def rows_of(self, item_ids: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Item rows of `item_ids`: int32 [n], -1 where an id is not in the catalogue."""
        ids = item_ids if isinstance(item_ids, (pa.Array, pa.ChunkedArray)) else pa.array(item_ids, pa.string())
        rows = pc.index_in(ids, value_set=self._id_array)
        return _to_numpy(pc.fill_null(rows, -1)).astype(np.int32, copy=False)


def load_catalog(dataset: Artifact) -> Catalog:
    """Read the `items/` of a dataset artifact.

    Raises:
        DataError: an item id appears twice (the artifact was not made by `prepare_data`).
    """
    table = with_large_text(pq.read_table(dataset.file("items"), schema=ITEMS)).sort_by("item_id").combine_chunks()
    ids = table["item_id"].to_numpy(zero_copy_only=False)
    if (repeated := np.flatnonzero(ids[1:] == ids[:-1])).size:
        raise DataError(f"{dataset.uri}: item {ids[repeated[0]]!r} appears twice; rerun jobs/prepare_data.py with --force")
    return Catalog(
        item_ids=ids,
        titles=table["title"].to_pylist(),
        category_paths=[tuple(path) for path in table["category_path"].to_pylist()],
        brands=pc.fill_null(table["brand"], "").to_pylist(),
        texts=pc.fill_null(table["text"], "").to_pylist(),
        prices=_to_numpy(pc.fill_null(table["price"], np.nan)),
        prior_scores=_to_numpy(pc.fill_null(table["prior_score"], 0.0)),
        first_seen=table["first_seen"].cast(pa.timestamp("us")).to_numpy(zero_copy_only=False).astype("datetime64[us]"),
    )


def with_large_text(table: pa.Table) -> pa.Table:
    """The table with offsets of 64 bits in its text columns: Arrow sorts and takes at most two gigabytes of a column with the usual ones."""
    fields = [one.with_type(pa.large_string()) if pa.types.is_string(one.type) else one for one in table.schema]
    return table.cast(pa.schema(fields))


def _to_numpy(column: Any) -> np.ndarray:
    return np.asarray(column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy())
