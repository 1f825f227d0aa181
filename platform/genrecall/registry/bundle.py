"""The bundle: everything that serving needs, in one folder, under one version.

A bundle is an artifact of kind `bundle`. It is copied together from the artifacts of one line, and refuses parts that were
not made from each other. Weights are safetensors, arrays npy, tables Parquet, the rest JSON; nothing is unpickled, and a file
of any other kind is refused.

    bundle.json            generator stage and support, the last change of the catalogue log that the items hold, where each part came from
    generator/             tokenizer.json, prompts.json, stage/ (a Hugging Face Qwen2 folder with genrecall.json)
    sid_index/             SID table, trie, SID -> items index, item ids
    encoder/, quantizer/   to embed queries and to place new items
    items.parquet          item_id, title, category_path, brand, price, sorted by item_id: position = item row
    sid_labels.parquet     label of every SID, in the SID table's order (bundles of version 1 have none)
    metrics.json           the evaluation the gates judged
    warm_up.json           requests with the scores they must get: the last check before a server goes live
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.generator.retriever import Retriever, load_retriever
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.sid.index import SidIndex
from genrecall.sid.item_ids import ItemIds
from genrecall.sid.labels import SidLabels
from genrecall.sid.segments import SegmentedIndex
from genrecall.storage import Artifact, Stage, open_artifact

ALGORITHM_VERSION = 2

WARM_UP_TOLERANCE = 1e-3
"""Largest difference of a SID's log-probability between the machine that built the bundle and the one that loads it."""

_ALLOWED_SUFFIXES = frozenset({".json", ".safetensors", ".npy", ".parquet", ".txt"})
_LABELS = "sid_labels.parquet"
_LEFT_OUT = frozenset({"manifest.json", "item_embeddings.npy", "codes.npy", "residuals.npy", "latents.npy", "training.json"})


