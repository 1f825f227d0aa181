"""Batch placement of items that came after training: the bundle's own encoder and frozen codebooks give each a published SID.

Runs on Ray Data: the site's files are read in portions and streamed through actors that hold the bundle,
so memory does not grow with the input. Items that the bundle knows keep their SID. Rows that break the schema or repeat an id
are written apart with the reason.
"""

from __future__ import annotations

import functools
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from genrecall.data.checked_items import ORIGIN, UNREADABLE, checked_items
from genrecall.data.schema import REJECTED, DataError
from genrecall.data.table_readers import find_portions, read_portion
from genrecall.data.validation import SCHEMAS, RowRules, check_chunk, text_columns
from genrecall.encoders.embed import compose_item_text
from genrecall.local_ray import ensure_ray
from genrecall.registry.bundle import load_bundle
from genrecall.registry.catalogue_log import CatalogueLog
from genrecall.registry.catalogue_records import ItemRecord
from genrecall.registry.drift import Drift, DriftLimits
from genrecall.registry.item_placer import ItemPlacer
from genrecall.sid.assign import oversize_sids
from genrecall.sid.index import load_index
from genrecall.storage import Artifact

PLACED = pa.schema(
    [
        pa.field("item_id", pa.string()),
        pa.field("sid", pa.string()),
        pa.field("sid_row", pa.int32()),
        pa.field("quantization_error", pa.float32()),  # squared distance from the item's latent to its codes; null for known items
        pa.field("known", pa.bool_()),  # in the bundle's catalogue already
        pa.field("unknown_category", pa.bool_()),  # names a category that no item of the bundle has or is below; null for known items
    ]
)
_REFERENCE = "reference_error"
_ROWS_AT_ONCE = 4096
_RECORDS_AT_ONCE = 1000
_RULES_WITHOUT_EVENTS = {"max_query_characters": 1, "latest_time": 2**62}


@dataclass(frozen=True)
class PlacementSummary:
    """What `assign_items` did.

    Attributes:
        placed: newcomers that got a SID. known: items of the bundle's catalogue. rejected: rows left out.
        oversize_sids: SIDs that newcomers brought beyond twice the cap: time to rebuild the index.
        mean_quantization_error: of the newcomers. reference_quantization_error: of a sample of the bundle's items; far above it says that newcomers are unlike
            what was trained on.
        unknown_categories: share of the newcomers whose category the bundle does not know.
        alarms: what is beyond the limits that servers raise the drift alarm by, in words: time to retrain.
        seconds: whole run.
    """

    placed: int
    known: int
    rejected: int
    oversize_sids: int
    mean_quantization_error: float | None
    reference_quantization_error: float | None
    unknown_categories: float | None
    alarms: tuple[str, ...]
    seconds: float

    def lines(self) -> list[str]:
        """For people, one number or alarm a line."""
        numbers = {name: value for name, value in asdict(self).items() if name != "alarms"}
        return [f"{name.replace('_', ' ')}: {'n/a' if value is None else value}" for name, value in numbers.items()] + [f"ALARM: {one}" for one in self.alarms]


