"""Steps of `index_scale.py` that run in a process of their own, so that their memory can be told apart: building an index, opening it, and building its filters.

Run: python benchmarks/index_steps.py build|open|filters FOLDER THREADS, prints its figures as JSON. Memory is read from /proc (Linux).
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measurement import seconds

from genrecall.sid.filters import FilterPostings
from genrecall.sid.index import load_index, load_sid_table, load_trie
from genrecall.sid.index_builder import SidIndexBuilder
from genrecall.sid.item_ids import ItemIds
from genrecall.sid.semantic_id import SidSpace

BATCH_ITEMS = 1 << 20


def digits(start: int, end: int) -> np.ndarray:
    """The numbers as ids of ten bytes."""
    return ((np.arange(start, end)[:, None] // 10 ** np.arange(9, -1, -1)) % 10 + ord("0")).astype(np.uint8).view("S10")[:, 0]


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def build_step(folder: Path) -> dict[str, float]:
    """Build the index of a written catalogue; runs in a process of its own."""
    sizes = tuple(json.loads((folder / "alphabets.json").read_text()))
    tokens = np.fromfile(folder / "tokens.i32", np.int32).reshape(-1, 3)
    items = (folder / "item_sid.i32").stat().st_size // 4
    before, taken, rng = memory("VmRSS"), 0.0, np.random.default_rng(0)
    builder = SidIndexBuilder((sizes[0], sizes[1], sizes[2]), work_folder=folder)
    with (folder / "item_sid.i32").open("rb") as sid_file, (folder / "prior.f32").open("rb") as prior_file:
        for start in range(0, items, BATCH_ITEMS):
            count = min(BATCH_ITEMS, items - start)
            ids = digits(start, start + count)
            rows = tokens[np.fromfile(sid_file, np.int32, count)]
            prior = np.fromfile(prior_file, np.float32, count)
            taken += seconds(partial(builder.add, ids, rows, prior, rng.integers(0, 20, count)))
    taken += seconds(partial(builder.finish, folder / "sid_index"))
    (folder / "sid_index" / "sid_space.json").write_text(SidSpace((sizes[0], sizes[1], sizes[2])).to_json())
    return {"build_s": taken, "build_peak_bytes": memory("VmHWM") - before}


def open_step(folder: Path) -> dict[str, float]:
    """Open a built index and expand some SIDs; runs in a process of its own."""
    index_folder = folder / "sid_index"
    torch.arange(2) + 1  # what torch loads at its first use is not the index's
    before, private, started = memory("VmRSS"), memory("RssAnon"), time.perf_counter()
    trie, index, ids = load_trie(index_folder), load_index(index_folder), ItemIds.load(index_folder)
    opened = {"open_s": time.perf_counter() - started, "resident_bytes": memory("VmRSS") - before}
    started = time.perf_counter()
    table = load_sid_table(index_folder)
    opened |= {"sid_table_s": time.perf_counter() - started, "resident_with_sid_table_bytes": memory("VmRSS") - before}
    rng = np.random.default_rng(0)
    for _ in range(1_000):
        rows, _ = index.expand(rng.integers(0, len(table), 20).astype(np.int32), 100)
        ids.ids_of(rows)
    trie.find(torch.from_numpy(table.tokens[:100]))
    return opened | {"resident_after_queries_bytes": memory("VmRSS") - before, "private_after_queries_bytes": memory("RssAnon") - private}


def filters_step(folder: Path) -> dict[str, float]:
    """Build the lists of a built index: 1,000 categories of two levels and 60 brands, spread evenly; runs in a process of its own."""
    index, rng, before = load_index(folder / "sid_index"), np.random.default_rng(0), memory("VmRSS")
    categories = [(f"top {number // 50}", f"category {number}") for number in range(1_000)]
    brands = [f"brand {number}" for number in range(60)]
    category_of, brand_of = (rng.integers(0, len(names), index.num_items, dtype=np.int16) for names in (categories, brands))

    def build() -> None:
        FilterPostings.from_codes(category_of, categories, brand_of, brands, index).save(folder / "sid_index" / "filters")

    return {"filters_build_s": seconds(build), "filters_build_peak_bytes": memory("VmHWM") - before}


if __name__ == "__main__":
    step, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps({"build": build_step, "open": open_step, "filters": filters_step}[step](Path(folder))))