class BundleError(ValueError):
    """A bundle whose parts do not belong together, or that answers otherwise than when it was built."""


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """What goes into the bundle beside the parts themselves.

    Attributes:
        catalog_seq: the last change of the catalogue log that the data set's items hold, as a server named it before they were exported
            (`versions.catalog_seq` of `GET /v1/model`). Servers replay what follows it on the bundle; 0: all of the log.
    """

    warm_up_requests: int = 16
    warm_up_beam_size: int = 10
    catalog_seq: int = 0
    seed: int = 0

    def problems(self) -> list[str]:
        least = {"warm_up_requests": 1, "warm_up_beam_size": 1, "catalog_seq": 0}
        return [f"{name}: must be at least {low}, got {getattr(self, name)}" for name, low in least.items() if getattr(self, name) < low]


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: the retriever and what answers show of an item.

    Attributes:
        artifact: the folder and its manifest.
        retriever: generator, trie, index and encoder.
        items: Arrow table of N rows sorted by item_id; the position is the item row. Columns: item_id, title, category_path, brand, price.
        item_ids: the ids of those rows, memory-mapped.
        about: `bundle.json`. metrics: `metrics.json`.
        labels: words for its SIDs, from the published items.
    """

    artifact: Artifact
    retriever: Retriever
    items: pa.Table
    item_ids: ItemIds
    about: Mapping[str, Any]
    metrics: Mapping[str, Any]
    labels: SidLabels

    @property
    def hash(self) -> str:
        """sha256 (hex) of what the bundle is."""
        return self.artifact.hash

    @property
    def catalog_seq(self) -> int:
        """The last change of the catalogue log that its items hold; 0: none."""
        return int(self.about.get("catalog_seq", 0))

    @property
    def base_index(self) -> SidIndex:
        """The index as it was built, whatever was added to it later."""
        index = self.retriever.index
        return index.base if isinstance(index, SegmentedIndex) else index

    @property
    def num_listed(self) -> int:
        """Items that answers may hold."""
        return len(self.items)

    def in_stock(self, item_id: str) -> bool:
        """Whether an item is in stock; a bundle says of none that it is not."""
        return True

    def rows_of(self, item_ids: Iterable[str]) -> np.ndarray:
        """int32 item rows of ids, in their order; unknown ids are left out."""
        rows = self.item_ids.rows_of(item_ids)
        return rows[rows >= 0]

    def ids_of(self, item_rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of item rows."""
        return self.item_ids.ids_of(item_rows)

    def shown(self, item_rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The columns of `items` for item rows, one dict each."""
        return list(self.items.take(pa.array(item_rows, pa.int32())).to_pylist())


def build_bundle(
    config: BundleConfig,
    *,
    dataset: Artifact,
    encoder: Artifact,
    quantizer: Artifact,
    sid_index: Artifact,
    generator: Artifact,
    aligned: Artifact | None,
    evaluation: Artifact,
    uri: str,
    log: CatalogueLog | None = None,
    force: bool = False,
) -> Artifact:
    """Copy the parts of one line into a bundle at `uri`, with the generator's stage that the evaluation chose on validation requests.

    Args:
        log: of the catalogue, against which `config.catalog_seq` is checked; None: there is none to look at.

    Raises:
        BundleError: parts that were not made from each other, naming the job to rerun, or items that do not hold the changes up to `config.catalog_seq`.
        CatalogueLogError: the log cannot be read.
    """
    parts = {"dataset": dataset, "encoder": encoder, "quantizer": quantizer, "sid_index": sid_index, "generator": generator, "evaluation": evaluation}
    served_stage = evaluation.json("metrics.json").get("served") or ("stage3" if aligned is None else "stage4")
    if served_stage == "stage4":
        if aligned is None:
            raise BundleError(f"{evaluation.uri}: chose stage 4, and no aligned generator was given; rerun jobs/evaluate.py")
        parts["aligned"] = aligned
    check_lineage(parts)
    if log is not None and config.catalog_seq:
        check_coverage(load_catalog(dataset).item_ids, log, config.catalog_seq)
    stage = Stage(kind="bundle", uri=uri, config=config, algorithm_version=ALGORITHM_VERSION, parents=parts, seed=config.seed, job="register_model")
    if done := stage.current(force=force):
        return done
    trained = parts.get("aligned", generator)
    model_folder = trained.file(served_stage)
    with stage.write() as draft:
        _copy(encoder.path, draft.path / "encoder")
        _copy(quantizer.path, draft.path / "quantizer")
        _copy(sid_index.path, draft.path / "sid_index")
        (draft.path / "generator").mkdir()
        for file in generator.path.iterdir():
            if file.is_file() and _wanted(file):
                shutil.copy2(file, draft.path / "generator" / file.name)
        _copy(model_folder, draft.path / "generator" / "stage")
        catalog = load_catalog(dataset)
        pq.write_table(
            pa.table(
                {
                    "item_id": pa.array(list(catalog.item_ids), pa.string()),
                    "title": pa.array(catalog.titles, pa.string()),
                    "category_path": pa.array([list(path) for path in catalog.category_paths], pa.list_(pa.string())),
                    "brand": pa.array(catalog.brands, pa.string()),
                    "price": pa.array(catalog.prices, pa.float64()),
                }
            ),
            draft.path / "items.parquet",
        )
        shutil.copy2(evaluation.file("metrics.json"), draft.path / "metrics.json")
        about = {
            "stage": model_folder.name,
            "support": trained.json("training.json")["support"],
            "catalog_seq": config.catalog_seq,
            "max_items_per_sid": int(sid_index.manifest["config"]["max_items_per_sid"]),
            "parts": {name: part.hash for name, part in parts.items()},
        }
        (draft.path / "bundle.json").write_text(json.dumps(about, indent=2, sort_keys=True))
        retriever = _retriever(draft.path, about)
        labels = _labels(pq.read_table(draft.path / "items.parquet"), retriever).make_all()
        pq.write_table(pa.table({"label": labels}), draft.path / _LABELS)
        queries = [query for query in dict.fromkeys(load_requests(dataset, "validation", catalog).queries) if query][: config.warm_up_requests]
        (draft.path / "warm_up.json").write_text(json.dumps(_warm_up(retriever, queries or [catalog.titles[0]], config.warm_up_beam_size), indent=1))
        draft.row_counts |= {"items": len(catalog), "sids": len(retriever.table)}
    return stage.open()


def check_lineage(parts: Mapping[str, Artifact]) -> None:
    """Check that every part was made from the very parts it stands beside, and that the evaluation judged the model that is served.

    Raises:
        BundleError: naming the first mismatch and the job to rerun.
    """
    for name, part in parts.items():
        parents = part.manifest["parents"]
        again = f"rerun jobs/{part.manifest['job']}.py, then register again"
        for parent_name, parent in parents.items():
            if parent_name in parts and parent["hash"] != parts[parent_name].hash:
                raise BundleError(f"{name} ({part.uri}) was made from another {parent_name} than {parts[parent_name].uri}; {again}")
        if name == "evaluation" and (unjudged := {"generator", "sid_index", "aligned"} & set(parts) - set(parents)):
            raise BundleError(f"{name} ({part.uri}) did not judge {', '.join(sorted(unjudged))}; {again}")


def check_coverage(item_ids: Iterable[str], log: CatalogueLog, sequence: int) -> None:
    """Check that items hold the catalogue's changes up to a number: a bundle that claims more than it has would lose items, or bring delisted ones back.

    Of an item that changed again later nothing is asked: servers replay that change.

    Raises:
        BundleError: the log ends before the number, or items are missing or were delisted.
        CatalogueLogError: the log cannot be read.
    """
    held = log.held()
    if held.sequence < sequence:
        raise BundleError(f"bundle.catalog_seq: expected at most {held.sequence}, the last change in {log.folder}, got {sequence}")
    known = frozenset(item_ids)
    settled = [change for change in held.changes if change.in_stock is None and change.sequence <= sequence]
    missing = [change.item_id for change in settled if change.record is not None and change.item_id not in known]
    delisted = [change.item_id for change in settled if change.record is None and change.item_id in known]
    for ids, problem in ((missing, "lacks items that were added"), (delisted, "holds items that were delisted")):
        if ids:
            raise BundleError(
                f"bundle.catalog_seq: the data set {problem} by change {sequence}: {', '.join(map(repr, ids[:5]))}{' ...' if len(ids) > 5 else ''}; "
                "give the number that a server named before the items were exported, or export them anew"
            )


def load_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Load a bundle folder.

    Args:
        path: the folder (or object-store prefix) with its manifest.
        verify: also run the warm-up requests and compare their scores.

    Raises:
        ArtifactError: a file missing or changed.
        BundleError: a file of a kind that bundles never hold, or a warm-up answer that differs.
    """
    artifact = open_artifact(str(path), kind="bundle")
    foreign = sorted(name for name in artifact.manifest["files"] if Path(name).suffix not in _ALLOWED_SUFFIXES)
    if foreign:
        raise BundleError(f"{path}: holds {', '.join(foreign)}; a bundle holds only {', '.join(sorted(_ALLOWED_SUFFIXES))} files. Nothing was loaded")
    try:
        about = artifact.json("bundle.json")
        retriever = _retriever(artifact.path, about)
        items = pq.read_table(artifact.file("items.parquet")).combine_chunks()
        item_ids = ItemIds.load(artifact.path / "sid_index")
        metrics = artifact.json("metrics.json")
        of_sids = pq.read_table(artifact.file(_LABELS)).column("label") if _LABELS in artifact.manifest["files"] else None
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"{path}: cannot be loaded: {type(error).__name__}: {error}; rebuild it with jobs/register_model.py --force") from error
    if len(items) != len(retriever.table.item_sid):
        raise BundleError(
            f"{path}: items.parquet has {len(items)} items, the SID table {len(retriever.table.item_sid)}; rebuild it with jobs/register_model.py --force"
        )
    if not item_ids.same_as(items.column("item_id")):
        raise BundleError(f"{path}: items.parquet and sid_index/item_ids.npy name other items; rebuild it with jobs/register_model.py --force")
    if of_sids is not None and len(of_sids) != len(retriever.table):
        raise BundleError(
            f"{path}: {_LABELS} has {len(of_sids)} labels, the SID table {len(retriever.table)} SIDs; rebuild it with jobs/register_model.py --force"
        )
    bundle = Bundle(artifact, retriever, items, item_ids, about, metrics, _labels(items, retriever, of_sids))
    if verify:
        verify_warm_up(bundle)
    return bundle


