"""Batch placement of items that came after training: the bundle's own encoder and frozen codebooks give each a published SID.

Runs on Ray Data: the site's files are read in portions and streamed through actors that hold the bundle's encoder and assigner,
so memory does not grow with the input. Items that the bundle knows keep their SID. Rows that break the schema or repeat an id
are written apart with the reason.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from genrecall.data.checked_items import COLUMNS, ORIGIN, UNREADABLE, checked_items
from genrecall.data.schema import REJECTED, DataError
from genrecall.data.table_readers import find_portions, read_portion
from genrecall.data.validation import SCHEMAS, RowRules, check_chunk, text_columns
from genrecall.encoders.embed import compose_item_text
from genrecall.encoders.text_encoder import load_encoder
from genrecall.local_ray import ensure_ray
from genrecall.quantization.residual_quantizer import load_quantizer
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.sid.assign import load_assigner, oversize_sids
from genrecall.sid.index import load_index, load_sid_table
from genrecall.sid.item_ids import ItemIds
from genrecall.storage import Artifact

PLACED = pa.schema(
    [
        pa.field("item_id", pa.string()),
        pa.field("sid", pa.string()),
        pa.field("sid_row", pa.int32()),
        pa.field("quantization_error", pa.float32()),  # squared distance from the item's latent to its codes; null for known items
        pa.field("known", pa.bool_()),  # in the bundle's catalogue already
    ]
)
_ROWS_AT_ONCE = 4096
_RECORDS_AT_ONCE = 1000
_RULES_WITHOUT_EVENTS = {"max_query_characters": 1, "latest_time": 2**62}


@dataclass(frozen=True)
class PlacementSummary:
    """What `assign_items` did.

    Attributes:
        placed: newcomers that got a SID. known: items of the bundle's catalogue. rejected: rows left out.
        oversize_sids: SIDs that newcomers brought beyond twice the cap: time to rebuild the index.
        mean_quantization_error: of the newcomers; far above the catalogue's says that they are unlike what was trained on.
        seconds: whole run.
    """

    placed: int
    known: int
    rejected: int
    oversize_sids: int
    mean_quantization_error: float | None
    seconds: float

    def lines(self) -> list[str]:
        """For people, one number a line."""
        return [f"{name.replace('_', ' ')}: {'n/a' if value is None else value}" for name, value in asdict(self).items()]


class _Placer:
    """One actor's share: encoder, codebooks and SID table of the bundle. Rows that came with a reason pass through."""

    def __init__(self, bundle: str) -> None:
        folder = Path(bundle)
        self._encoder = load_encoder(folder / "encoder")
        self._quantizer = load_quantizer(folder / "quantizer")
        self._assigner = load_assigner(quantizer=folder / "quantizer", sid_index=folder / "sid_index")
        self._table = load_sid_table(folder / "sid_index")
        self._item_ids = ItemIds.load(folder / "sid_index")

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = pc.is_null(batch["reason"]).to_numpy(zero_copy_only=False)
        known = self._item_ids.rows_of(batch["item_id"])
        new = good & (known < 0)
        rows = np.where(known >= 0, self._table.item_sid[np.maximum(known, 0)], 0).astype(np.int32)
        errors = np.full(len(batch), np.nan, dtype=np.float32)
        if new.any():
            rows[new], errors[new] = self._place(batch.filter(pa.array(new)))
        sids = pa.array(self._table.space.texts_of(self._table.tokens[rows]))
        columns = [batch["item_id"], sids, pa.array(rows), pa.array(errors, mask=~new), pa.array(known >= 0)]
        return pa.table([*columns, *(batch[name] for name in ORIGIN)], names=[*PLACED.names, *ORIGIN])

    def _place(self, items: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """SID rows int32 [n] and quantisation errors float32 [n]."""
        titles, brands, paths, texts = (items[name].to_pylist() for name in COLUMNS[1:])
        composed = [compose_item_text(title, brand or "", path, text or "") for title, brand, path, text in zip(titles, brands, paths, texts, strict=True)]
        codes, residuals = self._quantizer.place(self._encoder.encode_items(composed), paths)
        return self._assigner.assign_placed(codes, residuals), np.square(residuals).sum(axis=1)


def assign_items(bundle: Artifact, items: str, output: Path, *, category_separator: str = ">") -> PlacementSummary:
    """Place the items of a file or folder and write `output/placed.parquet` (schema `PLACED`) and `output/rejected.parquet`.

    Args:
        items: Parquet, JSONL or CSV (also gzip), a file, folder or glob, with at least `item_id` and `title`.
        output: a folder that does not exist yet; it appears whole or not at all.
        category_separator: between the levels where a category path is text.

    Raises:
        DataError: input that cannot be read, or an output folder that exists.
    """
    if output.exists():
        raise DataError(f"{output}: exists already; name a new folder, or remove it")
    started = time.monotonic()
    portions = find_portions("items", items)
    rules = RowRules(category_separator=category_separator, **_RULES_WITHOUT_EVENTS)
    ensure_ray()

    def read(numbers: pa.Table) -> Iterator[pa.Table]:
        for number in numbers["number"].to_pylist():
            yield from checked_items(portions[number], rules)

    placed = (
        ray.data.from_arrow(pa.table({"number": list(range(len(portions)))}))
        .map_batches(read, batch_size=1, batch_format="pyarrow")
        .map_batches(
            _Placer, fn_constructor_args=(str(bundle.path),), batch_format="pyarrow", batch_size=_ROWS_AT_ONCE, compute=ray.data.ActorPoolStrategy(size=1)
        )
    )
    table = load_sid_table(bundle.path / "sid_index")
    sizes = np.diff(load_index(bundle.path / "sid_index").offsets)
    placed_count = known_count = rejected_count = 0
    error_sum = 0.0
    seen: set[str] = set()
    partial = output.absolute().parent / f".{output.name}.{uuid.uuid4().hex}.tmp"
    partial.mkdir(parents=True)
    try:
        with pq.ParquetWriter(partial / "placed.parquet", PLACED) as good, pq.ParquetWriter(partial / "rejected.parquet", REJECTED) as bad:
            batches: Iterable[Any] = placed.iter_batches(batch_format="pyarrow", batch_size=_ROWS_AT_ONCE)  # Arrow tables, which Ray's annotation does not say
            for batch in batches:
                reasons = batch["reason"].to_pylist()
                if UNREADABLE in reasons:
                    raise DataError(batch["value"][reasons.index(UNREADABLE)].as_py())
                for place, one in enumerate(batch["item_id"].to_pylist()):
                    if reasons[place] is None and one in seen:
                        reasons[place] = "duplicate_item_id"
                    seen.add(one)
                reason = pa.array(reasons, pa.string())
                rows = batch.select(PLACED.names).filter(pc.is_null(reason)).cast(PLACED)
                origin = {name: batch[name] for name in ORIGIN} | {"table": pa.array(["items"] * len(batch)), "reason": reason}
                rejected = pa.table({field.name: origin[field.name] for field in REJECTED}).filter(pc.is_valid(reason)).cast(REJECTED)
                good.write_table(rows)
                bad.write_table(rejected)
                new = rows.filter(pc.invert(rows["known"]))
                sizes = sizes + np.bincount(new["sid_row"].to_numpy(), minlength=len(table))
                error_sum += pc.sum(new["quantization_error"]).as_py() or 0.0
                placed_count += len(new)
                known_count += len(rows) - len(new)
                rejected_count += len(rejected)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PlacementSummary(
        placed=placed_count,
        known=known_count,
        rejected=rejected_count,
        oversize_sids=len(oversize_sids(sizes, int(bundle.json("bundle.json")["max_items_per_sid"]))),
        mean_quantization_error=round(error_sum / placed_count, 4) if placed_count else None,
        seconds=round(time.monotonic() - started, 1),
    )


def append_items(items: str, log: CatalogueLog, *, category_separator: str = ">") -> int:
    """Append the sound rows of a file or folder to the catalogue log, the first of each id; returns the last change's number, 0 where there are none.

    Args:
        items, category_separator: as for `assign_items`.

    Raises:
        DataError: input that cannot be read.
        CatalogueLogError: a row that the log cannot hold, or a log that cannot be written; what was appended before stays, and appending it again does no harm.
    """
    rules = RowRules(category_separator=category_separator, **_RULES_WITHOUT_EVENTS)
    seen: set[str] = set()
    sequence = 0
    for portion in find_portions("items", items):
        for chunk in read_portion(portion, SCHEMAS["items"].names, text_columns("items")):
            records: dict[str, ItemRecord] = {}
            for row in check_chunk(portion, chunk, rules).table.to_pylist():
                if row["item_id"] not in seen:
                    records.setdefault(row["item_id"], _record_of(row))
            seen |= records.keys()
            ordered = list(records.values())
            for start in range(0, len(ordered), _RECORDS_AT_ONCE):
                sequence = log.append(ordered[start : start + _RECORDS_AT_ONCE], wait_s=60)
    return sequence


def _record_of(row: Mapping[str, Any]) -> ItemRecord:
    return ItemRecord(
        item_id=row["item_id"],
        title=row["title"],
        category_path=tuple(row["category_path"] or ()),
        brand=row["brand"] or "",
        text=row["text"] or "",
        price=row["price"],
        prior_score=row["prior_score"],
    )
