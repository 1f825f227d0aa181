"""What the semantic-ID index costs as the catalogue grows: building, opening, expanding, searching, changing, and placing new items.

Synthetic catalogues of 1e5, 1e6 and 2.1e7 items, about 10.5 items a SID, level sizes 2048 x 1024 x 1024, codes crowded towards the low ones as
catalogues' are. Building and opening run in a fresh process each, whose memory is read from /proc (Linux). Searches and expansions of all sizes take turns within
each repeat, and a ratio is the median over repeats of the ratio within a repeat.

Rows:
- items_N: a catalogue. `cost_ratio_vs_1e5`: search and expansion of a request against those of the smallest, `cpu_ratio_vs_1e5` the same in processor time, which
  other processes on the machine disturb less. `mask_us`, in processor time: children lookup and masked choice alone, at beam 50. `serve_expand_us`: SIDs to items as they
  are served (`Retriever.expand`: some 1,700 items scored and sorted, the best 100 given), `expand_us` the index's part of it. `mask_expand_cpu_ratio_vs_1e5_sids`: `mask_us`
  and `serve_expand_us` together against those of the middle catalogue, whose SIDs are nearest to 1e5 (95,000); `mask_cpu_ratio_vs_1e5_sids` the first alone.
  `disk_bytes` is what serving a search reads; `disk_bytes_with_filters` also the posting lists of request-time filters.
- items_N_pairs: the middle catalogue with 20,000 (code, group) pairs at level 3, and a decoder for them.
- placement: SIDs for new items through Ray Data (`registry.item_placement.assign_items`) against a bare loop that reads, encodes and places the same file. Starting a
  worker costs the same however many items there are; the `marginal` figures leave it out: they are what the items beyond the first file take. Unequal SIDs are not compared.

Run: python benchmarks/index_scale.py [--quick] [--threads 1] [--repeats 21] [--output benchmarks/results/index_scale.json] [--pictures docs/pictures]
     python benchmarks/index_scale.py --parts placement
Parts: storage (built for the next three too), changes, lookup (masks and expansions), search, placement. Records that are measured replace those in the file, others stay.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from decode import retriever_of
from index_steps import digits
from measurement import ONE_NUMBER, commit, machine, quartiles, ratios, seconds, write_tables

from genrecall.encoders.embed import compose_item_text
from genrecall.encoders.text_encoder import load_encoder, save_towers
from genrecall.encoders.towers import NgramTowers
from genrecall.generator.beam_search import beam_search, best_positions
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import pack
from genrecall.generator.prompts import Prompts
from genrecall.generator.retriever import Retriever
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.local_ray import ensure_ray
from genrecall.quantization.residual_quantizer import FrozenQuantizer, load_quantizer
from genrecall.registry.bundle import BundleConfig
from genrecall.registry.item_placement import assign_items
from genrecall.sid.assign import load_assigner
from genrecall.sid.build import SidIndexConfig, publish_sids
from genrecall.sid.index import SidIndex, load_index, load_sid_table, load_trie
from genrecall.sid.index_builder import SidIndexBuilder
from genrecall.sid.item_ids import ItemIds
from genrecall.sid.segments import SegmentedIndex
from genrecall.sid.semantic_id import SidSpace
from genrecall.sid.trie import Trie
from genrecall.storage import Artifact, Stage

BEAM, PROMPT = 50, 32
"""Where one of the two is not what varies."""

PARTS = ("storage", "changes", "lookup", "search", "placement")

_ALL = 2**31 - 1
_MASKED = 20
"""Searches whose lookups are timed together."""

Record = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured; the defaults are the full task."""

    catalogues: tuple[tuple[int, int], ...] = ((100_000, 9_500), (1_000_000, 95_000), (21_000_000, 2_000_000))  # items, SIDs
    level_sizes: tuple[int, int, int] = (2_048, 1_024, 1_024)
    pairs: int = 20_000
    text_vocab_size: int = 8_192
    hidden_size: int = 256
    num_layers: int = 4
    beams: tuple[int, ...] = (10, 20, 50, 100)
    prompts: tuple[int, ...] = (16, 32, 64, 128)
    expanded_sids: int = 160  # some 1,700 items
    queries: int = 200
    changed_items: int = 10_000
    encoder: tuple[int, int, int] = (128, 256, 16_384)  # dimensions, hidden, buckets
    placed_catalogue: int = 50_000
    placed_items: tuple[int, int] = (100_000, 1_000_000)