class _Placer:
    """One actor's share: the bundle. Rows that came with a reason pass through; each batch says the catalogue's own error in `_REFERENCE`.

    Args:
        folder: gives the bundle's folder on the actor's machine.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        loaded = load_bundle(folder(), verify=False)
        self._placer = ItemPlacer(loaded)
        self._table = loaded.retriever.table
        self._item_ids = loaded.item_ids

    def __call__(self, batch: pa.Table) -> pa.Table:
        good = pc.is_null(batch["reason"]).to_numpy(zero_copy_only=False)
        known = self._item_ids.rows_of(batch["item_id"])
        new = good & (known < 0)
        rows = np.where(known >= 0, self._table.item_sid[np.maximum(known, 0)], 0).astype(np.int32)
        errors = np.full(len(batch), np.nan, dtype=np.float32)
        unknown = np.zeros(len(batch), dtype=np.bool_)
        if new.any():
            newcomers = batch.filter(pa.array(new))
            paths = [tuple(path or ()) for path in newcomers["category_path"].to_pylist()]
            titles, brands, descriptions = ([one or "" for one in newcomers[name].to_pylist()] for name in ("title", "brand", "text"))
            fit = self._placer.fit(list(map(compose_item_text, titles, brands, paths, descriptions)), paths)
            rows[new], errors[new], unknown[new] = fit.sid_rows, fit.errors, fit.unknown
        sids = pa.array(self._table.space.texts_of(self._table.tokens[rows]))
        columns = [batch["item_id"], sids, pa.array(rows), pa.array(errors, mask=~new), pa.array(known >= 0), pa.array(unknown, mask=~new)]
        reference = pa.array(np.full(len(batch), self._placer.catalogue_error))
        return pa.table([*columns, *(batch[name] for name in ORIGIN), reference], names=[*PLACED.names, *ORIGIN, _REFERENCE])


class _Tally:
    """What was placed so far.

    Args:
        sizes: integer [S], items of each SID in the bundle.
        max_items_per_sid: its cap.
    """

    def __init__(self, sizes: NDArray[np.integer], max_items_per_sid: int) -> None:
        self._before, self._sizes, self._cap = sizes, sizes, max_items_per_sid
        self._placed = self._known = self._rejected = self._unknown = 0
        self._error_sum = 0.0
        self._reference: float | None = None

    def add(self, rows: pa.Table, rejected: int, reference: float | None) -> None:
        """Count sound rows (schema `PLACED`) and rejected ones; `reference` is the catalogue's own error."""
        new = rows.filter(pc.invert(rows["known"]))
        self._sizes = self._sizes + np.bincount(new["sid_row"].to_numpy(), minlength=len(self._sizes))
        self._error_sum += pc.sum(new["quantization_error"]).as_py() or 0.0
        self._unknown += pc.sum(new["unknown_category"]).as_py() or 0
        self._placed += len(new)
        self._known += len(rows) - len(new)
        self._rejected += rejected
        self._reference = reference or self._reference

    def summary(self, seconds: float, limits: DriftLimits) -> PlacementSummary:
        """All of it."""
        count, reference = self._placed, self._reference
        mean = self._error_sum / count if count else None
        drift = Drift(
            sids=len(self._sizes),
            later_items=count,
            error_ratio=mean / reference if mean is not None and reference else None,
            oversize_sids=len(np.setdiff1d(oversize_sids(self._sizes, self._cap), oversize_sids(self._before, self._cap))),
            unknown_categories=self._unknown / count if count else None,
        )
        return PlacementSummary(
            placed=count,
            known=self._known,
            rejected=self._rejected,
            oversize_sids=drift.oversize_sids,
            mean_quantization_error=None if mean is None else round(mean, 4),
            reference_quantization_error=None if reference is None else round(reference, 4),
            unknown_categories=None if drift.unknown_categories is None else round(drift.unknown_categories, 4),
            alarms=tuple(drift.alarms(limits)),
            seconds=round(seconds, 1),
        )


def assign_items(
    bundle: Artifact,
    items: str,
    output: Path,
    *,
    folder: Callable[[], Path] | None = None,
    category_separator: str = ">",
    limits: DriftLimits = DriftLimits(),  # noqa: B008 - frozen
) -> PlacementSummary:
    """Place the items of a file or folder and write `output/placed.parquet` (schema `PLACED`) and `output/rejected.parquet`.

    Args:
        items: Parquet, JSONL or CSV (also gzip), a file, folder or glob, with at least `item_id` and `title`.
        output: a folder that does not exist yet; it appears whole or not at all.
        folder: gives the bundle's folder on the machine that calls it, which need not be this one; default: `bundle` lies there too, in the same place.
        category_separator: between the levels where a category path is text.
        limits: of the alarms.

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
            _Placer,
            fn_constructor_args=(folder or functools.partial(Path, bundle.path),),
            batch_format="pyarrow",
            batch_size=_ROWS_AT_ONCE,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
    )
    sizes = np.diff(load_index(bundle.path / "sid_index").offsets)
    tally = _Tally(sizes, int(bundle.json("bundle.json")["max_items_per_sid"]))
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
                tally.add(rows, len(rejected), batch[_REFERENCE][0].as_py() if len(batch) else None)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return tally.summary(time.monotonic() - started, limits)


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
    """A checked row as a record; prices and priors may be left out."""
    return ItemRecord(
        item_id=row["item_id"],
        title=row["title"],
        category_path=tuple(row["category_path"] or ()),
        brand=row["brand"] or "",
        text=row["text"] or "",
        price=row.get("price"),
        prior_score=row.get("prior_score"),
    )
