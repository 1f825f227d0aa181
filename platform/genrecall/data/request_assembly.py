"""From the events of some shoppers to their requests: sessions, duplicates, bots, what was exposed, clicked and bought, history.

Pure numpy and Arrow on one partition, which must hold all events of each of its shoppers. Rules:

- Order in time is (timestamp, sequence); sources without time have sequences alone.
- A row without a request id joins the shopper's running request for the same query; a gap longer than `session_gap_minutes`
  opens a new one (where there is no time: another query in between does).
- Request ids are taken per shopper: one id logged under two shoppers gives two requests.
- Repeated (request, item, action) rows count once, at their earliest time.
- A shopper with more events or clicks on one day (UTC) than a person makes is a bot: all of that shopper's events go. Likewise
  a request with more rows of clicks, carts and purchases than `max_clicks_per_request`. Both are counted before repeated rows go.
- What was clicked or bought was also exposed, even if the log lacks the exposure.
- History is what the shopper clicked or bought strictly before the request began, one entry per (request, item).

Shapes: E events, R requests, P (request, item) pairs; ragged columns as values and offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrecall.data.schema import ACTIONS, EVENTS, REQUESTS
from genrecall.data.splits import text_hash

_DAY = 86_400_000_000
_MINUTE = 60_000_000
_NO_POSITION = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True)
class AssemblyRules:
    """Thresholds of sessions, bots and histories; see the module's header."""

    session_gap_minutes: float
    max_user_events_per_day: int
    max_user_clicks_per_day: int
    max_clicks_per_request: int
    history_length: int


@dataclass(frozen=True)
class Assembled:
    """One partition's outcome.

    `requests` has the columns of `schema.REQUESTS` (gender and age band null), ordered by time within a shopper; `events` those of
    `schema.EVENTS`; `event_request` int32 [E] is each event's place in `requests`; `users` int32 [R] numbers the shoppers (-1:
    none) and `order` int64 [R] ranks the requests in time.
    """

    requests: pa.Table
    events: pa.Table
    event_request: np.ndarray
    users: np.ndarray
    order: np.ndarray
    counts: dict[str, int]


def assemble_requests(events: pa.Table, rules: AssemblyRules) -> Assembled:
    """Assemble the requests of one partition.

    Args:
        events: columns of `schema.EVENTS`, with null request ids where the source has none, in any order as long as it is always
            the same (ties are broken by place).
    """
    counts = {"duplicate": 0, "bot": 0}
    events = events.select(EVENTS.names).combine_chunks()
    events = events.set_column(0, "request_id", _with_session_ids(events, rules))
    log = _Log(events)
    human = ~_bots(log, rules)
    counts["bot"] = int((~human).sum())
    first = _first_of_each(log, human)
    counts["duplicate"] = int(human.sum()) - len(first)
    events, log = events.take(pa.array(first)), log.take(first)

    # Number the requests by (shopper, time, id); `log.request` becomes that number.
    began, request = _number_requests(log, events)
    num_requests = len(began)
    pairs = _Pairs(log, request)
    requests = events.take(pa.array(began)).select(["request_id", "user_id", "query"])
    users, order = log.user[began], log.when[began]
    positive = pairs.clicked_when >= 0
    bought = pairs.purchased_when >= 0
    page = np.lexsort((pairs.when, pairs.position, pairs.request))
    by_click = np.flatnonzero(positive)[np.lexsort((pairs.clicked_when[positive], pairs.request[positive]))]
    by_purchase = np.flatnonzero(bought)[np.lexsort((pairs.purchased_when[bought], pairs.request[bought]))]
    ids = pc.take(events["item_id"].combine_chunks(), pa.array(pairs.example))
    history, history_offsets = _histories(users, order, pairs.request, pairs.clicked_when, rules.history_length)
    columns = {
        "request_id": requests["request_id"],
        "user_id": requests["user_id"],
        "timestamp": pc.take(events["timestamp"], pa.array(began)),
        "sequence": pc.take(events["sequence"], pa.array(began)),
        "query": requests["query"],
        "gender": pa.nulls(num_requests, pa.string()),
        "age_band": pa.nulls(num_requests, pa.string()),
        "exposed": _ragged(ids.take(pa.array(page)), pairs.request[page], num_requests),
        "grades": _ragged(pa.array(pairs.grade[page], pa.float32(), from_pandas=True), pairs.request[page], num_requests),
        "clicked": _ragged(ids.take(pa.array(by_click)), pairs.request[by_click], num_requests),
        "purchased": _ragged(ids.take(pa.array(by_purchase)), pairs.request[by_purchase], num_requests),
        "history": pa.ListArray.from_arrays(pa.array(history_offsets, pa.int32()), ids.take(pa.array(history))),
    }
    table = pa.table([columns[name] for name in REQUESTS.names], schema=REQUESTS)
    return Assembled(table, events.cast(EVENTS), request.astype(np.int32), users, order, counts)