QUICK = Task(
    catalogues=((400, 60), (2_000, 250)),
    level_sizes=(16, 8, 8),
    pairs=20,
    text_vocab_size=64,
    hidden_size=32,
    num_layers=1,
    beams=(3, 50),
    prompts=(8, 32),
    expanded_sids=20,
    queries=4,
    changed_items=50,
    encoder=(16, 16, 512),
    placed_catalogue=300,
    placed_items=(100, 250),
)


def sid_tokens(sizes: Sequence[int], count: int, rng: np.random.Generator) -> np.ndarray:
    """SIDs int32 [count, 3], sorted and unique; the lower a code, the more SIDs have it."""
    found = np.zeros(0, dtype=np.int64)
    while len(found) < count:
        codes = [np.minimum((size * rng.random(2 * count) ** 2).astype(np.int64), size - 1) for size in sizes]
        found = np.union1d(found, (codes[0] * sizes[1] + codes[1]) * sizes[2] + codes[2])
    keys = np.sort(rng.choice(found, count, replace=False))
    return np.stack([keys // (sizes[1] * sizes[2]), keys // sizes[2] % sizes[1], keys % sizes[2]], axis=1).astype(np.int32)


def write_catalogue(folder: Path, items: int, sids: int, sizes: Sequence[int], rng: np.random.Generator) -> None:
    """The SID and prior score of every item, as raw files that are read a batch at a time; every SID has an item, large ones several times the mean."""
    weights = np.minimum(rng.lognormal(0.0, 0.7, sids), 4.0)
    owners = np.concatenate([np.arange(sids), rng.choice(sids, items - sids, p=weights / weights.sum())]).astype(np.int32)
    folder.mkdir(parents=True)
    sid_tokens(sizes, sids, rng).tofile(folder / "tokens.i32")
    rng.permuted(owners).tofile(folder / "item_sid.i32")
    rng.random(items, dtype=np.float32).tofile(folder / "prior.f32")
    (folder / "alphabets.json").write_text(json.dumps([int(size) for size in sizes]))


def in_fresh_process(step: str, folder: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).parent / "index_steps.py"), step, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} of {folder.name} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def disk_bytes(folder: Path) -> dict[str, int]:
    """Bytes by part; `total` is what serving a search reads, and `item_sid`, which leads from an item back to its SID; `with_filters` adds the filters' lists."""
    parts = {
        "trie": sum(file.stat().st_size for file in (folder / "trie").iterdir()),
        "postings": sum((folder / "index" / f"{name}.npy").stat().st_size for name in ("item_rows", "offsets")),
        "item_sid": (folder / "index" / "item_sid.npy").stat().st_size,
        "prior": (folder / "index" / "prior.npy").stat().st_size,
        "item_logits": (folder / "index" / "item_logits.npy").stat().st_size,
        "item_ids": (folder / "item_ids.npy").stat().st_size,
    }
    total, filters = sum(parts.values()), sum(file.stat().st_size for file in (folder / "filters").iterdir())
    return parts | {"total": total, "filters": filters, "with_filters": total + filters}


def decoder(task: Task, groups: tuple[tuple[int, int], ...] = ()) -> Decoder:
    config = DecoderConfig(
        text_vocab_size=task.text_vocab_size,
        level_sizes=task.level_sizes,
        groups=groups,
        hidden_size=task.hidden_size,
        num_layers=task.num_layers,
        intermediate_size=4 * task.hidden_size,
        max_positions=max(task.prompts) + 8,
    )
    return pack(Decoder(config, seed=0))


def random_prompts(task: Task, length: int) -> Prompts:
    ids = torch.from_numpy(np.random.default_rng(length).integers(0, task.text_vocab_size, (1, length)))
    return Prompts(ids, torch.tensor([length]))