def verify_warm_up(bundle: Bundle) -> None:
    """Answer the warm-up requests and compare the scores with those stored.

    Raises:
        BundleError: naming the first request that is answered otherwise.
    """
    stored = bundle.artifact.json("warm_up.json")
    found = _warm_up(bundle.retriever, [one["query"] for one in stored["requests"]], stored["beam_size"])
    for number, (expected, answer) in enumerate(zip(stored["requests"], found["requests"], strict=True)):
        if _differs(expected, answer):
            raise BundleError(
                f"{bundle.artifact.uri}: warm-up request {number} gets {answer['sids'][:3]} with scores {answer['scores'][:3]}, stored are {expected['sids'][:3]} "
                f"with {expected['scores'][:3]}; the libraries or the device here answer otherwise than those that built the bundle: "
                "rebuild it here with jobs/register_model.py --force"
            )


def _differs(expected: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    """Whether two beams differ by more than rounding: scores by rank, and every SID that is not about to drop off the end."""
    if len(expected["scores"]) != len(answer["scores"]) or not np.allclose(expected["scores"], answer["scores"], rtol=0, atol=WARM_UP_TOLERANCE):
        return True
    stored, found = dict(zip(expected["sids"], expected["scores"], strict=True)), dict(zip(answer["sids"], answer["scores"], strict=True))
    last = min(expected["scores"], default=0.0)
    return any(abs(stored.get(sid, last) - found.get(sid, last)) > 2 * WARM_UP_TOLERANCE for sid in stored.keys() | found.keys())


def _labels(items: pa.Table, retriever: Retriever, of_sids: pa.ChunkedArray | None = None) -> SidLabels:
    published = retriever.index.base if isinstance(retriever.index, SegmentedIndex) else retriever.index
    return SidLabels(items.column("title"), items.column("category_path"), published, retriever.table, of_sids=of_sids)


def _retriever(folder: Path, about: Mapping[str, Any]) -> Retriever:
    return load_retriever(
        generator_folder=folder / "generator",
        stage="stage",
        sid_index=folder / "sid_index",
        encoder=folder / "encoder",
        support=about["support"],
        personalised=about["stage"] != "stage2",
    )


def _warm_up(retriever: Retriever, queries: list[str], beam_size: int) -> dict[str, Any]:
    nothing = [None] * len(queries)
    no_history = [np.zeros(0, np.int32)] * len(queries)
    sid_rows, scores, _ = retriever.generate(queries, nothing, nothing, no_history, beam_size=beam_size)
    return {
        "beam_size": beam_size,
        "requests": [
            {
                "query": query,
                "sids": retriever.table.space.texts_of(retriever.table.tokens[row[row >= 0]]),
                "scores": [round(float(score), 6) for sid, score in zip(row, score_row, strict=True) if sid >= 0],
            }
            for query, row, score_row in zip(queries, sid_rows, scores, strict=True)
        ],
    }


def _wanted(file: Path) -> bool:
    return file.suffix in _ALLOWED_SUFFIXES and file.name not in _LEFT_OUT


def _copy(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*")):
        if file.is_file() and _wanted(file):
            destination = target / file.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, destination)
