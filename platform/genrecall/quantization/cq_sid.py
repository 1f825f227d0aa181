"""The stage that fits the quantiser: CQ-SID, its two ablations and plain RQ-VAE by the same code, RQ-KMeans as control.

Source: CQ-SID (arXiv:2605.14434). `use_category` and `use_query` switch its two constraints; without both it is RQ-VAE.

Deviations: gamma is 1.0 by default, where the paper has 0.001 (at 2.1e7 items). Here the reconstruction is at most about 1, the
embeddings being unit vectors, so that a thousandth of a cross-entropy would be lost beside it; catalogues of 10^3 to 10^5 items
are also trained for far fewer steps. Negatives are a worker's whole batch (512 rows by default; 128 there). Half-way the codebooks are
fitted anew by k-means.
Only items known at the split and training pairs are used for fitting; later items are placed by the finished quantiser.

Shapes: N items, D embedding dimension, Z latent dimension, B batch rows.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrecall.config import from_dict, to_dict
from genrecall.data.catalog import Catalog, load_catalog
from genrecall.data.interactions import Requests, known_at_split, load_requests, query_item_pairs
from genrecall.encoders.embed import load_item_embeddings
from genrecall.encoders.text_encoder import load_encoder
from genrecall.quantization.diagnostics import draw_pictures, quantizer_diagnostics
from genrecall.quantization.level1_categories import Level1Categories, choose_categories
from genrecall.quantization.query_constraint import QueryPairs
from genrecall.quantization.residual_quantizer import FrozenQuantizer, load_quantizer
from genrecall.quantization.rq_kmeans import fit_rq_kmeans
from genrecall.quantization.rqvae import LossParts, RqVae, rqvae_loss
from genrecall.storage import Artifact, Stage, open_artifact
from genrecall.train_worker import TrainSettings, TrainWorker, cosine_schedule, fit

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 3
_READ_BY_RQ_KMEANS = ("seed", "method", "use_category", "use_query", "level_sizes", "kmeans_iterations")
_RESTART_EVERY = 10
_RESTART_UNTIL = 0.8  # of the steps; after that the codes settle
_REFIT_AT = 0.5  # of the steps
_START_ROWS = 100_000  # as many rows as are enough to start codebooks from
_START_ROWS_OF_CATEGORY = 16  # at least, as far as it has so many: a draw of all rows misses small categories, whose codes nothing else would start


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """How items get their codes.

    Attributes:
        method: "rqvae" (CQ-SID and its ablations) or "rqkmeans" (which reads level_sizes, kmeans_iterations and seed only).
        kmeans_iterations: of "rqkmeans"; a recipe's quantizer has it for its variant of that name.
        use_category: items take their category's code at level 1.
        use_query: the query term is part of the loss.
        level_sizes: codebook sizes; larger books give smaller clusters. The default suits about 2,000 items.
        min_items: a category needs this many items to own a level-1 code.
        category_share: categories fill at most this share of the level-1 book.
        beta, gamma, temperature: of the commitment term, of the query term, of the query term's cosine.
        decay, restart_below: of the codebooks' moving averages; a code below this fraction of an even share is restarted.
        batch_size: rows a step over all workers; each worker takes its share and its own negatives.
    """

    seed: int = 0
    method: Literal["rqvae", "rqkmeans"] = "rqvae"
    use_category: bool = True
    use_query: bool = True
    level_sizes: tuple[int, int, int] = (64, 8, 8)
    min_items: int = 10
    category_share: float = 0.8
    latent_dim: int = 64
    hidden_dim: int = 256
    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 0.1
    decay: float = 0.99
    restart_below: float = 0.03
    steps: int = 600
    batch_size: int = 512
    learning_rate: float = 1e-3
    kmeans_iterations: int = 25

    def problems(self) -> list[str]:
        """What cannot be used together or is out of range."""
        at_least_one = ("min_items", "latent_dim", "hidden_dim", "steps", "kmeans_iterations")
        found = [f"{name}: must be at least 1, got {getattr(self, name)}" for name in at_least_one if getattr(self, name) < 1]
        if min(self.level_sizes) < 2:
            found.append(f"level_sizes: each level needs at least 2 codes, got {list(self.level_sizes)}")
        if self.batch_size < 2:
            found.append(f"batch_size: must be at least 2, got {self.batch_size}")
        found += [
            f"{name}: must lie between 0 and 1, got {getattr(self, name)}"
            for name in ("category_share", "decay", "restart_below")
            if not 0 <= getattr(self, name) <= 1
        ]
        found += [f"{name}: must be positive, got {getattr(self, name)}" for name in ("temperature", "learning_rate") if getattr(self, name) <= 0]
        if self.beta < 0 or self.gamma < 0:
            found.append(f"beta, gamma: must not be negative, got {self.beta} and {self.gamma}")
        if self.method == "rqkmeans" and (self.use_category or self.use_query):
            found.append("use_category, use_query: have no effect with method=rqkmeans; set both to false")
        if self.use_query and self.gamma == 0:
            found.append("gamma: 0 switches the query term off; set use_query=false to say so")
        defaults = {field.name: field.default for field in fields(self)}
        idle: dict[str, tuple[str, ...]] = {
            "use_category=false": () if self.use_category else ("min_items", "category_share"),
            "use_query=false": () if self.use_query else ("gamma", "temperature"),
        }
        if self.method == "rqkmeans":
            idle = {"method=rqkmeans": tuple(name for name in defaults if name not in _READ_BY_RQ_KMEANS)}
        found += [
            f"{name}: has no effect with {switch}; leave it at {defaults[name]}"
            for switch, names in idle.items()
            for name in names
            if getattr(self, name) != defaults[name]
        ]
        return found


@dataclass(frozen=True)
class TrainingData:
    """What batches are drawn from.

    Attributes:
        embeddings: float32 [N, D], all items (memory-mapped).
        rows: int64, the items to fit on.
        level1: int64 [N], level-1 codes given by category, -1 for none; None without the category constraint.
        categories: the categories behind them.
        pairs: (query, item) pairs; None without the query constraint.
        queries: the distinct queries of the pairs.
    """

    embeddings: NDArray[np.float32]
    rows: NDArray[np.int64]
    level1: NDArray[np.int64] | None
    categories: Level1Categories | None
    pairs: QueryPairs | None
    queries: list[str]


def training_data(config: QuantizerConfig, catalog: Catalog, requests: Requests, embeddings: NDArray[np.float32]) -> TrainingData:
    """Collect items, categories and pairs for fitting; `requests` are the training ones."""
    known = known_at_split(catalog, requests)
    rows = np.flatnonzero(known)
    level1, categories = None, None
    if config.use_category:
        paths = [catalog.category_paths[row] for row in rows]
        categories = choose_categories(paths, min_items=config.min_items, max_categories=int(config.category_share * config.level_sizes[0]))
        level1 = categories.codes_of(catalog.category_paths).astype(np.int64)
        if not len(categories):
            logger.warning("quantizer: use_category is set, but no category has %d items; training as without it", config.min_items)
    pairs, queries = None, []
    if config.use_query:
        owner, items, weights = query_item_pairs(requests)
        number_of: dict[str, int] = {}
        number = np.array([number_of.setdefault(query, len(number_of)) if query.strip() else -1 for query in requests.queries], dtype=np.int64)
        kept = known[items] & (number[owner] >= 0)
        used, compact = np.unique(number[owner][kept], return_inverse=True)
        texts = list(number_of)
        queries = [texts[one] for one in used]
        pairs = QueryPairs(compact, items[kept], weights[kept], num_queries=len(queries), num_items=len(catalog))
        if not len(pairs):
            logger.warning("quantizer: use_query is set, but no training request has a query and a click; training as without it")
            pairs = None
    return TrainingData(embeddings, rows, level1, categories, pairs, queries)


def draw_batch(
    data: TrainingData, query_embeddings: Tensor | None, *, rows: int, seed: int, step: int, rank: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The batch of one step on one worker, always the same for the same seed, step and rank.

    Returns:
        embeddings [B, D], level-1 codes int64 [B] or None, query embeddings [B, Dq] or None, has_query bool [B] or None,
        positive bool [B, B] or None, as `rqvae_loss` takes them.
    """
    rng = np.random.default_rng([seed, step, rank])
    items = data.rows[rng.choice(len(data.rows), min(rows, len(data.rows)), replace=False, shuffle=False)]
    x = torch.from_numpy(np.ascontiguousarray(data.embeddings[items]))
    level1 = None if data.level1 is None else torch.from_numpy(data.level1[items])
    if data.pairs is None or query_embeddings is None:
        return x, level1, None, None, None
    numbers, positive = data.pairs.draw(items, rng)
    drawn = torch.from_numpy(numbers).long()
    return x, level1, query_embeddings[drawn.clamp(min=0)], drawn >= 0, torch.from_numpy(positive)


