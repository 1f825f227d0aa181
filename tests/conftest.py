"""Fixtures shared by all tests: one Ray cluster and one tiny pipeline run for the whole session, and the real data where it is."""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genrecall.config import Places
from genrecall.pipeline import Pipeline
from genrecall.recipes import RECIPES
from genrecall.tracking import use_tracking

os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, started once."""
    import ray

    from genrecall.local_ray import ensure_ray

    ensure_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("home_depot")` is the folder of that data set; the test skips where it is absent."""
    root = Path(os.environ.get("GENRECALL_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"real data {name!r} not found under {root}; set GENRECALL_DATA to run this test")
        return root / name

    return find


@pytest.fixture(scope="session")
def untrained_line(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`untrained_line(seed=0, recall=0.5)` is a bundle of 40 items whose guided decoder never trained: real artifacts, made in a second, no Ray.

    Bundles of different seeds answer differently. `untrained_line.parts(...)` are the artifacts that it is made of.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from genrecall.data.catalog import load_catalog
    from genrecall.data.schema import ITEMS, REQUESTS
    from genrecall.encoders.embed import embed_catalog, load_item_embeddings
    from genrecall.encoders.text_encoder import load_encoder, save_towers
    from genrecall.encoders.towers import NgramTowers
    from genrecall.generator.decoder_config import DecoderConfig
    from genrecall.generator.examples import PromptBuilder
    from genrecall.generator.lexicon import build_lexicon
    from genrecall.generator.model import Decoder
    from genrecall.generator.tokenizer import QueryTokenizer
    from genrecall.quantization.residual_quantizer import FrozenQuantizer
    from genrecall.registry.bundle import BundleConfig, build_bundle
    from genrecall.sid.build import SidIndexConfig, build_sid_index
    from genrecall.sid.index import load_index, load_sid_table
    from genrecall.storage import Artifact, Stage

    root = tmp_path_factory.mktemp("untrained_line")
    things = ("angle bracket", "garden hose", "shower faucet", "deck screw", "<b>bold</b> lamp")
    titles = [f"{colour} {thing}" for thing in things for colour in ("steel", "red", "blue", "small", "large", "long", "short", "white")]
    queries = ["angle bracket", "hose for the garden", "faucet", ""]

    def made(kind: str, name: str, fill: Callable[[Path, dict[str, int]], None], *, seed: int = 0, **parents: Artifact) -> Artifact:
        config = BundleConfig(seed=seed)
        stage = Stage(kind=kind, uri=str(root / name), config=config, algorithm_version=1, parents=parents, seed=seed, job=f"make_{kind}")
        if done := stage.current():
            return done
        with stage.write() as draft:
            fill(draft.path, draft.row_counts)
        return stage.open()

    def fill_dataset(folder: Path, counts: dict[str, int]) -> None:
        items = [
            {"item_id": f"i{row:02d}", "title": title, "category_path": ["Home", things[row // 8]], "brand": "Acme", "text": "sturdy", "price": float(row)}
            for row, title in enumerate(titles)
        ]
        lists = {"exposed": ["i00", "i01"], "grades": [None, None], "clicked": ["i00"], "purchased": [], "history": []}
        requests = [{"request_id": f"r{row}", "sequence": row, "query": query, **lists} for row, query in enumerate(queries)]
        for name, rows, schema in (("items", items, ITEMS), *((f"requests/{split}", requests, REQUESTS) for split in ("train", "validation"))):
            (folder / name).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name / "part-0.parquet")

    dataset = made("dataset", "dataset", fill_dataset)
    torch.manual_seed(0)

    def fill_encoder(folder: Path, counts: dict[str, int]) -> None:
        save_towers(NgramTowers(dim=16, hidden=16, num_buckets=512), folder)
        embed_catalog(load_encoder(folder), load_catalog(dataset), folder)

    encoder = made("encoder", "encoder", fill_encoder, dataset=dataset)
    books = [torch.randn(size, 16) / 4 for size in (4, 3, 3)]

    def fill_quantizer(folder: Path, counts: dict[str, int]) -> None:
        frozen = FrozenQuantizer(None, books, None, input_dim=16)
        frozen.save(folder)
        codes, residuals = frozen.place(load_item_embeddings(encoder.path), [()] * len(titles))
        np.save(folder / "codes.npy", codes)
        np.save(folder / "residuals.npy", residuals.astype(np.float16))

    quantizer = made("quantizer", "quantizer", fill_quantizer, dataset=dataset, encoder=encoder)
    inputs = {"dataset": dataset, "encoder": encoder}
    sid_index = build_sid_index(SidIndexConfig(max_items_per_sid=5), **inputs, quantizer=quantizer, uri=str(root / "sid_index"))
    inputs["sid_index"] = sid_index
    space = load_sid_table(sid_index.path).space

    def fill_generator(folder: Path, counts: dict[str, int]) -> None:
        seed = int(folder.name.split(".")[1].removeprefix("generator"))
        tokenizer = QueryTokenizer.train(titles + queries, 300, genders=["f", "m"], age_bands=["18-24"])
        lexicon = build_lexicon(load_catalog(dataset), load_index(sid_index.path).item_rows, tokenizer, np.ones(len(titles), dtype=bool))
        config = DecoderConfig(
            text_vocab_size=tokenizer.vocab_size,
            level_sizes=space.level_sizes,
            groups=space.groups,
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=48,
            soft_prompt_dim=16,
            guide_sharpness=1.0,  # little, so that what differs between seeds decides
            guide_lexical=0.5,
            guide_items=len(titles),
            guide_entries=len(lexicon.item_tokens),
            max_positions=128,
        )
        model = Decoder(config, seed=seed)
        assert model.guidance is not None
        model.guidance.set_lexicon(lexicon)
        (folder / "stage3").mkdir()
        model.save_pretrained(folder / "stage3")
        PromptBuilder(tokenizer, config.level_offsets, max_history=4).save(folder)
        (folder / "training.json").write_text(json.dumps({"support": "trie"}))

    def parts(seed: int = 0, recall: float = 0.5) -> dict[str, Any]:
        generator = made("generator", f"generator{seed}", fill_generator, seed=seed, **inputs)
        record = {"table": "channels", "dataset": "toy", "row": "generative", "metric": "recall@100", "slice": "", "n": 4}
        metrics = {"dataset": "toy", "dataset_hash": dataset.hash, "records": [record | {"value": recall, "low": recall - 0.01, "high": recall + 0.01}]}
        evaluation = made(
            "evaluation",
            f"evaluation{seed}-{recall}",
            lambda folder, _: (folder / "metrics.json").write_text(json.dumps(metrics)) and None,
            **inputs,
            generator=generator,
        )
        return {**inputs, "quantizer": quantizer, "generator": generator, "evaluation": evaluation, "aligned": None}

    def bundle(seed: int = 0, recall: float = 0.5) -> Artifact:
        return build_bundle(BundleConfig(warm_up_beam_size=5), **parts(seed, recall), uri=str(root / f"bundle{seed}-{recall}"))

    bundle.parts = parts  # type: ignore[attr-defined]
    return bundle


@pytest.fixture(scope="session")
def tiny_pipeline(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The whole line of the recipe `tiny`, run once: every stage's artifact lies under its home."""
    home = tmp_path_factory.mktemp("home")
    where = Places(home=str(home), data=str(ROOT), tracking_uri=f"sqlite:///{home}/mlflow.db")
    use_tracking(where)
    pipeline = Pipeline(RECIPES["tiny"](), where)
    pipeline.run_all()
    return pipeline
