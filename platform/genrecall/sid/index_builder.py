"""Building trie, SID -> items index and item ids from items that come in batches, in bounded memory.

An item costs sixteen bytes until `finish`, and about sixty while it runs; its id goes to disk as it comes. SID numbers, trie and index are made
by `numbered_sids`, `Trie.from_tokens` and `SidIndex.build`, which is the only way to make them.

Shapes: N items, S SIDs, d dimensions of the items' vectors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from genrecall.sid.index import SidIndex, SidIndexError
from genrecall.sid.item_ids import FILE as IDS_FILE
from genrecall.sid.item_ids import IdArray, check_ascending, fixed_width
from genrecall.sid.semantic_id import numbered_sids, packed
from genrecall.sid.trie import Trie

_VECTORS_AT_ONCE = 1 << 16
_Number = TypeVar("_Number", np.int64, np.float32)


class SidIndexBuilder:
    """Takes a catalogue batch by batch, in the order of item rows.

    Args:
        alphabet_sizes: tokens per level.
        work_folder: where ids wait for `finish`, at most 64 bytes an item; the system's temporary folder by default.
    """

    def __init__(self, alphabet_sizes: tuple[int, int, int], *, work_folder: Path | None = None) -> None:
        self._alphabet_sizes = alphabet_sizes
        self._ids: IO[bytes] = tempfile.TemporaryFile(dir=work_folder)  # noqa: SIM115 - lives until finish
        self._id_blocks: list[tuple[int, int]] = []  # rows and width of each block in the file
        self._last_id: NDArray[np.bytes_] | None = None
        self._keys: list[NDArray[np.int64]] = []
        self._prior: list[NDArray[np.float32]] = []
        self._feedback: list[NDArray[np.float32]] = []
        self._count = 0

    def add(self, item_ids: IdArray, tokens: NDArray[np.integer], prior: NDArray[np.floating], feedback: NDArray[np.floating] | None = None) -> None:
        """Take the next n items.

        Args:
            item_ids: [n] as an Arrow string array or numpy fixed-width bytes, ascending, over all batches too.
            tokens: integer [n, 3], the SID of each. prior: float [n]; nan counts as 0. feedback: float [n], see `SidIndex.build`; none by default.

        Raises:
            ItemIdsError: ids out of order or too long. SidError: a token out of its alphabet. SidIndexError: lengths that differ.
        """
        feedback = np.zeros(len(item_ids), np.float32) if feedback is None else feedback
        if not len(item_ids) == len(tokens) == len(prior) == len(feedback):
            raise SidIndexError(
                f"expected ids, tokens, prior scores and feedback of as many items, got {len(item_ids)}, {len(tokens)}, {len(prior)} and {len(feedback)}"
            )
        if not len(item_ids):
            return
        keys = packed(np.asarray(tokens), self._alphabet_sizes)
        ids = fixed_width(item_ids, first_row=self._count)
        if self._last_id is not None:
            check_ascending(np.concatenate([self._last_id, ids[:1]]), first_row=self._count - 1)
        check_ascending(ids, first_row=self._count)
        self._ids.write(ids.tobytes())
        self._id_blocks.append((len(ids), ids.dtype.itemsize))
        self._last_id = ids[-1:].copy()
        self._keys.append(keys)
        self._prior.append(np.array(prior, dtype=np.float32))
        self._feedback.append(np.array(feedback, dtype=np.float32))
        self._count += len(ids)

    def finish(self, folder: Path, *, item_vectors: NDArray[np.floating] | None = None) -> tuple[Trie, SidIndex]:
        """Write `trie/`, `index/` and `item_ids.npy` into `folder`; the builder is used up.

        Args:
            item_vectors: float [N, d] by item row, for guidance; written into the trie in the order of places.

        Returns:
            The trie, without vectors, and the index.

        Raises:
            SidIndexError: no items, or another number of vectors.
        """
        if not self._count:
            raise SidIndexError("index: expected at least one item, got none")
        if item_vectors is not None and len(item_vectors) != self._count:
            raise SidIndexError(f"item_vectors: expected one for each of the {self._count} items, got {len(item_vectors)}")
        tokens, item_sid = numbered_sids(_joined(self._keys), self._alphabet_sizes)
        trie = Trie.from_tokens(tokens, self._alphabet_sizes)
        index = SidIndex.build(item_sid, len(tokens), _joined(self._prior), feedback=_joined(self._feedback))
        trie.save(folder / "trie")
        index.save(folder / "index")
        self._write_ids(folder / IDS_FILE)
        if item_vectors is not None:
            write_items(folder / "trie", item_vectors, index)
        return trie, index

    def _write_ids(self, path: Path) -> None:
        width = max(one for _, one in self._id_blocks)
        self._ids.seek(0)
        with path.open("wb") as file:
            _write_header(file, np.dtype(f"S{width}"), (self._count,))
            for rows, one in self._id_blocks:
                block = np.frombuffer(self._ids.read(rows * one), dtype=f"S{one}")
                file.write(block.astype(f"S{width}").tobytes())
        self._ids.close()


def write_items(folder: Path, item_vectors: NDArray[np.floating], index: SidIndex) -> None:
    """Add the items' vectors to a saved trie, as `Trie.with_items` and `Trie.save` would, without holding them.

    Args:
        item_vectors: float [N, d] by item row; may be memory-mapped.
    """
    with (folder / "item_vectors.npy").open("wb") as file:
        _write_header(file, np.dtype(np.float16), (index.num_published, item_vectors.shape[1]))
        for start in range(0, index.num_published, _VECTORS_AT_ONCE):
            file.write(np.asarray(item_vectors[index.item_rows[start : start + _VECTORS_AT_ONCE]], dtype=np.float16).tobytes())
    np.save(folder / "item_offsets.npy", np.asarray(index.offsets), allow_pickle=False)


def _write_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


def _joined(parts: list[NDArray[_Number]]) -> NDArray[_Number]:
    """The parts in one array; the list is emptied, so that they are not held twice for longer than the copy takes."""
    whole = np.concatenate(parts)
    parts.clear()
    return whole
