"""A bundle in service with the catalogue's changes since: its own frozen encoder and codebooks place what came later.

The state is a function of the bundle and of the newest record of each changed item in the log's order, however many steps it was reached in, so that
replicas that followed, started late, swapped or rolled back answer alike. Each step makes a new object that shares the bundle; a batch under way goes
on with its own.

A published item keeps its SID, its vector and its words, whatever its record says now: answers show the new title, brand, category and price, and
filters judge by them. A later item is placed by its newest record: an update gives it a new row, and perhaps another SID. Delisted items are in no
answer; a published one still counts in a shopper's history. A record of a delisted item lists it again. Items out of stock are passed over by the
filter `in_stock` alone.

Shapes: N items of the bundle, m rows of later items, of which some are no longer in use, n records of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genrecall.generator.live_filters import LiveFilterCache
from genrecall.generator.retriever import Retriever
from genrecall.registry.bundle import Bundle
from genrecall.registry.catalogue_log import CatalogueLog, LogTail
from genrecall.registry.catalogue_records import Change, ItemRecord, newest
from genrecall.registry.drift import Drift
from genrecall.registry.item_placer import ItemPlacer
from genrecall.serving.later_items import LaterRows, Names, ShownItem
from genrecall.sid.assign import oversize_sids
from genrecall.sid.index import SidIndex
from genrecall.sid.own_records import OwnRecords
from genrecall.sid.segments import SegmentedIndex

CHANGES_AT_ONCE = 1000
"""A step takes this many changes, and the rest of the request that they end in."""

_UNUSED_ROWS = 1024
_MOST = float(np.finfo(np.float32).max)
_ALL = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class LiveBundle(Bundle):
    """A bundle and what happened to the catalogue since; `retriever` is over the changed index.

    Attributes:
        published: the bundle as it was built.
        placer: its encoder and codebooks.
        applied: the last change that is in it.
        later: the rows of later items. later_rows: their item rows by id, those in use alone.
        changed: what answers show of items of the bundle, by item row, where it differs. judged: of these, the rows of another category or brand.
        delisted: item rows of the bundle.
        out_of_stock: ids, whether listed or not. flagged_rows: int32, ascending, the item rows that these have (`rows_of`).
        names: of categories and brands.
    """

    published: Bundle
    placer: ItemPlacer
    applied: int
    later: LaterRows
    later_rows: Mapping[str, int]
    changed: Mapping[int, ShownItem]
    judged: frozenset[int]
    delisted: frozenset[int]
    out_of_stock: frozenset[str]
    flagged_rows: NDArray[np.int32]
    names: Names

    @classmethod
    def over(cls, bundle: Bundle, in_stock: Mapping[str, bool] | None = None) -> LiveBundle:
        """A bundle to which nothing has happened since it was built.

        Args:
            in_stock: the stock flags among the changes that its items hold already, by id.

        Raises:
            QuantizerError, AssignError: parts of the bundle that do not belong together.
        """
        same = {field.name: getattr(bundle, field.name) for field in dataclasses.fields(Bundle)}
        same["retriever"] = bundle.retriever.with_index(SegmentedIndex(bundle.base_index))
        flagged = frozenset(one for one, flag in (in_stock or {}).items() if not flag)
        state = cls(
            **same,
            published=bundle,
            placer=ItemPlacer(bundle),
            applied=bundle.catalog_seq,
            later=LaterRows.none(),
            later_rows={},
            changed={},
            judged=frozenset(),
            delisted=frozenset(),
            out_of_stock=flagged,
            flagged_rows=np.sort(bundle.rows_of(flagged)),
            names=Names({}, {}),
        )
        return dataclasses.replace(state, retriever=state._retriever_over(same["retriever"].index)) if state.out_of_stock else state

    @property
    def catalog_seq(self) -> int:
        """The last change of the catalogue log that it holds."""
        return self.applied

    @property
    def num_listed(self) -> int:
        """Items that answers may hold."""
        return self.published.base_index.num_published - len(self.delisted) + int(self.later.used.sum())

    def in_stock(self, item_id: str) -> bool:
        """As `Bundle.in_stock`, by the newest flag."""
        return item_id not in self.out_of_stock

    def rows_of(self, item_ids: Iterable[str]) -> np.ndarray:
        """As `Bundle.rows_of`, later items included."""
        ids = list(item_ids)
        rows = self.item_ids.rows_of(ids)
        if self.later_rows:
            for place, one in enumerate(ids):
                rows[place] = self.later_rows.get(one, rows[place])
        return rows[rows >= 0]

    def ids_of(self, item_rows: Sequence[int] | np.ndarray) -> list[str]:
        """As `Bundle.ids_of`, later items included."""
        return [str(one["item_id"]) for one in self.shown(item_rows)]

    def shown(self, item_rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """As `Bundle.shown`, by the newest records."""
        rows = np.asarray(item_rows, dtype=np.int64)
        first = len(self.items)
        found = super().shown(np.where(rows < first, rows, 0))
        if self.changed or (rows >= first).any():
            for place, row in enumerate(rows.tolist()):
                if row >= first:
                    found[place] = self.later.shown[row - first].columns()
                elif row in self.changed:
                    found[place] = self.changed[row].columns()
        return found

    @cached_property
    def drift(self) -> Drift:
        """How far the catalogue has moved from the bundle's."""
        used, cap = self.later.used, int(self.about["max_items_per_sid"])
        count = int(used.sum())
        before = oversize_sids(self.published.base_index.sizes(), cap)
        reference = self.placer.catalogue_error
        return Drift(
            sids=len(self.retriever.table),
            later_items=count,
            changed_items=len(self.changed),
            delisted_items=len(self.delisted),
            out_of_stock_items=len(np.setdiff1d(self.flagged_rows, sorted(self.delisted))),
            error_ratio=float(self.later.errors[used].mean()) / reference if count and reference > 0 else None,
            oversize_sids=len(np.setdiff1d(oversize_sids(self.retriever.index.sizes(), cap), before)),
            unknown_categories=float(self.later.unknown[used].mean()) if count else None,
        )

    def caught_up(self, log: CatalogueLog, at_most: int = CHANGES_AT_ONCE) -> LiveBundle:
        """With the next changes of the log, or the same object where there are none.

        Raises:
            CatalogueLogError: the log cannot be read, or lacks changes that this bundle needs.
        """
        tail = log.read(self.applied, at_most)
        return self if tail.sequence == self.applied else self.with_changes(tail)

    def with_changes(self, tail: LogTail) -> LiveBundle:
        """With the changes that follow `applied`."""
        latest = newest(tail.changes)
        flags = {change.item_id: change.in_stock for change in latest if change.in_stock is not None}
        latest = [change for change in latest if change.in_stock is None]
        base = self.published.base_index
        known = self._published_rows(base, latest)
        later_rows = dict(self.later_rows)
        gone = [later_rows.pop(one.item_id) - len(self.items) for one in latest if one.item_id in later_rows]
        later = self.later.without(gone) if gone else self.later
        # Of all flagged rows only those of items that are named here may be others after this step; the rest is not looked at one by one.
        named = {one.item_id for one in latest} | flags.keys()
        flagged = np.setdiff1d(self.flagged_rows, self.rows_of(named), assume_unique=True)

        delisted = set(self.delisted)
        records = {row: change.record for change, row in zip(latest, known, strict=True) if row >= 0}
        delisted |= {row for row, record in records.items() if record is None}
        relisted = {row for row, record in records.items() if record is not None} & delisted
        delisted -= relisted
        changed, judged = self._shown_anew(records)

        index = self.retriever.index
        assert isinstance(index, SegmentedIndex), "made by `over`"
        unused = len(later.used) - int(later.used.sum())
        if relisted or unused > max(_UNUSED_ROWS, len(later.used) // 2):
            flagged = _renumbered(flagged, len(self.items), later.used)
            index, later = self._rebuilt(base, index, later, delisted)
            later_rows = {one.item_id: len(self.items) + row for row, one in enumerate(later.shown)}
        else:
            index = index.without(np.array([*(delisted - self.delisted), *(len(self.items) + row for row in gone)], dtype=np.int64))

        newcomers = [change.record for change, row in zip(latest, known, strict=True) if row < 0 and change.record is not None]
        names = self.names
        if newcomers:
            (sid_rows, vectors, errors, unknown), tokens, new_words = self.placer.place(newcomers)
            shown = tuple(map(ShownItem.of, newcomers))
            names = names.with_names(shown)
            later_rows |= {one.item_id: index.num_items + place for place, one in enumerate(newcomers)}
            later = later.with_rows(LaterRows(np.ones(len(shown), bool), errors, unknown, *names.numbers_of(shown), shown, tuple(new_words)))
            index = self._added(index, sid_rows, newcomers, vectors, tokens)
        names = names.with_names(changed[row] for row in judged)
        back = {one for one, flag in flags.items() if flag}
        out_of_stock = (self.out_of_stock | flags.keys()) - back if flags else self.out_of_stock
        state = dataclasses.replace(
            self,
            applied=tail.sequence,
            later=later,
            later_rows=later_rows,
            changed=changed,
            judged=judged,
            delisted=frozenset(delisted),
            out_of_stock=out_of_stock,
            names=names,
        )
        state = dataclasses.replace(state, flagged_rows=np.union1d(flagged, state.rows_of(named & out_of_stock)).astype(np.int32))
        return dataclasses.replace(state, retriever=state._retriever_over(index))

    def _published_rows(self, base: SidIndex, changes: Sequence[Change]) -> list[int]:
        """The item row of each change's item where the bundle publishes it, else -1."""
        rows = self.item_ids.rows_of([one.item_id for one in changes])
        if base.num_published < base.num_items:  # a compacted index: what it delisted comes back as a later item
            places = _places_of(base, rows[rows >= 0])
            rows[~np.isin(rows, base.rows_at(places))] = -1
        return [int(row) for row in rows]

    def _shown_anew(self, records: Mapping[int, ItemRecord | None]) -> tuple[dict[int, ShownItem], frozenset[int]]:
        """`changed` and `judged` after published items got other records or were delisted."""
        changed = {row: shown for row, shown in self.changed.items() if row not in records}
        judged = self.judged - records.keys()
        listed = [(row, record) for row, record in records.items() if record is not None]
        before = self.published.shown([row for row, _ in listed]) if listed else []
        for (row, record), was in zip(listed, before, strict=True):
            now, path, brand = ShownItem.of(record), tuple(was["category_path"]), was["brand"] or ""
            if now != ShownItem(was["item_id"], was["title"], path, brand, _number(was["price"])):
                changed[row] = now
            if (now.category_path, now.brand) != (path, brand):
                judged |= {row}
        return changed, judged

    def _rebuilt(self, base: SidIndex, index: SegmentedIndex, later: LaterRows, delisted: set[int]) -> tuple[SegmentedIndex, LaterRows]:
        """The index over the base anew, with the later rows in use in their order; what lists an item again, or frees rows that are not in use."""
        rebuilt = SegmentedIndex(base).without(np.array(sorted(delisted), dtype=np.int64))
        used, held = np.flatnonzero(later.used), index.later
        if len(used):
            words = held.words
            rebuilt = rebuilt.added(
                held.item_sid[used],
                held.prior[used],
                vectors=None if held.vectors is None else held.vectors[used],
                tokens=None if words is None else [words.tokens[words.offsets[row] : words.offsets[row + 1]] for row in used.tolist()],
            )
        return rebuilt, later.kept()

    def _added(
        self,
        index: SegmentedIndex,
        sid_rows: NDArray[np.int32],
        records: Sequence[ItemRecord],
        vectors: NDArray[np.float32],
        tokens: Sequence[NDArray[np.integer]],
    ) -> SegmentedIndex:
        """With newcomers, and of them what the decoder's guidance reads."""
        guidance = self.retriever.model.guidance
        prior = np.clip([one.prior_score or 0.0 for one in records], -_MOST, _MOST).astype(np.float32)
        return index.added(
            sid_rows,
            prior,
            vectors=None if guidance is None else vectors,
            tokens=None if guidance is None or not guidance.lexical_weight else tokens,
        )

    def _retriever_over(self, index: SegmentedIndex) -> Retriever:
        filters = self.published.retriever.filters
        live = filters if filters is None else LiveFilterCache(filters, self._own_records(index))
        return self.published.retriever.with_index(index, live, self.later.words_in_use())

    def _own_records(self, index: SegmentedIndex) -> OwnRecords:
        base, later = index.base, np.flatnonzero(self.later.used).astype(np.int32)
        places = _places_of(base, np.array(sorted(self.judged - self.delisted), dtype=np.int32))
        rows = base.rows_at(places)
        categories, brands = self.names.numbers_of([self.changed[row] for row in rows.tolist()])
        return OwnRecords(
            rows=np.concatenate([rows, base.num_items + later]).astype(np.int32),
            sids=np.concatenate([base.sids_of(rows), index.later.item_sid[later]]).astype(np.int32),
            places=np.concatenate([places, base.num_published + later.astype(np.int64)]),
            category_of=np.concatenate([categories, self.later.categories[later]]),
            brand_of=np.concatenate([brands, self.later.brands[later]]),
            categories=tuple(self.names.categories),
            brands=tuple(self.names.brands),
            off_lists=np.array(sorted(self.judged | self.delisted), dtype=np.int32),
            out_of_stock=self.flagged_rows,
        )


def _places_of(base: SidIndex, rows: NDArray[np.int32]) -> NDArray[np.int64]:
    """The places int64 of item rows, ascending; rows that are not published have none."""
    places, _ = base.places(np.unique(base.sids_of(rows)), _ALL)
    return places[np.isin(base.rows_at(places), rows)]


def _renumbered(rows: NDArray[np.int32], first_later: int, used: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Item rows after those of later items that are not in use were freed, which are left out."""
    later = rows[rows >= first_later] - first_later
    return np.concatenate([rows[rows < first_later], first_later + (np.cumsum(used) - 1)[later[used[later]]]]).astype(np.int32)


def _number(value: float | None) -> float | None:
    """A price as a record has it: a bundle writes nan for none."""
    return None if value is None or value != value else value