class _Log:
    """The events' columns as numbers: shopper, request, item and action codes, time, rank in time."""

    def __init__(self, events: pa.Table) -> None:
        self.user = _codes(events["user_id"])
        ids = _codes(events["request_id"]).astype(np.int64)
        _, self.request = np.unique((self.user.astype(np.int64) + 1) * (ids.max(initial=0) + 1) + ids, return_inverse=True)
        self.item = _codes(events["item_id"])
        self.action = _to_numpy(pc.index_in(events["action"], value_set=pa.array(ACTIONS)), 0).astype(np.int8)
        self.position = _to_numpy(events["position"], _NO_POSITION).astype(np.int32)
        self.grade = _to_numpy(events["grade"], np.nan).astype(np.float32)
        self.has_time = _to_numpy(pc.is_valid(events["timestamp"]), False).astype(bool)
        self.time = _to_numpy(events["timestamp"].cast(pa.int64()), 0)
        self.when = _ranks(self.time, _to_numpy(events["sequence"], 0))

    def take(self, rows: np.ndarray) -> _Log:
        taken = object.__new__(_Log)
        for name, column in vars(self).items():
            setattr(taken, name, column[rows])
        return taken


class _Pairs:
    """The distinct (request, item) pairs, sorted by request: where shown, how graded, when first seen, clicked and bought.

    `clicked_when` and `purchased_when` are ranks in time, -1 where it did not happen; `example` is an event of the pair.
    """

    def __init__(self, log: _Log, request: np.ndarray) -> None:
        rows = np.lexsort((log.when, log.item, request))
        starts = np.flatnonzero(np.append(True, (np.diff(request[rows]) != 0) | (np.diff(log.item[rows]) != 0))) if len(rows) else np.zeros(0, dtype=np.int64)
        never = np.iinfo(np.int64).max
        self.example = rows[starts]
        self.request = request[self.example]
        self.when = log.when[self.example]
        self.position = _reduce(np.minimum, log.position[rows], starts)
        self.grade = _reduce(np.fmax, log.grade[rows], starts)
        clicked = _reduce(np.minimum, np.where(log.action[rows] > 0, log.when[rows], never), starts)
        purchased = _reduce(np.minimum, np.where(log.action[rows] == ACTIONS.index("purchase"), log.when[rows], never), starts)
        self.clicked_when = np.where(clicked == never, -1, clicked)
        self.purchased_when = np.where(purchased == never, -1, purchased)


def _with_session_ids(events: pa.Table, rules: AssemblyRules) -> pa.ChunkedArray:
    """Request ids, with derived ones where they are null: `<shopper>~<start>~<query hash>`."""
    absent = np.flatnonzero(_to_numpy(pc.is_null(events["request_id"]), True).astype(bool))
    if not absent.size:
        return events["request_id"]
    rows = events.take(pa.array(absent))
    user, query = _codes(rows["user_id"]), _codes(rows["query"])
    time, sequence = _to_numpy(rows["timestamp"].cast(pa.int64()), 0), _to_numpy(rows["sequence"], 0)
    has_time = _to_numpy(pc.is_valid(rows["timestamp"]), False).astype(bool)
    # Where there is no clock, a run of one query (no other query of the shopper in between) is one request.
    by_order = np.lexsort((sequence, time, user))
    run = np.empty(len(rows), dtype=np.int64)
    run[by_order] = np.cumsum(np.append(True, (np.diff(user[by_order]) != 0) | (np.diff(query[by_order]) != 0)))
    run[has_time] = 0
    grouped = np.lexsort((sequence, time, run, query, user))
    later = grouped[1:]
    earlier = grouped[:-1]
    gap = (time[later] - time[earlier]) > rules.session_gap_minutes * _MINUTE
    opens = np.append(True, (user[later] != user[earlier]) | (query[later] != query[earlier]) | (run[later] != run[earlier]) | gap)
    opener = grouped[np.flatnonzero(opens)][np.cumsum(opens) - 1]
    start = np.where(has_time, time, sequence)[opener]
    hashes = text_hash(rows["query"].to_numpy(), seed=0)[opener]
    labels = np.array([f"{moment}~{code:016x}" for moment, code in zip(start.tolist(), hashes.tolist(), strict=True)], dtype=object)
    derived = pc.binary_join_element_wise(rows["user_id"].take(pa.array(grouped)), pa.array(labels, pa.string()), "~")
    back = np.empty(len(rows), dtype=np.int64)
    back[grouped] = np.arange(len(rows))
    mask = np.zeros(len(events), dtype=bool)
    mask[absent] = True
    return pa.chunked_array([pc.replace_with_mask(events["request_id"].combine_chunks(), pa.array(mask), derived.take(pa.array(back)).combine_chunks())])


