"""A hand-made line of artifacts for evaluation: a small log, an untrained encoder, known SIDs and untrained generators, one guided."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.data.schema import ITEMS, REQUESTS
from genrecall.encoders.embed import embed_catalog, load_item_embeddings
from genrecall.encoders.text_encoder import load_encoder, save_towers
from genrecall.encoders.towers import NgramTowers
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.generator_config import GeneratorConfig
from genrecall.generator.lexicon import build_lexicon
from genrecall.generator.model import Decoder
from genrecall.generator.sft import build_decoder, train_tokenizer
from genrecall.generator.training_data import make_prompt_builder
from genrecall.sid.index import SidIndex, load_index, load_sid_table
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie
from genrecall.storage import Artifact, Stage

KINDS = ("bracket", "faucet", "drill", "lamp", "carpet")
COLOURS = ("red", "blue", "green", "black", "white", "brass")


@dataclass(frozen=True)
class Config:
    """Stands for any stage's config."""

    name: str = ""
    source: str = "test"


Fill = Callable[[Path], None]
Request = dict[str, Any]


def write(uri: Path, kind: str, fill: Fill, *, parents: dict[str, Artifact] | None = None, name: str = "") -> Artifact:
    stage = Stage(kind=kind, uri=str(uri), config=Config(name), algorithm_version=1, parents=parents or {}, seed=0, job=f"train_{kind}")
    with stage.write() as draft:
        fill(draft.path)
    return stage.open()


def request(number: int, query: str, clicked: Sequence[int], **columns: Any) -> Request:
    """One row of the requests table; `clicked` are item rows, all columns may be overridden."""
    exposed = [f"i{row:03d}" for row in columns.pop("exposed", clicked)]
    row = {
        "request_id": f"r{number}",
        "user_id": f"u{number % 7}",
        "timestamp": None,
        "sequence": number,
        "query": query,
        "gender": None,
        "age_band": None,
        "exposed": exposed,
        "grades": [None] * len(exposed),
        "clicked": [f"i{item:03d}" for item in clicked],
        "purchased": [],
        "history": [],
    }
    return row | columns


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Artifact]:
    """`make_dataset(uri, {"train": [...], ...}, split=..., query_kind=...)` writes a dataset artifact of 30 items."""

    def make(uri: Path, requests: dict[str, list[Request]], *, split: str = "time", query_kind: str = "real", source: str = "shop") -> Artifact:
        def fill(folder: Path) -> None:
            items = [
                {
                    "item_id": f"i{row:03d}",
                    "title": f"{colour} {kind}",
                    "category_path": ["shop", kind],
                    "brand": "acme",
                    "text": "",
                    "price": 1.0,
                    "prior_score": 0.0,
                }
                for row, (kind, colour) in enumerate((kind, colour) for kind in KINDS for colour in COLOURS)
            ]
            (folder / "items").mkdir()
            pq.write_table(pa.Table.from_pylist([{**item, "first_seen": None} for item in items], schema=ITEMS), folder / "items" / "part-0.parquet")
            for name in ("train", "validation", "test"):
                (folder / "requests" / name).mkdir(parents=True)
                pq.write_table(pa.Table.from_pylist(requests.get(name, []), schema=REQUESTS), folder / "requests" / name / "part-0.parquet")
            counts = {name: len(requests.get(name, [])) for name in ("train", "validation", "test")}
            stats = {"source": source, "query_kind": query_kind, "split": split, "items": 30, "requests": counts, "test_requests_left_out": 0}
            (folder / "stats.json").write_text(json.dumps(stats))

        return write(uri, "dataset", fill)

    return make


