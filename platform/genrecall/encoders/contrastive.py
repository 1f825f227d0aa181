"""Training of the encoder: one contrastive loss over real query-item pairs, title views and category names.

Sources: InfoNCE with in-batch negatives, van den Oord et al., "Contrastive Predictive Coding" (2018), in both directions; queries and items of one
shop in one space as in Nigam et al., "Semantic Product Search" (KDD 2019). Deviations: instead of a sum of losses there is one batch with three kinds
of rows, so that every row's item is a negative of every other row's query:
    text       a corrupted view of an item's own words -> the item (no labels needed: generalises where queries are few)
    contrastive   a real query, now and then misspelt -> an item clicked or bought for it, drawn by the root of its weight
    category   the name of a leaf category, as a query -> an item of it
What may be a true match is never a negative: the same item, the same query, a pair known from training, an item of the row's category.

Shapes: n rows of a batch, N items, P distinct (query, item) pairs, d = `dim`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genrecall.config import from_dict, to_dict
from genrecall.data.catalog import Catalog, load_catalog
from genrecall.data.interactions import Requests, known_at_split, load_requests, query_item_pairs
from genrecall.encoders.embed import embed_catalog, item_text
from genrecall.encoders.hugging_face import HuggingFaceTowers
from genrecall.encoders.ngram_hash import words_of
from genrecall.encoders.text_encoder import load_encoder, save_towers
from genrecall.encoders.title_views import misspell, query_view
from genrecall.encoders.towers import NgramTowers, Tokens, Towers
from genrecall.storage import Artifact, Stage, open_artifact
from genrecall.train_worker import TrainSettings, TrainWorker, cosine_schedule, fit

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 1
NGRAMS = "ngrams"
_IDF_SAMPLE = 1_000_000  # texts at most, evenly spaced; enough to know every n-gram that matters


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How the encoder is built and trained.

    Attributes:
        backbone: "ngrams", or the name or folder of a Hugging Face encoder.
        objective: "text" (title views only), "contrastive" (and query-item pairs), "category" (and category names).
        dim: size of the vectors; with a Hugging Face backbone 0 keeps the model's own.
        hidden, num_buckets: the n-gram towers' network width and table rows.
        max_tokens, query_prefix, item_prefix: a Hugging Face backbone's.
        steps, batch_size, learning_rate, temperature: of the training; 0 steps leave the encoder as it starts.
        text_fraction, category_fraction: shares of the rows of a batch; the rest are query-item pairs.
        max_view_words, misspelling_rate: of the title views; queries are misspelt at the same rate per word.
    """

    seed: int = 0
    backbone: str = NGRAMS
    objective: Literal["text", "contrastive", "category"] = "category"
    dim: int = 128
    hidden: int = 256
    num_buckets: int = 1 << 14
    max_tokens: int = 64
    query_prefix: str = ""
    item_prefix: str = ""
    steps: int = 400
    batch_size: int = 512
    learning_rate: float = 3e-3
    temperature: float = 0.05
    text_fraction: float = 0.4
    category_fraction: float = 0.1
    max_view_words: int = 4
    misspelling_rate: float = 0.08

    def problems(self) -> list[str]:
        found = []
        at_least = {
            "hidden": 1,
            "num_buckets": 256,
            "steps": 0,
            "batch_size": 2,
            "max_view_words": 1,
            "max_tokens": 4,
            "dim": 2 if self.backbone == NGRAMS else 0,
        }
        found += [f"{name}: must be at least {least}, got {getattr(self, name)}" for name, least in at_least.items() if getattr(self, name) < least]
        found += [f"{name}: must be above 0, got {getattr(self, name)}" for name in ("learning_rate", "temperature") if getattr(self, name) <= 0]
        rates = ("text_fraction", "category_fraction", "misspelling_rate")
        found += [f"{name}: must lie in [0, 1], got {getattr(self, name)}" for name in rates if not 0 <= getattr(self, name) <= 1]
        if self.text_fraction + self.category_fraction > 1:
            found.append(f"text_fraction + category_fraction: must be at most 1, got {self.text_fraction + self.category_fraction:g}")
        if self.backbone == NGRAMS and (self.query_prefix or self.item_prefix):
            found.append("query_prefix, item_prefix: have no effect with backbone=ngrams; leave them empty")
        return found


