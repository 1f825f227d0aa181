"""What shoppers of the built-in marketplace truly want: relevance of any item to any request, and how they act on a page.

Relevance compares intent and item: the wanted product type counts 1, another type of the same aisle `SUBSTITUTE`, anything else 0;
each attribute value asked for and not met multiplies by `MISSED_VALUE`, a brand asked for and not met by `MISSED_BRAND`.
Whether a seen item is clicked also depends on taste: brand, preferred values, price against budget, quality. The page is read from the
top: the chance to look at position p is (1 + p) ** -EXAMINATION_DECAY, independent of what stands there (the position-based
click model of Craswell et al., WSDM 2008).

Shapes: R requests, P places of a page, n pairs (request, item); an item row of -1 is an empty place with relevance 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from genrecall.data.marketplace_catalog import MarketplaceCatalog
from genrecall.data.marketplace_shoppers import MarketRequests, Shoppers
from genrecall.data.marketplace_vocabulary import DIMENSIONS

SUBSTITUTE = 0.12
MISSED_VALUE = 0.35
MISSED_BRAND = 0.45
EXAMINATION_DECAY = 0.6
GRADE_BOUNDS = (0.1, 0.3, 0.8)  # relevance from which an item has grade 1, 2, 3

_DIMENSION_TASTE = {"audience": 1.5, "colour": 0.8, "size": 0.8, "breed": 1.2, "concern": 1.2}
_OTHER_TASTE = 0.5
_BRAND_TASTE = (1.1, 0.7)


@dataclass(frozen=True)
class PageOutcome:
    """What shoppers did on pages of items: bool [R, P] each, and what they spent, float64 [R]."""

    clicks: np.ndarray
    carts: np.ndarray
    purchases: np.ndarray
    gmv: np.ndarray


@dataclass(frozen=True)
class Truth:
    """The model behind all feedback of a marketplace."""

    catalog: MarketplaceCatalog
    shoppers: Shoppers

    def relevance(self, requests: MarketRequests, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Relevance in [0, 1] of pairs: request `which[n]` of the batch, item `rows[n]`; float32 [n]."""
        catalog = self.catalog
        item_types = catalog.type_of[rows]
        wanted_types = requests.types[which]
        same_aisle = catalog.type_aisle[item_types] == catalog.type_aisle[wanted_types]
        score = np.where(item_types == wanted_types, 1.0, np.where(same_aisle, SUBSTITUTE, 0.0))
        values = catalog.values[rows]
        for slot in range(requests.wanted.shape[1]):
            wanted = requests.wanted[which, slot]
            met = (wanted < 0) | (values == wanted[:, None]).any(axis=1)
            score = np.where(met, score, score * MISSED_VALUE)
        brand = requests.brands[which]
        score = np.where((brand < 0) | (catalog.brand_of[rows] == brand), score, score * MISSED_BRAND)
        return np.where(rows >= 0, score, 0.0).astype(np.float32)

    def taste(self, requests: MarketRequests, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """How much the shopper likes the item, whatever the query: a log-odds shift, float32 [n], mostly within [-3, 3]."""
        catalog, shoppers = self.catalog, self.shoppers
        users = requests.users[which]
        item_types = catalog.type_of[rows]
        dimensions = self._dimensions_of_type[item_types]
        values = catalog.values[rows]
        liked = (shoppers.preferred[users[:, None], dimensions] == values) * self._weight_of_dimension[dimensions]
        favourites = shoppers.favourite_brands[users, catalog.type_department[item_types]]
        brands = catalog.brand_of[rows]
        brand = np.maximum(_BRAND_TASTE[0] * (favourites[:, 0] == brands), _BRAND_TASTE[1] * (favourites[:, 1] == brands))
        target = shoppers.budget[users] + 0.8 * requests.mood[which]
        price = -0.3 * np.square(catalog.price_level[rows] - target)
        return np.asarray(liked.sum(axis=1) + brand + price + 0.4 * catalog.quality[rows] + 0.3 * catalog.appeal[rows], dtype=np.float32)

    def click_probability(self, requests: MarketRequests, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Probability that an item is clicked once it is looked at, float32 [n]."""
        relevance = self.relevance(requests, which, rows)
        return np.asarray(relevance**1.5 * _sigmoid(self.taste(requests, which, rows) - 0.9), dtype=np.float32)

    def purchase_probability(self, requests: MarketRequests, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Probability that an item is bought once it is clicked, float32 [n]."""
        relevance = self.relevance(requests, which, rows)
        return np.asarray(0.45 * relevance**2 * _sigmoid(self.taste(requests, which, rows) - 0.9), dtype=np.float32)

    def simulate(self, requests: MarketRequests, pages: np.ndarray, rng: np.random.Generator) -> PageOutcome:
        """Let the shoppers of `requests` read `pages` (int [R, P] item rows, -1 where empty) and act.

        A purchase puts the item into the cart first; a cart needs a click. The draws come from `rng` alone.
        """
        if pages.ndim != 2 or len(pages) != len(requests):
            raise ValueError(f"pages: expected one row of item rows for each of {len(requests)} requests, got shape {pages.shape}")
        which = np.repeat(np.arange(len(requests)), pages.shape[1])
        rows = pages.reshape(-1)
        u = rng.random((3, len(requests), pages.shape[1]))
        seen = examination(pages.shape[1])
        clicks = u[0] < seen * self.click_probability(requests, which, rows).reshape(pages.shape)
        buys = self.purchase_probability(requests, which, rows).reshape(pages.shape)
        purchases = clicks & (u[1] < buys)
        carts = purchases | (clicks & (u[2] < 1.2 * buys))
        prices = np.where(pages >= 0, self.catalog.prices[pages], 0.0)
        return PageOutcome(clicks, carts, purchases, (purchases * prices).sum(axis=1))

    @cached_property
    def _dimensions_of_type(self) -> np.ndarray:
        return np.array([kind.dimensions for kind in self.catalog.types])

    @cached_property
    def _weight_of_dimension(self) -> np.ndarray:
        return np.array([_DIMENSION_TASTE.get(name, _OTHER_TASTE) for name in DIMENSIONS], dtype=np.float32)


def examination(places: int) -> np.ndarray:
    """Chance to look at each place of a page, float64 [places], 1 at the top."""
    return np.asarray((1.0 + np.arange(places)) ** -EXAMINATION_DECAY)


def grades(relevance: np.ndarray) -> np.ndarray:
    """Relevance in [0, 1] as grades 0 to 3, int8, same shape."""
    return np.searchsorted(GRADE_BOUNDS, relevance, side="right").astype(np.int8)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))