@pytest.fixture(scope="session")
def log() -> dict[str, list[Request]]:
    """A clean log by time: 60 training, 20 validation and 30 test requests; test queries partly unseen, partly graded."""
    rng = np.random.default_rng(0)

    def one(number: int, *, split: str) -> Request:
        row = int(rng.integers(0, 30))
        kind, colour = KINDS[row // 6], COLOURS[row % 6]
        query = kind if rng.random() < 0.5 else f"{colour} {kind}" if split != "test" or number % 3 else f"{colour} {kind} zzz"
        other = (row + 1) % 30
        grades = [3.0, 1.0] if split == "test" and number % 2 else [None, None]
        extra = {"purchased": [f"i{row:03d}"]} if number % 4 == 0 else {}
        return request(number, query, [row], exposed=[row, other], grades=grades, **extra)

    bounds = {"train": range(60), "validation": range(60, 80), "test": range(80, 110)}
    return {split: [one(number, split=split) for number in numbers] for split, numbers in bounds.items()}


@dataclass(frozen=True)
class Line:
    """Artifacts made from one another; two variants, of which `cqsid` is guided."""

    dataset: Artifact
    encoder: Artifact
    sid_indexes: dict[str, Artifact]
    generators: dict[str, Artifact]
    aligned: Artifact


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Artifact], log: dict[str, list[Request]]) -> Line:
    root = tmp_path_factory.mktemp("line")
    torch.manual_seed(0)
    dataset = make_dataset(root / "dataset", log)
    catalog = load_catalog(dataset)

    def fill_encoder(folder: Path) -> None:
        save_towers(NgramTowers(dim=16, hidden=16, num_buckets=512), folder)
        embed_catalog(load_encoder(folder), catalog, folder)

    encoder = write(root / "encoder", "encoder", fill_encoder, parents={"dataset": dataset})
    embeddings = load_item_embeddings(encoder.path)
    indexes, generators, models = {}, {}, {}
    rows = np.arange(30)
    codes = {"cqsid": [rows // 6, rows % 6 // 2, rows * 0], "rqvae": [rows % 5, rows // 10, rows * 0]}
    small = GeneratorConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=48)
    for variant, levels in codes.items():
        config = dataclasses.replace(small, guided=variant == "cqsid")
        table = SidTable.from_item_tokens(SidSpace((6, 6, 2)), np.stack(levels, axis=1).astype(np.int32))

        def fill_index(folder: Path, table: SidTable = table) -> None:
            (folder / "sid_space.json").write_text(table.space.to_json())
            index = SidIndex.build(table.item_sid, len(table), np.zeros(30))
            index.save(folder / "index")
            Trie.from_tokens(table.tokens, table.space.alphabet_sizes).with_items(embeddings[index.item_rows], index.offsets).save(folder / "trie")
            (folder / "stats.json").write_text(json.dumps({"items_per_sid": 2.0, "gini": 0.0}))

        indexes[variant] = write(root / variant / "sid_index", "sid_index", fill_index, parents={"dataset": dataset}, name=variant)
        loaded = load_sid_table(indexes[variant].path)
        tokenizer = train_tokenizer(config, catalog, load_requests(dataset, "train", catalog))
        lexicon = build_lexicon(catalog, load_index(indexes[variant].path).item_rows, tokenizer, np.ones(30, dtype=bool)) if config.guided else None
        models[variant] = model = build_decoder(config, tokenizer, loaded, 16, lexicon)
        builder = make_prompt_builder(config, tokenizer, model.config.level_offsets, loaded, embeddings, np.ones(30, dtype=bool))

        def fill_generator(folder: Path, model: Decoder = model, builder: PromptBuilder = builder, support: str = config.support) -> None:
            builder.save(folder)
            (folder / "training.json").write_text(json.dumps({"support": support}))
            for stage in ("stage2", "stage3"):
                model.save_pretrained(folder / stage)

        parents = {"dataset": dataset, "encoder": encoder, "sid_index": indexes[variant]}
        generators[variant] = write(root / variant / "generator", "generator", fill_generator, parents=parents, name=variant)

    def fill_aligned(folder: Path) -> None:
        models["cqsid"].save_pretrained(folder / "stage4")
        health = [{"step": float(step), "reward": 0.1 * step, "kl": 0.01, "valid_rate": 1.0, "entropy_1": 2.0} for step in range(4)]
        pq.write_table(pa.Table.from_pylist(health), folder / "health.parquet")
        (folder / "training.json").write_text(json.dumps({"support": "trie", "stopped": "reward <b>sinks</b>", "kept_step": 1}))

    aligned = write(root / "aligned", "aligned", fill_aligned, parents={"generator": generators["cqsid"]})
    return Line(dataset, encoder, indexes, generators, aligned)