@dataclass(frozen=True)
class TrainingPairs:
    """What batches are drawn from.

    Attributes:
        item_texts: N texts of the items.
        titles: N titles.
        extra_words: N lists of brand and category words, for the title views.
        known_items: int64, rows of the items that existed at the split; only these are trained on.
        queries: Q distinct query texts of the training requests.
        pair_query: int64 [P], into `queries`.
        pair_item: int64 [P].
        pair_cumulative: float64 [P], cumulative probability of drawing each pair.
        pair_keys: int64 [P], sorted `query * N + item`.
        leaf_names: C distinct leaf categories' names.
        leaf_of: int64 [N], into `leaf_names`; -1 where an item has no category.
        leaf_items: int64, the known items that have a category.
    """

    item_texts: list[str]
    titles: list[str]
    extra_words: list[list[str]]
    known_items: np.ndarray
    queries: list[str]
    pair_query: np.ndarray
    pair_item: np.ndarray
    pair_cumulative: np.ndarray
    pair_keys: np.ndarray
    leaf_names: list[str]
    leaf_of: np.ndarray
    leaf_items: np.ndarray


@dataclass(frozen=True)
class Batch:
    """n rows: `queries[i]` should be close to `items[i]`; `not_negative[i, j]` (bool [n, n]) says that query i and item j may match too."""

    queries: list[str]
    items: list[str]
    not_negative: np.ndarray


def training_pairs(catalog: Catalog, requests: Requests) -> TrainingPairs:
    """Collect what the catalogue and the training requests offer; pairs of the same query text and item are joined, their weights added."""
    num_items = len(catalog)
    request_index, pair_item, weight = query_item_pairs(requests)
    query_of = {query: row for row, query in enumerate(dict.fromkeys(query for query in requests.queries if words_of(query)))}
    query_row = np.array([query_of.get(query, -1) for query in requests.queries], np.int64)[request_index]
    asked = query_row >= 0
    keys, place = np.unique(query_row[asked] * num_items + pair_item[asked], return_inverse=True)
    # The root keeps the few most common pairs from filling every batch.
    chance = np.sqrt(np.bincount(place, weights=weight[asked].astype(np.float64), minlength=len(keys)))

    leaf_of_path: dict[tuple[str, ...], int] = {}
    leaf_of = np.array([leaf_of_path.setdefault(path, len(leaf_of_path)) if path else -1 for path in catalog.category_paths], np.int64)
    known = known_at_split(catalog, requests)
    return TrainingPairs(
        item_texts=item_text(catalog),
        titles=catalog.titles,
        extra_words=[words_of(brand) + words_of(" ".join(path[-1:])) for brand, path in zip(catalog.brands, catalog.category_paths, strict=True)],
        known_items=np.flatnonzero(known),
        queries=list(query_of),
        pair_query=keys // num_items,
        pair_item=keys % num_items,
        pair_cumulative=np.cumsum(chance) / max(chance.sum(), 1e-300),
        pair_keys=keys,
        leaf_names=[path[-1] for path in leaf_of_path],
        leaf_of=leaf_of,
        leaf_items=np.flatnonzero(known & (leaf_of >= 0)),
    )


def row_counts(config: EncoderConfig, source: TrainingPairs, rows: int) -> tuple[int, int, int]:
    """How many of `rows` are title views, query-item pairs and category names; what the data lacks goes to the title views."""
    pairs_wanted = config.objective in ("contrastive", "category") and len(source.pair_keys) > 0
    category = round(rows * config.category_fraction) if config.objective == "category" and len(source.leaf_items) else 0
    text = round(rows * config.text_fraction) if pairs_wanted else rows - category
    return text, rows - text - category, category