def _bots(log: _Log, rules: AssemblyRules) -> np.ndarray:
    """bool [E]: events of shoppers and requests that no person makes."""
    clicks = (log.action > 0).astype(np.int64)
    bad = np.bincount(log.request, weights=clicks)[log.request] > rules.max_clicks_per_request if len(clicks) else np.zeros(0, dtype=bool)
    timed = np.flatnonzero((log.user >= 0) & log.has_time)
    if timed.size:
        day = log.time[timed] // _DAY
        _, user_day = np.unique(log.user[timed].astype(np.int64) * (day.max() - day.min() + 1) + (day - day.min()), return_inverse=True)
        many = (np.bincount(user_day) > rules.max_user_events_per_day) | (np.bincount(user_day, weights=clicks[timed]) > rules.max_user_clicks_per_day)
        bots = np.unique(log.user[timed][many[user_day]])
        bad |= np.isin(log.user, bots)
    return bad


def _first_of_each(log: _Log, keep: np.ndarray) -> np.ndarray:
    """Rows int64: of the kept events, the earliest of each (request, item, action), in the order of the input."""
    rows = np.flatnonzero(keep)
    # Among equally early rows one with a place on the page says more than one without.
    order = rows[np.lexsort((log.position[rows], log.when[rows], log.action[rows], log.item[rows], log.request[rows]))]
    keys = np.stack([log.request[order], log.item[order], log.action[order]])
    first = np.append(True, (np.diff(keys, axis=1) != 0).any(axis=0)) if len(order) else np.zeros(0, dtype=bool)
    return np.sort(order[first])


def _number_requests(log: _Log, events: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(the first event of each request, in the requests' order [R]; the request number of each event [E])."""
    if not len(log.request):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    rows = np.lexsort((log.when, log.request))
    starts = np.append(True, np.diff(log.request[rows]) != 0)
    first = rows[starts]
    name = _to_numpy(pc.rank(events["request_id"].take(pa.array(first)), tiebreaker="dense"), 0)
    order = np.lexsort((name, log.when[first], log.user[first]))
    number = np.empty(len(first), dtype=np.int64)
    number[order] = np.arange(len(first))
    request = np.empty(len(rows), dtype=np.int64)
    request[rows] = number[np.cumsum(starts) - 1]
    return first[order], request


def _histories(users: np.ndarray, began: np.ndarray, pair_request: np.ndarray, clicked_when: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each request the last `length` pairs that its shopper clicked strictly before it began: pair numbers and offsets [R + 1]."""
    pair_user = users[pair_request] if len(pair_request) else np.zeros(0, dtype=np.int32)
    candidates = np.flatnonzero((clicked_when >= 0) & (pair_user >= 0))
    width = int(max(began.max(initial=0), clicked_when.max(initial=0))) + 1
    keys = pair_user[candidates].astype(np.int64) * width + clicked_when[candidates]
    candidates = candidates[np.argsort(keys, kind="stable")]
    keys = np.sort(keys, kind="stable")
    known = users >= 0
    end = np.searchsorted(keys, users.astype(np.int64) * width + began, side="left")
    start = np.maximum(np.searchsorted(keys, users.astype(np.int64) * width, side="left"), end - length)
    count = np.where(known, end - start, 0)
    offsets = np.concatenate([[0], np.cumsum(count)])
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], count) + np.repeat(start, count)
    return candidates[places], offsets


def _reduce(function: np.ufunc, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return function.reduceat(values, starts) if len(starts) else values[:0]


def _ragged(values: pa.Array, owner: np.ndarray, count: int) -> pa.ListArray:
    """A list column from values sorted by owner."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))]) if count else np.zeros(1)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """int32 [n]: equal numbers for equal values, numbered by first appearance; -1 for null."""
    return _to_numpy(column.combine_chunks().dictionary_encode().indices, -1).astype(np.int32)


def _ranks(time: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """int64 [n]: place of each (time, sequence) among the distinct ones."""
    order = np.lexsort((sequence, time))
    ranks = np.empty(len(order), dtype=np.int64)
    if len(order):
        ranks[order] = np.cumsum(np.append(0, (np.diff(time[order]) != 0) | (np.diff(sequence[order]) != 0)))
    return ranks


def _to_numpy(column: pa.Array | pa.ChunkedArray, null: float | bool) -> np.ndarray:
    filled = pc.fill_null(column, pa.scalar(null, column.type)) if column.null_count else column
    return np.asarray(filled.to_numpy(zero_copy_only=False) if isinstance(filled, pa.Array) else filled.to_numpy())
