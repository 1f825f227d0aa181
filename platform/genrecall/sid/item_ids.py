"""Item ids by item row and back: sorted UTF-8 bytes of one width in a memory-mapped file, so that no replica holds them as objects.

The order of the bytes is the order of the code points, hence of Python's strings and of the catalogue. Ten bytes an id make 210 MB of
2.1e7 items; a search touches a few pages of them.

Shapes: N items, n ids asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from genrecall.data.schema import MAX_ID_BYTES

FILE = "item_ids.npy"
_ROWS_AT_ONCE = 1 << 18

IdArray: TypeAlias = pa.Array | pa.ChunkedArray | NDArray[Any]
"""Ids as an Arrow string array, numpy fixed-width bytes (S), or a numpy array of str objects."""


class ItemIdsError(ValueError):
    """Ids that cannot be kept at one width, rows that name no item, or a file that holds no ids."""


@dataclass(frozen=True)
class ItemIds:
    """The ids of N items.

    Attributes:
        values: S-width [N], UTF-8, ascending and unique; position = item row.
    """

    values: NDArray[np.bytes_]

    def __len__(self) -> int:
        """N, the number of items."""
        return len(self.values)

    @classmethod
    def of(cls, ids: IdArray) -> ItemIds:
        """From all ids at once, ascending.

        Raises:
            ItemIdsError: an id that is null, too long or ends in a zero byte, or ids out of order.
        """
        values = fixed_width(ids)
        check_ascending(values)
        return cls(values)

    def rows_of(self, ids: Iterable[str] | pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
        """Item rows of ids: int32 [n], -1 where no item has the id, and for null."""
        width = self.values.dtype.itemsize
        if isinstance(ids, (pa.Array, pa.ChunkedArray)):
            array = _binary(ids)
            kept = pc.and_(pc.less_equal(pc.binary_length(array), width), pc.invert(pc.ends_with(array, b"\0")))
            possible = pc.fill_null(kept, False).to_numpy(zero_copy_only=False)
            wanted = _padded(array.filter(pa.array(possible)), width)
        else:
            # A request may hold half a surrogate pair, which is no UTF-8 and no item.
            encoded = [one.encode("utf-8", "surrogatepass") for one in ids]
            possible = np.array([len(one) <= width and not one.endswith(b"\0") for one in encoded], dtype=bool)
            wanted = np.array(encoded, dtype=f"S{width}")[possible]
        rows = np.full(len(possible), -1, dtype=np.int32)
        if len(self.values) and len(wanted):
            at = np.minimum(np.searchsorted(self.values, wanted), len(self.values) - 1)
            rows[possible] = np.where(self.values[at] == wanted, at, -1)
        return rows

    def ids_of(self, item_rows: Sequence[int] | NDArray[np.integer]) -> list[str]:
        """The ids of item rows.

        Raises:
            ItemIdsError: a row outside 0 to N - 1.
        """
        rows = np.asarray(item_rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ItemIdsError(f"item_rows: expected rows 0 to {len(self) - 1}, got {int(rows.min())} to {int(rows.max())}")
        return [one.decode("utf-8") for one in self.values[rows].tolist()]

    def same_as(self, ids: pa.ChunkedArray) -> bool:
        """Whether these are the ids, in this order; a part at a time."""
        parts = range(0, len(self), _ROWS_AT_ONCE)
        return len(ids) == len(self) and all(
            np.array_equal(fixed_width(ids[start : start + _ROWS_AT_ONCE]), self.values[start : start + _ROWS_AT_ONCE]) for start in parts
        )

    def save(self, folder: Path) -> None:
        """Write `item_ids.npy` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / FILE, np.asarray(self.values), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, *, mmap: bool = True) -> ItemIds:
        """Read ids written by `save`; with `mmap` pages are read when first touched.

        Raises:
            ItemIdsError: no such file, or one that holds something else.
        """
        if not (folder / FILE).is_file():
            raise ItemIdsError(f"{folder}: no {FILE}; it was made before ids had a file of their own: rerun jobs/build_sid_index.py")
        values = np.load(folder / FILE, mmap_mode="r" if mmap else None, allow_pickle=False)
        if values.dtype.kind != "S" or values.ndim != 1:
            raise ItemIdsError(
                f"{folder / FILE}: expected fixed-width bytes [N], got {values.dtype} {list(values.shape)}; rerun jobs/build_sid_index.py --force"
            )
        return cls(values)


def fixed_width(ids: IdArray, *, first_row: int = 0) -> NDArray[np.bytes_]:
    """Ids as bytes of one width, that of the longest (at least 1); `first_row` is the item row of the first, for messages.

    Raises:
        ItemIdsError: an id that is null, longer than 64 bytes, or ends in a zero byte (the padding would swallow it).
    """
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "S":
        lengths = np.char.str_len(ids)
        _check_lengths(lengths, first_row)
        return np.ascontiguousarray(ids, dtype=f"S{max(int(lengths.max(initial=0)), 1)}")
    array = _binary(ids if isinstance(ids, (pa.Array, pa.ChunkedArray)) else pa.array(ids, pa.string()))
    if array.null_count:
        raise ItemIdsError(f"item ids: row {first_row + pc.index(pc.is_null(array), True).as_py()} has none; every item needs an id")
    if pc.any(zero := pc.ends_with(array, b"\0")).as_py():
        raise ItemIdsError(f"item ids: row {first_row + pc.index(zero, True).as_py()} ends in a zero byte; clean the catalogue's ids")
    lengths = pc.binary_length(array).to_numpy(zero_copy_only=False)
    _check_lengths(lengths, first_row)
    return _padded(array, max(int(lengths.max(initial=0)), 1))


def check_ascending(values: NDArray[np.bytes_], *, first_row: int = 0) -> None:
    """Check that ids ascend; `first_row` as for `fixed_width`.

    Raises:
        ItemIdsError: naming the first row that does not come after the one before it.
    """
    wrong = values[1:] <= values[:-1]
    if wrong.any():
        row = int(np.argmax(wrong)) + 1
        raise ItemIdsError(
            f"item ids: expected them ascending and unique by their UTF-8 bytes, row {first_row + row} ({bytes(values[row])!r}) follows {bytes(values[row - 1])!r}; sort the catalogue by item_id"
        )


def _check_lengths(lengths: NDArray[np.integer], first_row: int) -> None:
    if lengths.max(initial=0) > MAX_ID_BYTES:
        row = int(np.argmax(lengths > MAX_ID_BYTES))
        raise ItemIdsError(f"item ids: row {first_row + row} has {int(lengths[row])} bytes, at most {MAX_ID_BYTES} are kept; give the catalogue shorter ids")


def _binary(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    array = ids.cast(pa.large_binary())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _padded(array: pa.Array, width: int) -> NDArray[np.bytes_]:
    """S-width [n] of a large-binary array without nulls, none of it longer than `width`."""
    padded = np.zeros((len(array), width), dtype=np.uint8)
    _, ends_buffer, data_buffer = array.buffers()
    ends = np.frombuffer(ends_buffer, dtype=np.int64)[array.offset : array.offset + len(array) + 1] if len(array) else np.zeros(1, np.int64)
    data = np.frombuffer(data_buffer or b"", dtype=np.uint8)
    for start in range(0, len(array), _ROWS_AT_ONCE):
        part = padded[start : start + _ROWS_AT_ONCE]
        lengths = np.diff(ends[start : start + len(part) + 1])
        part[np.arange(width) < lengths[:, None]] = data[ends[start] : ends[start + len(part)]]
    return padded.view(f"S{width}")[:, 0]