def draw_batch(config: EncoderConfig, source: TrainingPairs, *, step: int, rank: int, rows: int) -> Batch:
    """The batch of a step and rank: always the same for the same (seed, step, rank), whatever was drawn before."""
    rng = np.random.default_rng([config.seed, step, rank])
    num_text, num_pairs, num_category = row_counts(config, source, rows)
    text_items = source.known_items[rng.integers(0, len(source.known_items), num_text)]
    pairs = np.searchsorted(source.pair_cumulative, rng.random(num_pairs), side="right").clip(max=max(0, len(source.pair_keys) - 1))
    pair_query = source.pair_query[pairs] if num_pairs else np.zeros(0, np.int64)
    pair_item = source.pair_item[pairs] if num_pairs else np.zeros(0, np.int64)
    category_items = source.leaf_items[rng.integers(0, len(source.leaf_items), num_category)] if num_category else np.zeros(0, np.int64)

    rate, max_words = config.misspelling_rate, config.max_view_words
    queries = [query_view(source.titles[item], source.extra_words[item], rng, max_words=max_words, misspelling_rate=rate) for item in text_items]
    queries += [misspell(source.queries[query], rng, misspelling_rate=rate) for query in pair_query]
    queries += [source.leaf_names[source.leaf_of[item]] for item in category_items]

    items = np.concatenate([text_items, pair_item, category_items])
    query_rows = np.concatenate([np.full(num_text, -1), pair_query, np.full(num_category, -1)])
    leaves = np.concatenate([np.full(num_text + num_pairs, -1), source.leaf_of[category_items]])
    texts = [source.item_texts[item] for item in items]
    return Batch(queries, texts, not_negative(items, query_rows, leaves, source.leaf_of[items], source.pair_keys, len(source.titles)))


def not_negative(items: np.ndarray, queries: np.ndarray, leaves: np.ndarray, item_leaves: np.ndarray, pair_keys: np.ndarray, num_items: int) -> np.ndarray:
    """Which items of a batch must not count as negatives of which queries.

    Args:
        items: int64 [n], the item of each row.
        queries: int64 [n], the training query of each row; -1 for other kinds of rows.
        leaves: int64 [n], the category that each row asks for; -1 for other kinds of rows.
        item_leaves: int64 [n], the category of each row's item; -1 for none.
        pair_keys: int64 [P], sorted `query * num_items + item` of all training pairs.
        num_items: N.

    Returns:
        bool [n, n]; [i, j] is true where i != j and item j equals item i, or query j equals query i, or (query i, item j) is a training pair,
        or item j is of the category that row i asks for.
    """
    same_item = items[:, None] == items[None, :]
    is_query = queries >= 0
    same_query = (queries[:, None] == queries[None, :]) & is_query[:, None]
    excluded: np.ndarray = same_item | same_query | ((leaves[:, None] == item_leaves[None, :]) & (leaves >= 0)[:, None])
    if len(pair_keys):
        keys = queries[is_query, None] * num_items + items[None, :]
        places = np.searchsorted(pair_keys, keys).clip(max=len(pair_keys) - 1)
        excluded[is_query] |= pair_keys[places] == keys
    np.fill_diagonal(excluded, False)
    return excluded


