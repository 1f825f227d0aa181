"""The streaming build against the trie, index and ids built at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrecall.sid.index import SidIndex, SidIndexError
from genrecall.sid.index_builder import SidIndexBuilder
from genrecall.sid.item_ids import ItemIds, ItemIdsError
from genrecall.sid.semantic_id import SidError
from genrecall.sid.trie import Trie

SIZES = (3, 2, 4)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_at_once(folder, ids, tokens, prior, vectors=None):
    """What the parts write by themselves; SIDs are numbered by a plain sorted set."""
    paths = sorted({tuple(row) for row in tokens.tolist()})
    item_sid = np.array([paths.index(tuple(row)) for row in tokens.tolist()], dtype=np.int32)
    index = SidIndex.build(item_sid, len(paths), prior)
    trie = Trie.from_tokens(np.array(paths, dtype=np.int32), SIZES)
    (trie if vectors is None else trie.with_items(vectors[index.item_rows], index.offsets)).save(folder / "trie")
    index.save(folder / "index")
    ItemIds.of(pa.array(ids)).save(folder)


ITEMS = st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 3), st.sampled_from([0.0, -0.0, 1.5, -2.0, float("nan")]))


@settings(deadline=None, max_examples=60)
@given(st.data(), st.lists(ITEMS, min_size=1, max_size=40), st.booleans(), st.booleans())
def test_every_file_equals_that_of_the_parts(tmp_path_factory, data, items, with_vectors, as_bytes):
    folder = tmp_path_factory.mktemp("built")
    ids = sorted(data.draw(st.lists(st.text("ab1é", min_size=1, max_size=9), min_size=len(items), max_size=len(items), unique=True)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=4)))
    tokens, prior = np.array([item[:3] for item in items], dtype=np.int32), np.array([item[3] for item in items], dtype=np.float32)
    vectors = np.random.default_rng(0).normal(size=(len(items), 3)).astype(np.float32) if with_vectors else None
    builder = SidIndexBuilder(SIZES)
    for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True):
        part = np.array([one.encode() for one in ids[start:end]], dtype="S20") if as_bytes else pa.array(ids[start:end], pa.string())
        builder.add(part, tokens[start:end], prior[start:end])
    trie, index = builder.finish(folder / "streamed", item_vectors=vectors)
    write_at_once(folder / "at_once", ids, tokens, prior, vectors)
    assert contents(folder / "streamed") == contents(folder / "at_once")
    assert Trie.load(folder / "streamed" / "trie").tokens3.tolist() == trie.tokens3.tolist()
    assert SidIndex.load(folder / "streamed" / "index").item_rows.tolist() == index.item_rows.tolist()


def test_memory_is_bounded_by_the_items_and_not_by_their_ids(tmp_path):
    count, batch = 200_000, 20_000
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        builder = SidIndexBuilder((64, 64, 64))
        for start in range(0, count, batch):
            ids = np.char.mod(b"%064d", np.arange(start, start + batch))
            builder.add(ids, rng.integers(0, 16, (batch, 3)), rng.random(batch))
        builder.finish(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * count  # ids alone are 64 bytes an item
    assert len(ItemIds.load(tmp_path)) == count


def test_a_catalogue_out_of_order_or_of_unequal_lengths_is_refused(tmp_path):
    def add(builder, ids, tokens=None, prior=None):
        count = len(ids)
        builder.add(pa.array(ids, pa.string()), np.zeros((count, 3), int) if tokens is None else tokens, np.zeros(count) if prior is None else prior)

    builder = SidIndexBuilder(SIZES)
    add(builder, ["a", "b"])
    with pytest.raises(ItemIdsError, match=r"row 2 \(b'b'\) follows b'b'; sort the catalogue by item_id"):
        add(builder, ["b", "c"])
    with pytest.raises(ItemIdsError, match=r"row 3 has 65 bytes, at most 64"):
        add(builder, ["c", "d" * 65])
    with pytest.raises(SidError, match="row 1, level 2: expected 0 to 1, got 2"):
        add(builder, ["c", "d"], tokens=np.array([[0, 0, 0], [0, 2, 0]]))
    with pytest.raises(SidIndexError, match="as many items, got 1, 1, 2 and 1"):
        add(builder, ["c"], prior=np.zeros(2))
    with pytest.raises(SidIndexError, match="item_vectors: expected one for each of the 2 items, got 3"):
        builder.finish(tmp_path, item_vectors=np.zeros((3, 1)))
    _, index = builder.finish(tmp_path)  # what was refused left nothing behind
    assert index.item_sid.tolist() == [0, 0]
    with pytest.raises(SidIndexError, match="at least one item, got none"):
        SidIndexBuilder(SIZES).finish(tmp_path)
