"""What request-time filters cost: search and expansion with a filter over the same without, and the time to resolve a filter that is not cached.

The decoder is the reference task's of `decode.py` (4 layers, d 256, level sizes 2048 x 1024 x 1024, clustered SIDs), untrained and unguided, with packed weights; requests
go through `Retriever.recall`, prompts of 34 tokens, at most 100 items an answer. Sides take turns within each repeat; ratios are of the same repeat. Times are the CPU time of the
process: with one thread that is the time a request takes, and other work on the machine disturbs it less than the clock.

Filters of three selectivities and two kinds:
- category: 20 categories of 50 below each; nine items in ten are in the category that their SID belongs to, as with CQ-SID, so that what passes lies together.
- brand: drawn independently of SIDs, so that what passes lies everywhere.

`filtered_cost_ratio` cached: each request has a filter of its own, and all are in the cache. Cold: none is. "rest cached": each request also excludes 200 items of its own, which
no cache can know. `cold_ms` is one filter's resolution, masks included. An answer that holds an item which fails, lacks a passing item of
its SIDs, or has fewer SIDs than pass and the beam takes, ends the run.

Run: python benchmarks/filters.py [--quick] [--full] [--threads 1] [--repeats 15] [--output benchmarks/results/index_scale.json]
(--full: also 2.1e7 items in 2e6 SIDs; 2 GB of memory.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import Task, sid_tokens
from measurement import Recorder, cpu_seconds, ratios

from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.filter_cache import FilterCache
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import pack
from genrecall.generator.retriever import Retriever
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.sid.filters import Filter, FilterPostings
from genrecall.sid.index import SidIndex
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie

BEAM = 50
LIMIT = 100
EXCLUDED = 200
CHECKED = 4
"""Answers of each batch that are compared with the catalogue before it is timed."""
TOPS, LEAVES = 20, 50
LARGE_BRANDS, SMALL_BRANDS = 40, 20
"""Of 2.45 % and 0.1 % of the items each."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A catalogue of `items_per_sid` times `task.num_sids` items."""

    name: str
    task: Task
    items_per_sid: float = 10.5


REFERENCE = Scale(name="1e5 SIDs", task=Task())
LARGE = Scale(name="2e6 SIDs", task=replace(Task(), num_sids=2_000_000))
QUICK = Scale(name="quick", task=replace(Task(), level_sizes=(64, 32, 32), hidden_size=32, num_layers=2, num_sids=2_000, batches=(1, 2)))


class Shop:
    """A synthetic catalogue with its retriever and posting lists."""

    def __init__(self, scale: Scale, rng: np.random.Generator) -> None:
        task = scale.task
        tokens = sid_tokens("clustered", task, rng)
        items = int(scale.items_per_sid * len(tokens))
        item_sid = rng.integers(0, len(tokens), items, dtype=np.int32)
        stray = rng.random(items) < 0.1
        self.category = np.where(stray, rng.integers(0, TOPS * LEAVES, items), item_sid.astype(np.int64) * (TOPS * LEAVES) // len(tokens))
        share = np.concatenate([np.full(LARGE_BRANDS, 0.0245), np.full(SMALL_BRANDS, 0.001)])
        self.brand = np.searchsorted(np.cumsum(share)[:-1], rng.random(items), side="right")
        self.index = SidIndex.build(item_sid, len(tokens), rng.random(items, dtype=np.float32))
        self.paths = [(f"top {number // LEAVES}", f"category {number}") for number in range(TOPS * LEAVES)]
        self.brands = [f"brand {number}" for number in range(LARGE_BRANDS + SMALL_BRANDS)]
        self.postings = FilterPostings.from_codes(self.category, self.paths, self.brand, self.brands, self.index)
        words = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(400)]
        tokenizer = QueryTokenizer.train(words * 3, 4_096)
        self.queries = [" ".join(rng.choice(words, 40)) for _ in range(max(task.batches))]
        config = DecoderConfig(
            text_vocab_size=tokenizer.vocab_size,
            level_sizes=task.level_sizes,
            hidden_size=task.hidden_size,
            num_layers=task.num_layers,
            intermediate_size=4 * task.hidden_size,
            max_positions=64,
        )
        self.trie = Trie.from_tokens(tokens, config.alphabet_sizes)
        builder = PromptBuilder(tokenizer, config.level_offsets, soft_prompt=False)
        table = SidTable(SidSpace(task.level_sizes), tokens, item_sid)
        cache = FilterCache(self.postings, self.trie)
        self.retriever = Retriever(pack(Decoder(config, seed=0)), builder, self.trie, self.index, table, None, personalised=False, filters=cache)

    def recall(self, filters: Sequence[Filter | None], *, limit: int = LIMIT, cold: bool = False) -> list[Any]:
        count = len(filters)
        retriever = self.retriever.with_index(self.index, FilterCache(self.postings, self.trie)) if cold else self.retriever
        nothing, no_history = [None] * count, [np.zeros(0, np.int32)] * count
        return retriever.recall(self.queries[:count], nothing, nothing, no_history, beam_size=BEAM, limit=limit, filters=filters)

    def passes(self, wanted: Filter, rows: np.ndarray) -> np.ndarray:
        """Whether items meet a filter, by the catalogue's columns."""
        paths = np.array([any(path[: len(one)] == one for one in wanted.categories) or not wanted.categories for path in self.paths])
        brands = np.array([brand in wanted.brands or not wanted.brands for brand in self.brands])
        return np.asarray(paths[self.category[rows]] & brands[self.brand[rows]] & ~np.isin(rows, wanted.excluded))