def make_model(config: QuantizerConfig, data: TrainingData, *, query_dim: int) -> RqVae:
    """The untrained model, started from the data."""
    torch.manual_seed(config.seed)
    model = RqVae(
        data.embeddings.shape[1],
        config.latent_dim,
        config.hidden_dim,
        config.level_sizes,
        owned_codes=0 if data.categories is None else len(data.categories),
        query_dim=None if data.pairs is None else query_dim,
        decay=config.decay,
        restart_below=config.restart_below,
    )
    model.start(*_starting_rows(config, data), generator=torch.Generator().manual_seed(config.seed))
    return model


def _starting_rows(config: QuantizerConfig, data: TrainingData) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What codebooks start from: embeddings [n, D], level-1 codes int64 [n] and weights [n] (see `ResidualQuantizer.start`)."""
    rows = data.rows
    level1 = None if data.level1 is None else data.level1[rows]
    weights = None
    if len(rows) > _START_ROWS:
        order = np.random.default_rng(config.seed).permutation(len(rows))
        drawn = np.zeros(len(rows), dtype=bool)
        drawn[order[:_START_ROWS]] = True
        if level1 is not None:
            by_code = order[np.argsort(level1[order], kind="stable")]
            place = np.arange(len(rows)) - np.searchsorted(level1[by_code], level1[by_code])
            drawn[by_code[place < _START_ROWS_OF_CATEGORY]] = True
            standing_for = np.bincount(level1 + 1) / np.maximum(np.bincount(level1[drawn] + 1), 1)
            level1 = level1[drawn]
            weights = torch.from_numpy(standing_for[level1 + 1]).float()
        rows = rows[drawn]
    return torch.from_numpy(np.ascontiguousarray(data.embeddings[rows])), None if level1 is None else torch.from_numpy(level1), weights


@torch.no_grad()
def refit_codebooks(config: QuantizerConfig, data: TrainingData, model: RqVae, *, step: int) -> None:
    """Half-way, start the codebooks anew by k-means on what the encoder gives by then; at other steps nothing.

    The moving averages follow an encoder that changes, but they stay in the clusters that they started with; the structure
    that the query term has brought into the latents by then shows in the codes only after a fresh start.
    """
    if step != int(_REFIT_AT * config.steps) or step == 0:
        return
    device = next(model.parameters()).device
    x, level1, weights = (None if part is None else part.to(device) for part in _starting_rows(config, data))
    model.quantizer.start(model.encoder(x), level1, weights, generator=torch.Generator(device).manual_seed(config.seed + step))
    model.quantizer.synchronize()


def update_codebooks(config: QuantizerConfig, model: RqVae, parts: LossParts, *, step: int) -> None:
    """Move the codebooks after a step; dead codes are restarted now and then, except in the last fifth of the steps."""
    restart = None
    if step % _RESTART_EVERY == 0 and step < _RESTART_UNTIL * config.steps:
        restart = torch.Generator(parts.quantized.codes.device).manual_seed(config.seed * 1_000_003 + step)
    model.quantizer.update(parts.quantized, restart=restart)


def freeze(model: RqVae, categories: Level1Categories | None) -> FrozenQuantizer:
    """The finished quantiser of a trained model."""
    return FrozenQuantizer(model.encoder, model.quantizer.codebooks, categories, input_dim=model.encoder.linear.in_features)


def train_quantizer(config: QuantizerConfig, *, dataset: Artifact, encoder: Artifact, uri: str, train: TrainSettings, force: bool = False) -> Artifact:
    """Fit the quantiser and place the whole catalogue.

    Args:
        config: what to fit.
        dataset: an artifact of kind "dataset"; of its requests only the training ones are read.
        encoder: an artifact of kind "encoder" made from the same dataset.
        uri: where the artifact goes.
        train: workers; method "rqkmeans" runs in this process and uses none.
        force: fit even where `uri` already holds the result.

    Returns:
        An artifact of kind "quantizer": `quantizer.json`, `quantizer.safetensors`, `codes.npy` int32 [N, 3], `residuals.npy`
        float16 [N, Z], `diagnostics.json` and pictures.

    Raises:
        ValueError: fewer than two rows a worker, or an encoder made from another catalogue.
        TrainingError: the workers failed.
    """
    if config.method == "rqvae" and config.batch_size // train.num_workers < 2:
        raise ValueError(
            f"quantizer.batch_size: {config.batch_size} rows for {train.num_workers} workers leave fewer than 2 each; raise batch_size or lower train.num_workers"
        )
    parents = {"dataset": dataset, "encoder": encoder}
    stage = Stage(kind="quantizer", uri=uri, config=config, algorithm_version=ALGORITHM_VERSION, parents=parents, seed=config.seed, job="train_quantizer")
    if (done := stage.current(force=force)) is not None:
        return done
    catalog = load_catalog(dataset)
    embeddings = load_item_embeddings(encoder.path)
    if len(embeddings) != len(catalog):
        raise ValueError(
            f"{encoder.uri}: has {len(embeddings)} item embeddings, the catalogue of {dataset.uri} {len(catalog)} items; rerun jobs/train_encoder.py"
        )
    if config.method == "rqkmeans":
        known = known_at_split(catalog, load_requests(dataset, "train", catalog))
        quantizer = fit_rq_kmeans(embeddings[known], config.level_sizes, iterations=config.kmeans_iterations, seed=config.seed)
    else:
        loop_config = {"config": to_dict(config), "dataset": dataset.uri, "encoder": encoder.uri}
        quantizer = load_quantizer(fit(train_loop, loop_config, name="quantizer", stage=stage, train=train))
    with stage.write(num_workers=train.num_workers if config.method == "rqvae" else None) as draft:
        quantizer.save(draft.path)
        write_placements(draft.path, quantizer, embeddings, catalog.category_paths)
        draft.row_counts["items"] = len(catalog)
    return stage.open()


def write_placements(folder: Path, quantizer: FrozenQuantizer, embeddings: NDArray[np.float32], category_paths: list[tuple[str, ...]]) -> None:
    """Place every item and write codes, residuals, diagnostics and pictures into `folder`."""
    codes, residuals = quantizer.place(embeddings, category_paths)
    np.save(folder / "codes.npy", codes, allow_pickle=False)
    np.save(folder / "residuals.npy", residuals.astype(np.float16), allow_pickle=False)
    diagnostics = quantizer_diagnostics(codes, embeddings, residuals, category_paths, quantizer.level_sizes)
    (folder / "diagnostics.json").write_text(json.dumps(diagnostics, indent=1))
    draw_pictures(folder, codes, embeddings, quantizer.level_sizes)


def train_loop(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs; `loop_config` is {"config", "dataset", "encoder"} and what `TrainWorker` needs."""
    config = from_dict(QuantizerConfig, loop_config["config"])
    dataset = open_artifact(loop_config["dataset"], kind="dataset")
    encoder = open_artifact(loop_config["encoder"], kind="encoder")
    catalog = load_catalog(dataset)
    data = training_data(config, catalog, load_requests(dataset, "train", catalog), load_item_embeddings(encoder.path))
    query_embeddings = None
    if data.pairs is not None:
        query_embeddings = torch.from_numpy(load_encoder(encoder.path).encode_queries(data.queries))
    model = make_model(config, data, query_dim=0 if query_embeddings is None else query_embeddings.shape[1])
    model.quantizer.synchronize()
    worker = TrainWorker(
        model,
        rqvae_loss,
        learning_rate=cosine_schedule(config.learning_rate, warmup_steps=max(1, config.steps // 20), total_steps=config.steps),
        total_steps=config.steps,
        loop_config=loop_config,
        dtype=torch.float32,  # codebooks are moving averages; bfloat16 would lose them
    )
    rows = config.batch_size // worker.world_size
    metrics: dict[str, Tensor] = {}
    for step in range(int(worker.resume().get("step", 0)), config.steps):
        refit_codebooks(config, data, model, step=step)
        batch = draw_batch(data, query_embeddings, rows=rows, seed=config.seed, step=step, rank=worker.rank)
        on_device = tuple(None if part is None else part.to(worker.device) for part in batch)
        parts = worker.loss(*on_device, config.beta, config.gamma, config.temperature)
        worker.step(parts.loss)
        update_codebooks(config, model, parts, step=step)
        metrics = parts.metrics
        worker.log(step, {"loss": parts.loss, **metrics})
        if worker.checkpoint_due(step):
            worker.save({"step": step + 1})

    def export(folder: Path) -> None:
        freeze(model, data.categories).save(folder)

    worker.finish(export, {f"quantizer_{name}": float(value) for name, value in metrics.items()})