@dataclass(frozen=True)
class Side:
    """One catalogue with the decoder that searches it."""

    name: str
    model: Decoder
    trie: Trie
    index: SidIndex

    def request(self, prompts: Prompts, beam: int) -> np.ndarray:
        """Search and expand: item rows."""
        found = beam_search(self.model, prompts, self.trie, beam_size=beam)
        rows, _ = self.index.expand(found.sid_rows[0].numpy(), _ALL)
        return rows

    def check(self, prompts: Prompts, beam: int) -> None:
        """Exit unless a search gives published SIDs, and their expansion the items that have them."""
        found = beam_search(self.model, prompts, self.trie, beam_size=beam)
        sid_rows = found.sid_rows[0]
        if not torch.equal(self.trie.find(found.tokens[0]).int(), sid_rows):
            raise SystemExit(f"{self.name}: the search gives tokens that are no SIDs; not timing wrong answers")
        items, rank = self.index.expand(sid_rows.numpy(), _ALL)
        if not np.array_equal(self.index.item_sid[items], sid_rows.numpy()[rank]) or len(items) != int(self.index.sizes(sid_rows.numpy()).sum()):
            raise SystemExit(f"{self.name}: the expansion gives items of other SIDs; not timing wrong answers")

    def mask(self, beam: int) -> Callable[[], Any]:
        """Children lookup and masked choice of levels 2 and 3 of 20 searches, over given logits: what the trie adds to the decoder's products."""
        rng, trie = np.random.default_rng(0), self.trie
        tokens1 = torch.from_numpy(rng.choice(np.flatnonzero(trie.level1_valid.numpy()), (_MASKED, 1, beam)))
        nodes = torch.from_numpy(rng.integers(0, len(trie.tokens2), (_MASKED, 1, beam)))
        levels = [
            (trie.children2, trie.tokens2, tokens1, torch.randn(1, beam, trie.alphabet_sizes[1])),
            (trie.children3, trie.tokens3, nodes, torch.randn(1, beam, trie.alphabet_sizes[2])),
        ]

        @torch.inference_mode()
        def choose() -> None:
            for search in range(_MASKED):
                for children_of, tokens, parents, logits in levels:
                    children = children_of(parents[search])
                    scores = logits.gather(-1, tokens[children.ids].long()).masked_fill(~children.valid, -torch.inf).flatten(1)
                    best_positions(scores, children.ids.flatten(1), min(beam, scores.shape[1]))

        return choose