def some_filters(kind: str, percent: float, count: int, rng: np.random.Generator) -> list[Filter]:
    """`count` different filters that each admit about `percent` of the items."""
    found: dict[Filter, None] = {}
    while len(found) < count:
        if kind == "category":
            tops = rng.choice(TOPS, max(1, round(TOPS * percent / 100)), replace=False)
            leaf = int(rng.integers(0, TOPS * LEAVES))
            paths = [(f"top {leaf // LEAVES}", f"category {leaf}")] if percent < 1 else [(f"top {number}",) for number in tops]
            found[Filter(categories=tuple(paths))] = None
        else:
            large = rng.choice(LARGE_BRANDS, max(1, round(LARGE_BRANDS * percent / 100)), replace=False)
            numbers = LARGE_BRANDS + rng.integers(0, SMALL_BRANDS, 1) if percent < 1 else large
            found[Filter(brands=tuple(f"brand {number}" for number in numbers))] = None
    return list(found)


def require_exact(shop: Shop, filters: Sequence[Filter]) -> None:
    """Exit unless cached and cold answers are the same and hold the passing items, and no others, of as many SIDs with passing items as the beam takes."""
    everything = len(shop.postings)
    rows = np.arange(everything)
    for wanted, answer, again in zip(filters, shop.recall(filters, limit=everything), shop.recall(filters, limit=everything, cold=True), strict=True):
        passing = shop.passes(wanted, rows)
        sids = np.zeros(len(shop.index), dtype=bool)
        sids[answer.sid_rows] = True
        expected = rows[passing & sids[shop.index.item_sid]]
        admitted = np.bincount(shop.index.item_sid[passing], minlength=len(shop.index)) > 0
        whole = np.array_equal(np.sort(answer.item_rows), expected) and np.count_nonzero(sids) == min(BEAM, np.count_nonzero(admitted))
        if not whole or not np.array_equal(answer.item_rows, again.item_rows):
            raise SystemExit(f"{wanted}: the filtered answer is not exact; not measuring what it costs")


def measure(scale: Scale, repeats: int, record: Callable[..., None]) -> None:
    """Time all rows of one scale and hand each figure to `record`."""
    rng = np.random.default_rng(0)
    shop = Shop(scale, rng)
    lists = (shop.postings.categories, shop.postings.brands)
    held = sum(one.places.nbytes + one.offsets.nbytes + one.keys.text.nbytes + one.keys.offsets.nbytes for one in lists) + shop.postings.category_of.nbytes
    record(scale.name, "postings_bytes_per_item", [held / len(shop.postings)], batch=1)
    for kind in ("category", "brand"):
        for percent in (50.0, 5.0, 0.1):
            row = f"{scale.name}, {kind} {percent:g} %"
            filters = some_filters(kind, percent, max(scale.task.batches), rng)
            record(row, "passing_percent", [100 * shop.postings.resolve(one).count / len(shop.postings) for one in filters], batch=1)
            cold = [cpu_seconds(lambda one=one: FilterCache(shop.postings, shop.trie).get(one)) for one in (filters * repeats)[:repeats]]
            record(row, "cold_ms", [1e3 * one for one in cold], batch=1)
            for batch in scale.task.batches:
                compare(shop, filters[:batch], row, repeats, record, rng)


def compare(shop: Shop, filters: list[Filter], row: str, repeats: int, record: Callable[..., None], rng: np.random.Generator) -> None:
    """Time a batch without filters, with cached ones, with cold ones, and with cached ones and excluded items."""
    batch = len(filters)
    require_exact(shop, filters[:CHECKED])

    def with_excluded() -> list[Filter]:
        return [replace(one, excluded=tuple(rng.integers(0, len(shop.postings), EXCLUDED).tolist())) for one in filters]

    require_exact(shop, with_excluded()[:CHECKED])
    shopper = iter([with_excluded() for _ in range(repeats)])
    sides: dict[str, Callable[[], Any]] = {
        "unfiltered": lambda: shop.recall([None] * batch),
        "cached": lambda: shop.recall(filters),
        "cold": lambda: shop.recall(filters, cold=True),
        "rest cached": lambda: shop.recall(next(shopper)),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(cpu_seconds(side))
    record(row, "unfiltered_ms", [1e3 * one for one in times["unfiltered"]], batch=batch, beam=BEAM)
    for name in ("cached", "cold", "rest cached"):
        record(f"{row}, {name}", "filtered_cost_ratio", ratios(times[name], times["unfiltered"]), batch=batch, beam=BEAM)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny catalogue, for correctness only; writes no file unless --output is given")
    parser.add_argument("--full", action="store_true", help="also 2.1e7 items")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    repeats = 1 if options.quick else options.repeats
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    record = Recorder("filters", ["benchmarks/filters.py", *(sys.argv[1:] if arguments is None else arguments)], np)
    print(f"{record.common['machine']}, {options.threads} threads, medians of {repeats} (quartiles)")
    try:
        for scale in [QUICK] if options.quick else [REFERENCE, *([LARGE] if options.full else [])]:
            measure(scale, repeats, partial(record, threads=options.threads))
    finally:
        torch.set_num_threads(before)
    output = options.output or (None if options.quick else Path(__file__).parent / "results" / "index_scale.json")
    if output:
        record.write(output)
    return record.records


if __name__ == "__main__":
    main()
