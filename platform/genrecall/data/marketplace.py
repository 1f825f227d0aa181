"""The built-in marketplace: a seeded simulator of an e-commerce site's catalogue, shoppers and search log, with the truth behind it.

The log is what a production search engine showed (`marketplace_production`) and shoppers did (`marketplace_truth`) over 30
days: popularity drifts, a fifth of the items arrive within the window, clicks depend on position and taste, one place in
twenty is random exploration. Events are made block by block in time order, and nothing of a block is kept: memory does not
grow with the number of requests. Relevance exists for every (request, item) pair, shown or not, and is computed again from
the request id. Everything hangs on (size, seed, `MARKETPLACE_VERSION`) alone; tables are comparable only within a version.

Shapes: N items, R requests, P places of a page; item rows are int, -1 for an empty place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from genrecall.data.marketplace_catalog import SIZES, MarketplaceCatalog, MarketplaceSize, build_catalog
from genrecall.data.marketplace_production import Pages, Production
from genrecall.data.marketplace_shoppers import BLOCK, MarketRequests, RequestSource, build_shoppers
from genrecall.data.marketplace_truth import PageOutcome, Truth, grades
from genrecall.data.schema import ACTIONS, EVENTS, TIMESTAMP, RawTables

MARKETPLACE_VERSION = 1
_STREAM = 404
_CACHED_BLOCKS = 8
_SECOND = 1_000_000
_PairFunction = Callable[[MarketRequests, np.ndarray, np.ndarray], np.ndarray]


class MarketplaceError(ValueError):
    """A size, request id or page that this marketplace does not have; the message says what it has."""


@dataclass(frozen=True)
class _Log:
    """Events as parallel arrays; `request` counts within the block's requests."""

    times: np.ndarray
    requests: np.ndarray
    rows: np.ndarray
    actions: np.ndarray
    positions: np.ndarray