def with_pairs(task: Task, rng: np.random.Generator) -> Side:
    """The middle catalogue with (code, group) pairs: half of its SIDs end in one."""
    codes = task.level_sizes[2]
    space = SidSpace(task.level_sizes, tuple(sorted((number % codes, 1 + number // codes) for number in range(task.pairs))))
    items, sids = task.catalogues[1]
    sizes = (task.level_sizes[0], task.level_sizes[1], 2 * task.level_sizes[2])
    tokens = sid_tokens(sizes, sids, rng)
    high = tokens[:, 2] >= task.level_sizes[2]
    tokens[high, 2] = task.level_sizes[2] + rng.integers(0, task.pairs, int(high.sum()))
    tokens = np.unique(tokens, axis=0)
    owners = rng.integers(0, len(tokens), items).astype(np.int32)
    return Side(
        f"items_{items}_pairs",
        decoder(task, space.groups),
        Trie.from_tokens(tokens, space.alphabet_sizes),
        SidIndex.build(owners, len(tokens), np.zeros(items)),
    )


def measure_storage(task: Task, folder: Path, threads: int, record: Record) -> None:
    """Build and open every catalogue, and build its filters."""
    rng = np.random.default_rng(0)
    for items, sids in task.catalogues:
        place = folder / f"items_{items}"
        write_catalogue(place, items, sids, task.level_sizes, rng)
        for step in ("build", "open", "filters"):
            for metric, value in in_fresh_process(step, place, threads).items():
                record(place.name, metric, [value])
        for part, size in disk_bytes(place / "sid_index").items():
            record(place.name, "disk_bytes" if part == "total" else f"disk_bytes_{part}", [float(size)])


def opened(task: Task, folder: Path) -> list[Side]:
    """The built catalogues, with one decoder."""
    model = decoder(task)
    return [
        Side(f"items_{items}", model, load_trie(folder / f"items_{items}/sid_index"), load_index(folder / f"items_{items}/sid_index"))
        for items, _ in task.catalogues
    ]


def measure_lookup(task: Task, folder: Path, repeats: int, record: Record) -> None:
    """What the trie and the index cost a request beside the decoder, in processor time, the catalogues in turn."""
    sides = opened(task, folder)
    pairs, rng = with_pairs(task, np.random.default_rng(1)), np.random.default_rng(3)
    timed: dict[str, Callable[[], Any]] = {f"{side.name} mask_us": side.mask(BEAM) for side in (*sides, pairs)}
    for side in sides:
        retriever = retriever_of(side.model, side.trie, side.index, load_sid_table(folder / side.name / "sid_index").tokens)
        sids = [rng.choice(len(side.index), task.expanded_sids, replace=False).astype(np.int32) for _ in range(task.queries)]
        scores = [-np.sort(rng.exponential(size=task.expanded_sids)).astype(np.float32) for _ in sids]
        check_served(retriever, sids[0], scores[0], side.name)
        timed[f"{side.name} serve_expand_us"] = partial(each, lambda one, held: held.expand(*one, None, 100), list(zip(sids, scores, strict=True)), retriever)
    _, taken = in_turn(timed, repeats)
    figures = {key: [1e6 * one / (_MASKED if key.endswith("mask_us") else task.queries) for one in values] for key, values in taken.items()}
    for key, values in figures.items():
        record(*key.split(), values)
    together = {
        side.name: [sum(parts) for parts in zip(figures[f"{side.name} mask_us"], figures[f"{side.name} serve_expand_us"], strict=True)] for side in sides
    }
    base = sides[1].name
    for side in sides:
        record(side.name, "mask_cpu_ratio_vs_1e5_sids", ratios(figures[f"{side.name} mask_us"], figures[f"{base} mask_us"]))
        record(side.name, "mask_expand_cpu_ratio_vs_1e5_sids", ratios(together[side.name], together[base]))
    for side in (*sides, pairs):
        for level, most in ((2, side.trie.max_children2), (3, side.trie.max_children3)):
            record(side.name, f"max_children_{level}", [float(most)])


def check_served(retriever: Retriever, sids: np.ndarray, scores: np.ndarray, name: str) -> None:
    """Exit unless the served expansion holds the items of these SIDs, whose probabilities add up to the SIDs'."""
    found, (rows, _) = retriever.expand(sids, scores, None, _ALL), retriever.index.expand(sids, _ALL)
    if not np.array_equal(np.sort(found.item_rows), np.sort(rows)) or not np.isclose(np.exp(found.scores).sum(), np.exp(scores).sum(), rtol=1e-3):
        raise SystemExit(f"{name}: the served expansion gives other items or probabilities than the index holds; not timing wrong answers")


def measure_search(task: Task, folder: Path, repeats: int, record: Record) -> None:
    """Search and expansion, the catalogues in turn."""
    sides = opened(task, folder)
    pairs = with_pairs(task, np.random.default_rng(1))
    prompts = {length: random_prompts(task, length) for length in {*task.prompts, PROMPT}}
    grid = [(beam, PROMPT) for beam in task.beams] + [(BEAM, length) for length in task.prompts if length != PROMPT]
    for side in (*sides, pairs):
        for beam, length in grid:
            side.check(prompts[length], beam)
    first, middle = sides[0].name, sides[1].name
    for beam, length in grid:
        wall, cpu = in_turn({side.name: partial(side.request, prompts[length], beam) for side in (*sides, pairs)}, repeats)
        label = "" if length == PROMPT else f"_prompt_{length}"
        for name in wall:
            record(name, f"request_ms{label}", [1e3 * one for one in wall[name]], beam=beam)
            base, against = (middle, "no_pairs") if name == pairs.name else (first, "1e5")
            for kind, times in (("cost_ratio", wall), ("cpu_ratio", cpu)):
                record(name, f"{kind}_vs_{against}{label}", ratios(times[name], times[base]), beam=beam)


def measure_changes(task: Task, folder: Path, repeats: int, record: Record) -> None:
    """Adding and delisting, and expansion with and without changes."""
    rng = np.random.default_rng(2)
    sides: dict[str, Callable[[], Any]] = {}
    for items, sids in task.catalogues:
        name = f"items_{items}"
        base = SegmentedIndex(load_index(folder / name / "sid_index"))
        ids = ItemIds.load(folder / name / "sid_index")
        taken: dict[str, list[float]] = {"delta_add_s": [], "delta_remove_s": []}
        for _ in range(repeats):
            new_sids, prior = rng.integers(0, sids, task.changed_items).astype(np.int32), rng.random(task.changed_items)
            gone = rng.integers(0, items, task.changed_items)
            started = time.perf_counter()
            changed = base.added(new_sids, prior)
            taken["delta_add_s"].append(time.perf_counter() - started)
            taken["delta_remove_s"].append(seconds(partial(changed.without, gone)))
        changed = changed.without(gone)
        for metric, values in taken.items():
            record(name, metric, values)
        check_changes(base.base, changed, new_sids, prior, gone, items, name)
        queries = [rng.choice(sids, task.expanded_sids, replace=False).astype(np.int32) for _ in range(task.queries)]
        sides[f"{name} expand_us"] = partial(each, lambda one, index: index.expand(one, _ALL), queries, base.base)
        sides[f"{name} expand_with_changes_us"] = partial(each, lambda one, index: index.expand(one, _ALL), queries, changed)
        rows = [base.base.expand(one, 100)[0] for one in queries]
        sides[f"{name} ids_of_100_us"] = partial(each, lambda one, held: held.ids_of(one), rows, ids)
        sides[f"{name} rows_of_50_us"] = partial(each, lambda one, held: held.rows_of(one), [ids.ids_of(one[:50]) for one in rows], ids)
        record(name, "expanded_items", [float(base.base.sizes(one).sum()) for one in queries])
    for key, values in in_turn(sides, repeats)[0].items():
        name, metric = key.split()
        record(name, metric, [1e6 * one / task.queries for one in values])


def each(ask: Callable[[Any, Any], Any], questions: Sequence[Any], of: Any) -> None:
    """Ask every question, one after the other."""
    for question in questions:
        ask(question, of)


def check_changes(base: SidIndex, changed: SegmentedIndex, new_sids: np.ndarray, prior: np.ndarray, gone: np.ndarray, items: int, name: str) -> None:
    """Exit unless the changed SIDs expand as plain lists say."""
    score = {items + row: value for row, value in enumerate(prior.astype(np.float32).tolist())}
    for sid in np.unique(np.concatenate([new_sids[:20], base.item_sid[gone[:20]]])).tolist():
        members = [*base.items(sid).tolist(), *(items + np.flatnonzero(new_sids == sid)).tolist()]
        members = sorted(set(members) - set(gone.tolist()), key=lambda row: (-(score[row] if row >= items else float(base.prior[row])), row))
        if changed.items(sid).tolist() != members:
            raise SystemExit(f"{name}: SID {sid} with changes expands to other items than a plain list; not timing wrong answers")


def in_turn(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall-clock and processor seconds of each side in each repeat; every side runs once before."""
    for side in sides.values():
        side()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.process_time()
            wall[name].append(seconds(side))
            cpu[name].append(time.process_time() - started)
    return wall, cpu


def titles(count: int, rng: np.random.Generator) -> list[str]:
    """Titles of eight words out of 5,000."""
    words = np.array(
        [f"{syllable}{number}" for number in range(500) for syllable in ("lamp", "oak", "steel", "soft", "garden", "mini", "pro", "kids", "red", "set")]
    )
    return [" ".join(row) for row in words[(len(words) * rng.random((count, 8)) ** 2).astype(int)]]


def placement_bundle(task: Task, folder: Path) -> Artifact:
    """A bundle for `assign_items`: an untrained encoder, codebooks drawn from the items, the SIDs of a catalogue, and a small untrained decoder."""
    rng = np.random.default_rng(3)
    torch.manual_seed(0)
    stage = Stage(kind="bundle", uri=str(folder / "bundle"), config=BundleConfig(), algorithm_version=1, parents={}, seed=0, job="index_scale")
    with stage.write() as draft:
        save_towers(NgramTowers(dim=task.encoder[0], hidden=task.encoder[1], num_buckets=task.encoder[2]), draft.path / "encoder")
        shown = titles(task.placed_catalogue, rng)
        vectors = load_encoder(draft.path / "encoder").encode_items(shown)
        residuals, books = vectors, []
        for size in task.level_sizes:
            books.append(torch.from_numpy(residuals[rng.choice(len(residuals), min(size, len(residuals)), replace=False)]))
            one_level = FrozenQuantizer(None, [books[-1]] * 3, None, input_dim=vectors.shape[1])
            nearest = one_level.place(residuals, [()] * len(residuals))[0][:, 0]
            residuals = residuals - books[-1].numpy()[nearest]
        quantizer = FrozenQuantizer(None, books, None, input_dim=vectors.shape[1])
        (draft.path / "quantizer").mkdir()
        quantizer.save(draft.path / "quantizer")
        codes, left = quantizer.place(vectors, [()] * len(vectors))
        published = publish_sids(SidIndexConfig(), quantizer, codes, left, np.ones(len(vectors), bool))
        sid_index = draft.path / "sid_index"
        builder = SidIndexBuilder(published.table.space.alphabet_sizes)
        item_ids = digits(0, len(vectors))
        builder.add(item_ids, published.table.tokens[published.table.item_sid], np.zeros(len(vectors)))
        builder.finish(sid_index)
        (sid_index / "sid_space.json").write_text(published.table.space.to_json())
        np.save(sid_index / "centers.npy", published.centers)
        save_generator(draft.path / "generator", published.table.space)
        empty = {"category_path": pa.array([[]] * len(shown), pa.list_(pa.string())), "brand": [""] * len(shown), "price": [0.0] * len(shown)}
        pq.write_table(pa.table({"item_id": item_ids.astype(str), "title": shown, **empty}), draft.path / "items.parquet")
        (draft.path / "metrics.json").write_text("{}")
        about = {"max_items_per_sid": SidIndexConfig().max_items_per_sid, "stage": "stage2", "support": "level"}
        (draft.path / "bundle.json").write_text(json.dumps(about))
    return stage.open()


def save_generator(folder: Path, space: SidSpace) -> None:
    """An untrained decoder of these SIDs, as small as may be, in `stage`, beside what makes its prompts."""
    tokenizer = QueryTokenizer.train(["word"] * 3, 300)
    config = DecoderConfig(
        text_vocab_size=tokenizer.vocab_size,
        level_sizes=space.level_sizes,
        groups=space.groups,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=48,
        max_positions=64,
    )
    (folder / "stage").mkdir(parents=True)
    Decoder(config, seed=0).save_pretrained(folder / "stage")
    PromptBuilder(tokenizer, config.level_offsets, soft_prompt=False).save(folder)


def bare_loop(bundle: Path, items: Path, batch: int = 4096) -> dict[str, int]:
    """Read, encode and place by hand: the SID row of each id."""
    encoder, quantizer = load_encoder(bundle / "encoder"), load_quantizer(bundle / "quantizer")
    assigner = load_assigner(quantizer=bundle / "quantizer", sid_index=bundle / "sid_index")
    found: dict[str, int] = {}
    for part in pq.ParquetFile(items).iter_batches(batch):
        vectors = encoder.encode_items([compose_item_text(title) for title in part["title"].to_pylist()])
        codes, residuals = quantizer.place(vectors, [()] * len(part))
        found.update(zip(part["item_id"].to_pylist(), assigner.assign_placed(codes, residuals).tolist(), strict=True))
    return found


def measure_placement(task: Task, folder: Path, repeats: int, record: Record) -> None:
    """Ray Data against the bare loop, in turn, over a smaller and a larger file."""
    bundle = placement_bundle(task, folder)
    files = {}
    for count in task.placed_items:
        files[count] = folder / f"new_{count}.parquet"
        ids = pa.array([f"new{number:08d}" for number in range(count)])
        pq.write_table(pa.table({"item_id": ids, "title": titles(count, np.random.default_rng(4))}), files[count], row_group_size=16_384)
    ensure_ray(num_cpus=2)
    times: dict[tuple[str, int], list[float]] = {(side, count): [] for side in ("ray", "bare") for count in task.placed_items}
    for repeat in range(repeats):
        for count, file in files.items():
            started = time.perf_counter()
            expected = bare_loop(bundle.path, file)
            times["bare", count].append(time.perf_counter() - started)
            output = folder / f"placed_{repeat}_{count}"
            started = time.perf_counter()
            assign_items(bundle, str(file), output)
            times["ray", count].append(time.perf_counter() - started)
            placed = pq.read_table(output / "placed.parquet")
            if dict(zip(placed["item_id"].to_pylist(), placed["sid_row"].to_pylist(), strict=True)) != expected:
                raise SystemExit("placement: Ray Data and the bare loop give other SIDs; not comparing the rate of unequal answers")
    small, large = task.placed_items
    rates = {}
    for side in ("ray", "bare"):
        record("placement", f"{side}_items_per_s", [large / one for one in times[side, large]])
        extra = [more - fewer for more, fewer in zip(times[side, large], times[side, small], strict=True)]
        rates[side] = [(large - small) / one for one in extra]
        record("placement", f"{side}_marginal_items_per_s", rates[side])
    record("placement", "ray_share_of_bare_rate", ratios(times["bare", large], times["ray", large]))
    record("placement", "ray_share_of_bare_marginal_rate", ratios(rates["ray"], rates["bare"]))


def draw(records: Sequence[dict[str, Any]], task: Task, folder: Path) -> None:
    """Curves of a request's cost against catalogue size, beam and prompt length."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {(one["row"], one["metric"], one["beam"]): (one["low"], one["value"], one["high"]) for one in records}
    names = [f"items_{items}" for items, _ in task.catalogues]

    def label(length: int) -> str:
        return "request_ms" if length == PROMPT else f"request_ms_prompt_{length}"

    lines: dict[str, tuple[str, list[int], dict[str, list[tuple[float, float, float]]]]] = {
        "catalogue": (
            "items in the catalogue",
            [items for items, _ in task.catalogues],
            {f"beam {beam}": [value[name, "request_ms", beam] for name in names] for beam in task.beams},
        ),
        "beam": (
            "beam",
            list(task.beams),
            {f"{int(name.removeprefix('items_')):,} items": [value[name, "request_ms", beam] for beam in task.beams] for name in names},
        ),
        "prompt": (
            "tokens in the prompt",
            list(task.prompts),
            {f"{int(name.removeprefix('items_')):,} items": [value[name, label(length), BEAM] for length in task.prompts] for name in names},
        ),
    }
    for name, (axis, places, curves) in lines.items():
        figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
        for text, points in curves.items():
            low, middle, high = zip(*points, strict=True)
            axes.plot(places, middle, marker="o", label=text)
            axes.fill_between(places, low, high, alpha=0.2)
        axes.set(xlabel=axis, ylabel="search and expansion, ms", xscale="log" if name == "catalogue" else "linear", ylim=(0, None))
        figure.legend(fontsize="small", loc="outside right upper")
        figure.savefig(folder / f"index_scale_{name}.png", dpi=120)
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny catalogues, for correctness only; writes no file unless --output or --pictures is given")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--placement-repeats", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; catalogues are built for all but placement alone")
    parser.add_argument("--work", type=Path, help="where the catalogues go, 1.5 GB in full; the system's temporary folder by default")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args(arguments)
    task = QUICK if options.quick else Task()
    repeats, placement_repeats = (1, 1) if options.quick else (options.repeats, options.placement_repeats)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    common = {
        "threads": options.threads,
        "machine": machine(np, pa, ray),
        "command": " ".join(["python", "benchmarks/index_scale.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": commit(),
    }
    print(f"{common['machine']}, {options.threads} threads, medians of {repeats} (quartiles)")
    records: list[dict[str, Any]] = []

    def record(row: str, metric: str, values: list[float], *, batch: int = 1, beam: int = BEAM) -> None:
        low, middle, high = quartiles(values)
        records.append(
            {"table": "index_scale", "row": row, "metric": metric, "value": middle, "low": low, "high": high, "batch": batch, "beam": beam, **common}
        )
        print(f"{row:22} beam {beam:4} {metric:38} {middle:16,.3f} ({low:,.3f} to {high:,.3f})", flush=True)

    try:
        with tempfile.TemporaryDirectory(dir=options.work) as temporary:
            folder = Path(temporary)
            if set(options.parts) != {"placement"}:
                measure_storage(task, folder, options.threads, record)
            for name, measure in (("changes", measure_changes), ("lookup", measure_lookup), ("search", measure_search)):
                if name in options.parts:
                    measure(task, folder, repeats, record)
            if "placement" in options.parts:
                measure_placement(task, folder, placement_repeats, record)
    finally:
        torch.set_num_threads(before)
    here = Path(__file__).parent
    output = options.output or (None if options.quick else here / "results" / "index_scale.json")
    if output:
        write_tables(output, records, by=ONE_NUMBER)
    pictures = options.pictures or (None if options.quick else here.parent / "docs" / "pictures")
    if pictures and "search" in options.parts:
        draw(records, task, pictures)
    return records


if __name__ == "__main__":
    main()