def info_nce(queries: Tensor, items: Tensor, excluded: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions, each row's own partner against the batch's others.

    Args:
        queries: float [n, d], unit length.
        items: float [n, d], unit length; row i belongs to query i.
        excluded: bool [n, n], false on the diagonal; true where item j is no negative of query i.
        temperature: divides the cosines.

    Returns:
        The mean loss (scalar) and the share of queries that are closest to their own item (scalar).
    """
    logits = (queries @ items.T / temperature).masked_fill(excluded, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean()


def contrastive_loss(towers: Towers, query_tokens: Tokens, item_tokens: Tokens, excluded: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`info_nce` of a tokenised batch, and metrics: {"accuracy"}."""
    loss, accuracy = info_nce(*towers.embed_both(query_tokens, item_tokens), excluded, temperature)
    return loss, {"accuracy": accuracy}


def make_towers(config: EncoderConfig, item_texts: Sequence[str]) -> Towers:
    """Untrained towers; n-gram weights start from the document frequencies of the items' texts."""
    if config.backbone != NGRAMS:
        torch.manual_seed(config.seed)
        return HuggingFaceTowers(
            config.backbone, dim=config.dim, max_tokens=config.max_tokens, query_prefix=config.query_prefix, item_prefix=config.item_prefix
        )
    torch.manual_seed(config.seed)
    towers = NgramTowers(dim=config.dim, hidden=config.hidden, num_buckets=config.num_buckets)
    towers.start_importance(item_texts[:: -(-len(item_texts) // _IDF_SAMPLE)])
    return towers


def train_encoder(config: EncoderConfig, *, dataset: Artifact, uri: str, train: TrainSettings, force: bool = False) -> Artifact:
    """Train the encoder on a dataset and embed its catalogue.

    Args:
        config: what to build.
        dataset: an artifact of kind "dataset"; only its training requests are read.
        uri: where the artifact goes.
        train: workers; each takes `batch_size // num_workers` rows and draws its negatives from its own rows.
        force: train even where `uri` already holds the result.

    Returns:
        An artifact of kind "encoder": `encoder.json`, `encoder.safetensors`, `model/` for a Hugging Face backbone, and `item_embeddings.npy`
        (float32 [N, dim], in catalogue order).

    Raises:
        ValueError: fewer than two rows a worker.
        TrainingError: the workers failed.
    """
    if config.batch_size // train.num_workers < 2:
        raise ValueError(
            f"encoder.batch_size: {config.batch_size} rows for {train.num_workers} workers leave fewer than 2 each; raise batch_size or lower train.num_workers"
        )
    stage = Stage(
        kind="encoder", uri=uri, config=config, algorithm_version=ALGORITHM_VERSION, parents={"dataset": dataset}, seed=config.seed, job="train_encoder"
    )
    if (done := stage.current(force=force)) is not None:
        return done
    folder = fit(train_loop, {"config": to_dict(config), "dataset": dataset.uri}, name="encoder", stage=stage, train=train)
    catalog = load_catalog(dataset)
    with stage.write(num_workers=train.num_workers) as draft:
        shutil.copytree(folder, draft.path, dirs_exist_ok=True)
        embed_catalog(load_encoder(draft.path), catalog, draft.path)
        draft.row_counts["items"] = len(catalog)
    return stage.open()


def train_loop(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs; `loop_config` is {"config": EncoderConfig as JSON, "dataset": uri} and what `TrainWorker` needs."""
    config = from_dict(EncoderConfig, loop_config["config"])
    dataset = open_artifact(loop_config["dataset"], kind="dataset")
    catalog = load_catalog(dataset)
    source = training_pairs(catalog, load_requests(dataset, "train", catalog))
    worker = TrainWorker(
        make_towers(config, source.item_texts),
        contrastive_loss,
        learning_rate=cosine_schedule(config.learning_rate, warmup_steps=max(1, config.steps // 20), total_steps=config.steps),
        total_steps=config.steps,
        loop_config=loop_config,
    )
    towers: Any = worker.model
    rows = config.batch_size // worker.world_size
    counts = row_counts(config, source, rows)
    if worker.rank == 0:
        logger.info("encoder: each batch has %d title views, %d query-item pairs, %d category names", *counts)
        if config.objective != "text" and not len(source.pair_keys):
            logger.warning("encoder: objective=%s, but no training request has a query and a click; training on title views in their place", config.objective)
        if config.objective == "category" and not len(source.leaf_items):
            logger.warning("encoder: objective=category, but no item has a category; as objective=contrastive")

    def to_device(tokens: Tokens) -> Tokens:
        return tuple(part.to(worker.device) for part in tokens)

    metrics: dict[str, Tensor] = {}
    for step in range(int(worker.resume().get("step", 0)), config.steps):
        batch = draw_batch(config, source, step=step, rank=worker.rank, rows=rows)
        excluded = torch.from_numpy(batch.not_negative).to(worker.device)
        query_tokens, item_tokens = to_device(towers.tokenize(batch.queries, "query")), to_device(towers.tokenize(batch.items, "item"))
        loss, metrics = worker.loss(query_tokens, item_tokens, excluded, config.temperature)
        worker.step(loss)
        worker.log(step, {"loss": loss, **metrics})
        if worker.checkpoint_due(step):
            worker.save({"step": step + 1})

    def export(folder: Path) -> None:
        save_towers(towers, folder)

    worker.finish(export, {f"encoder_{name}": float(value) for name, value in metrics.items()})
