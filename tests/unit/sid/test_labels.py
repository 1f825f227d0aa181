"""Words for SIDs: the category and the words that tell a prefix from the rest, worked out by hand on a small catalogue."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from genrecall.sid.index import SidIndex
from genrecall.sid.labels import SidLabels
from genrecall.sid.semantic_id import SidSpace, SidTable

TITLES = [
    "Red garden hose 50ft",
    "Blue garden hose",
    "Green garden HOSE, kink-free",
    "Brass hose nozzle",
    "Steel deck screw",
    "Steel wood screw",
    None,
    "Steel nut",
]
PATHS = [["Garden", "Hoses"], ["Garden", "Hoses"], ["Garden", "Hoses"], ["Garden", "Nozzles"], ["Tools", "Screws"], ["Tools", "Screws"], [], None]
TOKENS = [[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 1, 0], [2, 0, 0], [2, 0, 0], [3, 0, 0], [2, 0, 2]]


def labels_of(titles=TITLES, paths=PATHS, tokens=TOKENS, **arguments):
    table = SidTable.from_item_tokens(SidSpace((4, 3, 3), ()), np.array(tokens, dtype=np.int32))
    index = SidIndex.build(table.item_sid, len(table), np.zeros(len(titles)))
    chunked = pa.chunked_array([pa.array(paths[:3], pa.list_(pa.string())), pa.array(paths[3:], pa.list_(pa.string()))])
    return SidLabels(pa.chunked_array([pa.array(titles, pa.string())]), chunked, index, table, **arguments), table


def test_a_path_names_every_prefix_with_its_size():
    labels, table = labels_of()
    row = next(row for row in range(len(table)) if table.text(row) == "<0,0,1>")
    steps = labels.path(row)
    assert [(step.prefix, step.size) for step in steps] == [("<0>", 4), ("<0,0>", 3), ("<0,0,1>", 3)]
    assert steps[2].label.startswith("Hoses: garden, ")


def test_labels_of_sids_are_made_once_and_looked_up_from_then_on():
    labels, table = labels_of()
    made = labels.make_all()
    assert labels.made_before(np.arange(len(table))) == [None] * len(table)
    assert made.to_pylist() == [labels.path(row)[2].label for row in range(len(table))]
    stored, _ = labels_of(titles=[None] * len(TITLES), of_sids=pa.chunked_array([made]))
    assert stored.made_before(np.array([1, 0])) == [made[1].as_py(), made[0].as_py()]
    assert stored.path(0)[2].label == made[0].as_py()
    assert stored.path(0)[1].label != labels.path(0)[1].label  # shorter prefixes are still made from titles, of which there are none here


def test_words_are_ordered_by_their_part_of_the_divergence():
    def weight(count, total, catalogue):
        share = (count + 0.5) / (total + 1)
        return share * math.log(share / ((catalogue + 0.5) / (8 + 1)))

    # Of <0,0,1>'s three titles all hold garden and hose; blue, free, green, kink and red stand in one title each, of eight.
    expected = {
        word: weight(count, 3, catalogue)
        for word, count, catalogue in [("garden", 3, 3), ("hose", 3, 4), *((one, 1, 1) for one in ["blue", "free", "green", "kink", "red"])]
    }
    best = sorted(expected, key=lambda word: (-expected[word], word))[:3]
    labels, table = labels_of()
    row = next(row for row in range(len(table)) if table.text(row) == "<0,0,1>")
    assert labels.path(row)[2].label == "Hoses: " + ", ".join(best)


def test_a_word_of_the_category_is_not_said_twice():
    labels, _ = labels_of(paths=[["Garden hose"]] * 8)
    assert "hose" not in labels.path(0)[2].label.partition(":")[2]


def test_items_without_titles_or_categories_have_an_empty_label():
    labels, table = labels_of()
    row = next(row for row in range(len(table)) if table.text(row) == "<3,0,0>")
    assert [step.label for step in labels.path(row)] == ["", "", ""]
    assert [step.size for step in labels.path(row)] == [1, 1, 1]


def test_a_sid_whose_items_are_all_delisted_has_an_empty_label():
    table = SidTable.from_item_tokens(SidSpace((4, 3, 3), ()), np.array(TOKENS, dtype=np.int32))
    index = SidIndex.build(table.item_sid, len(table), np.zeros(8), np.array([False] * 3 + [True] * 5))
    labels = SidLabels(pa.chunked_array([pa.array(TITLES)]), pa.chunked_array([pa.array(PATHS, pa.list_(pa.string()))]), index, table)
    assert labels.path(0)[2] == ("<0,0,1>", "", 0)


def test_labels_are_kept_up_to_the_capacity_and_made_again_alike():
    labels, table = labels_of(capacity=2)
    every = [labels.path(row) for row in range(len(table))]
    assert len(labels) == 2
    assert [labels.path(row) for row in range(len(table))] == every


@pytest.mark.parametrize("count", [1, 127, 128, 129, 5000])
def test_a_label_reads_a_bounded_sample(count):
    labels, _ = labels_of(["common word"] * count, [["Leaf"]] * count, [[0, 0, 0]] * count)
    looked = []
    take = labels._describe
    labels._describe = lambda rows: looked.append(rows) or take(rows)
    assert labels.path(0)[2].label.startswith("Leaf")
    assert labels.path(0)[2].size == count
    assert {len(rows) for rows in looked} == {min(count, 128)}
    assert all(len(set(rows.tolist())) == len(rows) for rows in looked)


def test_a_look_up_costs_the_same_however_many_chunks_the_labels_were_stored_in():
    count = 20_000
    tokens = np.stack([np.arange(count) // 100, np.arange(count) % 100, np.zeros(count, np.int64)], axis=1)
    table = SidTable.from_item_tokens(SidSpace((200, 100, 3), ()), tokens.astype(np.int32))
    index = SidIndex.build(table.item_sid, len(table), np.zeros(count))
    titles = pa.chunked_array([pa.array([f"thing number {row}" for row in range(begin, begin + 1000)]) for begin in range(0, count, 1000)])
    paths = pa.chunked_array([pa.array([["Things"]] * 1000)] * 20)
    labels = SidLabels(titles, paths, index, table, of_sids=titles)
    labels.path(0)  # counts the catalogue's words, once
    usual, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        assert labels.made_before(np.array([19_999, 0])) == ["thing number 19999", "thing number 0"]
        labels.path(5_000)
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < titles.nbytes / 20
