"""The stage that publishes SIDs: capping, SID table, trie, index and centres.

Source: CQ-SID (arXiv:2605.14434), capping. SIDs are published for the items known at the split; items first seen later are
placed among them exactly as `assign.py` places new items when serving.

Shapes: N items, S SIDs, Z latent dimension.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import known_at_split, load_requests, popularity
from genrecall.encoders.embed import load_item_embeddings
from genrecall.quantization.diagnostics import churn, cluster_numbers, cluster_sizes, draw_cluster_sizes
from genrecall.quantization.residual_quantizer import FrozenQuantizer, load_quantizer
from genrecall.sid.assign import SidAssigner, oversize_sids
from genrecall.sid.capping import split_clusters
from genrecall.sid.filters import FilterPostings
from genrecall.sid.index import load_index
from genrecall.sid.index_builder import SidIndexBuilder
from genrecall.sid.semantic_id import SidSpace, SidTable
from genrecall.sid.trie import Trie
from genrecall.storage import Artifact, Stage

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 4
_ITEMS_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SidIndexConfig:
    """How SIDs are published.

    Attributes:
        max_items_per_sid: T_max; a larger cluster is split into groups.
        max_groups: G_max; beyond T_max * G_max items the groups grow, nothing is dropped.
        split: "residual" keeps neighbours together, "random" is the paper's way.
    """

    seed: int = 0
    max_items_per_sid: int = 50
    max_groups: int = 100
    split: Literal["residual", "random"] = "residual"

    def problems(self) -> list[str]:
        """What is out of range."""
        return [f"{name}: must be at least 1, got {getattr(self, name)}" for name in ("max_items_per_sid", "max_groups") if getattr(self, name) < 1]


@dataclass(frozen=True)
class PublishedSids:
    """The SIDs of a catalogue.

    Attributes:
        table: SIDs and the SID row of every item.
        trie: over the table's tokens.
        centers: float16 [S, Z], the mean latent of each SID's items, for placing newcomers.
    """

    table: SidTable
    trie: Trie
    centers: NDArray[np.float16]


def publish_sids(
    config: SidIndexConfig, quantizer: FrozenQuantizer, codes: NDArray[np.int32], residuals: NDArray[np.floating], known: NDArray[np.bool_]
) -> PublishedSids:
    """Cap the clusters of the known items, publish their SIDs and place the other items among them.

    Args:
        codes: int32 [N, 3]. residuals: [N, Z]. known: bool [N], at least one item.
    """
    group = split_clusters(
        codes[known], residuals[known], max_items=config.max_items_per_sid, max_groups=config.max_groups, method=config.split, seed=config.seed
    )
    space = SidSpace.with_pairs(quantizer.level_sizes, codes[known], group)
    table = SidTable.from_item_tokens(space, space.tokens_of(codes[known], group))
    trie = Trie.from_tokens(table.tokens, space.alphabet_sizes)
    centers = _means(quantizer.code_sums(codes[known]) + residuals[known], table.item_sid, len(table)).astype(np.float16)
    item_sid = np.empty(len(codes), dtype=np.int32)
    item_sid[known] = table.item_sid
    if not known.all():
        item_sid[~known] = SidAssigner(quantizer, space, trie, centers).assign_placed(codes[~known], residuals[~known])
    return PublishedSids(SidTable(space, table.tokens, item_sid), trie, centers)


def _means(rows: NDArray[np.floating], numbers: NDArray[np.int32], size: int) -> NDArray[np.float32]:
    order = np.argsort(numbers, kind="stable")
    counts = np.bincount(numbers, minlength=size)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.asarray(np.add.reduceat(rows[order].astype(np.float32), starts, axis=0) / counts[:, None], dtype=np.float32)


def build_sid_index(config: SidIndexConfig, *, dataset: Artifact, encoder: Artifact, quantizer: Artifact, uri: str, force: bool = False) -> Artifact:
    """Publish the SIDs of a catalogue.

    Args:
        config: how.
        dataset, encoder, quantizer: artifacts of these kinds, each made from those before it.
        uri: where the artifact goes.
        force: build even where `uri` already holds the result.

    Returns:
        An artifact of kind "sid_index": `sid_space.json`, `sid_table.parquet`, `trie/`, `index/`, `filters/`, `item_ids.npy`, `centers.npy`,
        `stats.json` and a picture of the cluster sizes.

    Raises:
        ValueError: a quantiser or an encoder made from another catalogue, or an item id of more than 64 bytes.
    """
    parents = {"dataset": dataset, "encoder": encoder, "quantizer": quantizer}
    stage = Stage(kind="sid_index", uri=uri, config=config, algorithm_version=ALGORITHM_VERSION, parents=parents, seed=config.seed, job="build_sid_index")
    if (done := stage.current(force=force)) is not None:
        return done
    catalog = load_catalog(dataset)
    requests = load_requests(dataset, "train", catalog)
    codes = np.load(quantizer.file("codes.npy"), allow_pickle=False)
    residuals = np.load(quantizer.file("residuals.npy"), mmap_mode="r", allow_pickle=False)
    if len(codes) != len(catalog):
        raise ValueError(f"{quantizer.uri}: has codes for {len(codes)} items, the catalogue of {dataset.uri} {len(catalog)}; rerun jobs/train_quantizer.py")
    vectors = load_item_embeddings(encoder.path)
    if len(vectors) != len(catalog):
        raise ValueError(f"{encoder.uri}: has vectors of {len(vectors)} items, the catalogue of {dataset.uri} {len(catalog)}; rerun jobs/train_encoder.py")
    known = known_at_split(catalog, requests)
    published = publish_sids(config, load_quantizer(quantizer.path), codes, residuals, known)
    table = published.table
    feedback = popularity(requests, len(catalog))
    prior = catalog.prior_scores if np.any(catalog.prior_scores) else feedback
    stats = index_stats(config, published, codes, known)
    if stats["oversize_sids"]:
        logger.warning("sid index: %d SIDs hold more than twice max_items_per_sid=%d; raise level_sizes", stats["oversize_sids"], config.max_items_per_sid)
    with stage.write() as draft:
        (draft.path / "sid_space.json").write_text(table.space.to_json())
        pq.write_table(table_of_sids(table, catalog.item_ids), draft.path / "sid_table.parquet")
        builder = SidIndexBuilder(table.space.alphabet_sizes, work_folder=draft.path)
        for start in range(0, len(catalog), _ITEMS_AT_ONCE):
            part = slice(start, start + _ITEMS_AT_ONCE)
            builder.add(catalog.item_ids[part], table.tokens[table.item_sid[part]], prior[part], feedback[part])
        builder.finish(draft.path, item_vectors=vectors)
        FilterPostings.build(catalog.category_paths, catalog.brands, load_index(draft.path)).save(draft.path / "filters")
        np.save(draft.path / "centers.npy", published.centers, allow_pickle=False)
        (draft.path / "stats.json").write_text(json.dumps(stats, indent=1))
        draw_cluster_sizes(draft.path / "cluster_sizes.png", table.item_sid, max_items=config.max_items_per_sid)
        draft.row_counts |= {"items": len(catalog), "sids": len(table)}
    return stage.open()


def index_stats(config: SidIndexConfig, published: PublishedSids, codes: NDArray[np.int32], known: NDArray[np.bool_]) -> dict[str, Any]:
    """Numbers about the published SIDs, as written to `stats.json`."""
    table = published.table
    sizes = np.bincount(table.item_sid, minlength=len(table))
    return {
        **cluster_sizes(table.item_sid),
        "items": len(codes),
        "clusters_before_capping": cluster_sizes(cluster_numbers(codes[known])),
        "split": config.split,
        "group_pairs": len(table.space.groups),
        "items_placed_later": int((~known).sum()),
        "sids_over_cap": int((sizes > config.max_items_per_sid).sum()),
        "oversize_sids": len(oversize_sids(sizes, config.max_items_per_sid)),
        "max_children": [int(published.trie.level1_valid.sum()), published.trie.max_children2, published.trie.max_children3],
    }


def table_of_sids(table: SidTable, item_ids: NDArray[Any]) -> pa.Table:
    """The SID of every item as an Arrow table: item_id, sid (text), code_1 to code_3, group."""
    codes, group = table.space.codes_of(table.tokens)
    texts = pa.array(table.space.texts_of(table.tokens))
    rows = pa.array(np.asarray(table.item_sid))
    columns = {"item_id": pa.array(item_ids, pa.string()), "sid": texts.take(rows)}
    columns |= {f"code_{level + 1}": pa.array(codes[:, level]).take(rows) for level in range(3)}
    return pa.table({**columns, "group": pa.array(group).take(rows)})


def churn_between(before: Path, after: Path) -> float:
    """The churn (see `diagnostics.churn`) between two `sid_index` folders, over the items that both have."""
    old, new = (pq.read_table(folder / "sid_table.parquet", columns=["item_id", "sid"]) for folder in (before, after))
    both = old.join(new, keys="item_id", join_type="inner", right_suffix="_after")
    numbers = [both[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in ("sid", "sid_after")]
    return churn(numbers[0], numbers[1])