class Marketplace:
    """A simulated site.

    Args:
        size: "tiny", "small", "medium", "large", "busy" or a `MarketplaceSize` of your own.
        seed: of everything in it.

    Raises:
        MarketplaceError: an unknown size name.
    """

    def __init__(self, size: str | MarketplaceSize = "small", seed: int = 0) -> None:
        if isinstance(size, str) and size not in SIZES:
            raise MarketplaceError(f"marketplace size {size!r}: expected one of {', '.join(SIZES)} or a MarketplaceSize")
        self.size = SIZES[size] if isinstance(size, str) else size
        self.seed = seed
        self.catalog: MarketplaceCatalog = build_catalog(self.size, seed)
        self.shoppers = build_shoppers(self.size, self.catalog, seed)
        self.truth = Truth(self.catalog, self.shoppers)
        self.production = Production(self.catalog, self.truth, seed)
        self._source = RequestSource(self.size, self.catalog, self.shoppers, seed)
        self._blocks: OrderedDict[int, MarketRequests] = OrderedDict()

    def items(self) -> Iterator[pa.Table]:
        """The catalogue as canonical tables, in row order (which is the order of item ids)."""
        return self.catalog.tables()

    def users(self) -> Iterator[pa.Table]:
        """The shoppers as canonical tables."""
        yield self.shoppers.table()

    def events(self) -> Iterator[pa.Table]:
        """The log as canonical tables in time order, about ten thousand rows at a time, made as they are read."""
        pending: tuple[pa.Table, np.ndarray] | None = None
        for number in range(self._source.num_blocks):
            requests = self._source.block(number)
            rng = np.random.default_rng([self.seed, _STREAM, number])
            pages = self.production.pages(requests, rng)
            table, times = self._table(requests, self._log(requests, pages, rng))
            if pending is not None:
                table, times = pa.concat_tables([pending[0], table]), np.concatenate([pending[1], times])
            # A purchase may come after the next block's first search: what is later than that waits for it.
            last = number + 1 == self._source.num_blocks
            until = np.iinfo(np.int64).max if last else int(self._source.block(number + 1).times[0])
            order = np.argsort(times, kind="stable")
            ready = int(np.searchsorted(times[order], until))
            pending = table.take(order[ready:]).combine_chunks(), times[order[ready:]]
            yield table.take(order[:ready]).combine_chunks()

    def tables(self) -> RawTables:
        """Items, users and events as `prepare_data` takes them, split by time."""
        return RawTables(items=self.items(), users=self.users(), events=self.events(), query_kind="simulated", split="time")

    def requests(self, request_ids: Sequence[str]) -> MarketRequests:
        """The requests with these ids, with the intent behind each, drawn again from the seed.

        Raises:
            MarketplaceError: an id that is not one of this marketplace.
        """
        numbers = np.array([self._number(one) for one in request_ids], dtype=np.int64)
        if len(numbers) == 0:
            raise MarketplaceError("request_ids: expected at least one request id, got none")
        blocks, which = np.unique(numbers // BLOCK, return_inverse=True)
        order = np.argsort(which, kind="stable")
        parts, start = [], 0
        for place, block in enumerate(blocks.tolist()):
            count = int((which == place).sum())
            parts.append(self._block(block).take(numbers[order[start : start + count]] % BLOCK))
            start += count
        return MarketRequests.concat(parts).take(np.argsort(order, kind="stable"))

    def relevance(self, requests: MarketRequests | Sequence[str], item_rows: np.ndarray) -> np.ndarray:
        """True relevance of items to requests, shown or not.

        Args:
            requests: requests or their ids, R of them.
            item_rows: int [R, P], or int [P] for the same items for every request; -1 where empty.

        Returns:
            float32 [R, P] in [0, 1]; 1 meets the whole intent, 0 is another aisle (or an empty place).
        """
        return self._pairwise(self.truth.relevance, requests, item_rows)

    def grades(self, requests: MarketRequests | Sequence[str], item_rows: np.ndarray) -> np.ndarray:
        """True relevance as grades, int8 [R, P]: 3 meets the intent, 2 misses one wish, 1 is a weak substitute, 0 irrelevant."""
        return grades(self.relevance(requests, item_rows))

    def click_probability(self, requests: MarketRequests | Sequence[str], item_rows: np.ndarray) -> np.ndarray:
        """Probability of a click once the item is looked at, by this request's shopper, float32 [R, P]."""
        return self._pairwise(self.truth.click_probability, requests, item_rows)

    def relevant_items(self, request_id: str, *, at_least: float = 0.8) -> np.ndarray:
        """Rows of all items that had arrived by the request and have this relevance, shown or not; int32, ascending."""
        request = self.requests([request_id])
        rows = np.arange(len(self.catalog))
        relevance = self.truth.relevance(request, np.zeros(len(rows), dtype=np.int64), rows)
        return np.flatnonzero((relevance >= at_least) & (self.catalog.first_seen <= request.times[0])).astype(np.int32)

    def shown(self, request_id: str) -> Pages:
        """The page the log shows for a request, and which of its places were exploration (made again with its whole block)."""
        number = self._number(request_id)
        requests = self._block(number // BLOCK)
        pages = self.production.pages(requests, np.random.default_rng([self.seed, _STREAM, number // BLOCK]))
        row = slice(number % BLOCK, number % BLOCK + 1)
        return Pages(pages.rows[row], pages.explored[row])

    def simulate_page(self, requests: MarketRequests | Sequence[str], ranked_item_rows: np.ndarray, rng: np.random.Generator) -> PageOutcome:
        """Show other pages to the shoppers of `requests` and let them act, for A/B simulation.

        Args:
            requests: requests or their ids, R of them.
            ranked_item_rows: int [R, P], best first; -1 where empty.
            rng: source of all chance, so that two arms can share their luck.

        Returns:
            clicks, carts and purchases, bool [R, P], and money spent, float64 [R].
        """
        return self.truth.simulate(self._resolve(requests), np.asarray(ranked_item_rows), rng)

    def _resolve(self, requests: MarketRequests | Sequence[str]) -> MarketRequests:
        return requests if isinstance(requests, MarketRequests) else self.requests(requests)

    def _pairwise(self, function: _PairFunction, requests: MarketRequests | Sequence[str], item_rows: np.ndarray) -> np.ndarray:
        resolved = self._resolve(requests)
        rows = np.asarray(item_rows)
        rows = np.broadcast_to(rows, (len(resolved), rows.shape[-1]))
        if rows.size and (rows.max() >= len(self.catalog) or rows.min() < -1):
            raise MarketplaceError(f"item_rows: expected rows from -1 to {len(self.catalog) - 1}, got {int(rows.min())} to {int(rows.max())}")
        which = np.repeat(np.arange(len(resolved)), rows.shape[1])
        return np.asarray(function(resolved, which, rows.reshape(-1))).reshape(rows.shape)

    def _number(self, request_id: str) -> int:
        number = int(request_id[1:]) if request_id[:1] == "r" and request_id[1:].isdigit() else -1
        if not 0 <= number < self.size.requests:
            raise MarketplaceError(f"request id {request_id!r}: this marketplace has r00000000 to r{self.size.requests - 1:08d}")
        return number

    def _block(self, number: int) -> MarketRequests:
        if number not in self._blocks:
            self._blocks[number] = self._source.block(number)
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _log(self, requests: MarketRequests, pages: Pages, rng: np.random.Generator) -> _Log:
        """What happened on the pages, with times: a click some seconds after the search, a cart after the click, a purchase within minutes."""
        outcome = self.truth.simulate(requests, pages.rows, rng)
        shown = pages.rows >= 0
        place = np.broadcast_to(np.arange(shown.shape[1]), shown.shape)
        delays = rng.random((3, *shown.shape))
        click = ((2.0 + 2.0 * place + 20.0 * delays[0]) * _SECOND).astype(np.int64)
        cart = click + ((5.0 + 60.0 * delays[1]) * _SECOND).astype(np.int64)
        purchase = cart + ((30.0 + 900.0 * delays[2]) * _SECOND).astype(np.int64)
        parts = []
        masks = (shown, outcome.clicks & shown, outcome.carts & shown, outcome.purchases & shown)
        for action, (mask, delay) in enumerate(zip(masks, (np.zeros_like(click), click, cart, purchase), strict=True)):
            which, position = np.nonzero(mask)
            parts.append((requests.times[which] + delay[mask], which, pages.rows[mask], np.full(len(which), action), position))
        times, which, rows, actions, positions = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return _Log(times, which, rows, actions, positions)

    def _table(self, requests: MarketRequests, log: _Log) -> tuple[pa.Table, np.ndarray]:
        users = [f"u{user:06d}" for user in requests.users.tolist()]
        columns = {
            "request_id": pa.array(requests.request_ids).take(log.requests),
            "user_id": pa.array(users).take(log.requests),
            "timestamp": pa.array(log.times).cast(TIMESTAMP),
            "sequence": pa.nulls(len(log.times), pa.int64()),
            "query": pa.array(requests.queries).take(log.requests),
            "item_id": pa.array(self.catalog.item_ids(log.rows)),
            "action": pa.array(ACTIONS).take(log.actions),
            "position": pa.array(log.positions.astype(np.int32)),
            "grade": pa.nulls(len(log.times), pa.float32()),
        }
        return pa.table(columns, schema=EVENTS), log.times
