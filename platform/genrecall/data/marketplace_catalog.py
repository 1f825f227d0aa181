"""The catalogue of the built-in marketplace: items with types, attributes, brands, prices, titles and days of arrival.

Everything is drawn once from the seed and held as arrays (about 200 bytes an item with its title): the events are what is
streamed, not the catalogue. Shapes: N items, T product types, V attribute values (ids of `marketplace_vocabulary`), B brands.
Item ids are zero-padded numbers in row order, so an item's row here is its row in the catalogue sorted by item id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from genrecall.data.marketplace_vocabulary import BRAND_ENDS, BRAND_STARTS, DIMENSIONS, TITLE_FILLERS, ProductType, attribute_values, product_types
from genrecall.data.schema import ITEMS

DAYS = 30
WINDOW_END = np.datetime64("2026-01-31T00:00:00", "us")  # in the past, so that no timestamp lies in the future
WINDOW_START = WINDOW_END - np.timedelta64(DAYS, "D")
NEW_ITEM_SHARE = 0.2  # of the items arrive during the window
UNCATEGORISED_SHARE = 0.05
_CHUNK_ROWS = 10_000
_STREAM = 101  # keeps the catalogue's random numbers apart from the shoppers' and the requests'


@dataclass(frozen=True)
class MarketplaceSize:
    """How much of everything there is; more departments means more product types (about 18 each, 184 in all)."""

    name: str
    items: int
    users: int
    requests: int
    departments: int
    brands_per_department: int

    def __post_init__(self) -> None:
        if min(self.items, self.users, self.requests, self.departments, self.brands_per_department) < 1 or self.departments > 10:
            raise ValueError(f"marketplace size {self.name!r}: all counts must be at least 1 and departments at most 10, got {self}")
        if self.brands_per_department * self.departments > len(BRAND_STARTS) * len(BRAND_ENDS):
            raise ValueError(f"marketplace size {self.name!r}: at most {len(BRAND_STARTS) * len(BRAND_ENDS)} brands exist in all, got {self}")


SIZES = {
    size.name: size
    for size in (
        MarketplaceSize("tiny", items=400, users=250, requests=1_500, departments=2, brands_per_department=6),
        MarketplaceSize("small", items=2_000, users=700, requests=8_000, departments=4, brands_per_department=10),
        MarketplaceSize("medium", items=20_000, users=5_000, requests=30_000, departments=10, brands_per_department=25),
        MarketplaceSize("large", items=100_000, users=15_000, requests=72_000, departments=10, brands_per_department=60),
        MarketplaceSize("busy", items=2_000, users=5_000, requests=60_000, departments=4, brands_per_department=10),  # small's items, more traffic
    )
}


@dataclass(frozen=True)
class MarketplaceCatalog:
    """The items as arrays.

    Attributes:
        types: product types by id.
        type_of: int16 [N]; type_aisle, type_department: int16 [T].
        values: int16 [N, 3], attribute value ids, one for each dimension of the item's type.
        brand_of: int32 [N]; brand_names: [B]; brand_department: int16 [B].
        prices: float64 [N], money; price_level: float32 [N], log price in standard deviations within the type.
        quality, appeal: float32 [N], standard normal; appeal is what popularity hangs on, quality is seen by shoppers.
        prior_score: float64 [N] in (0, 1): the site's own estimate of sales efficiency; says nothing of items that arrive in the window.
        first_seen: int64 [N], microseconds since 1970.
        categorised: bool [N].
        titles: N strings.
    """

    types: tuple[ProductType, ...]
    type_aisle: np.ndarray
    type_department: np.ndarray
    type_of: np.ndarray
    values: np.ndarray
    brand_of: np.ndarray
    brand_names: list[str]
    brand_department: np.ndarray
    prices: np.ndarray
    price_level: np.ndarray
    quality: np.ndarray
    appeal: np.ndarray
    prior_score: np.ndarray
    first_seen: np.ndarray
    categorised: np.ndarray
    titles: list[str]
    seed: int

    def __len__(self) -> int:
        return len(self.type_of)

    def item_ids(self, rows: np.ndarray) -> list[str]:
        """Item ids of rows (int [n])."""
        return [f"i{row:07d}" for row in rows.tolist()]

    def rows_of(self, item_ids: list[str]) -> np.ndarray:
        """Rows of item ids, int32 [n]; -1 where the marketplace has no such item."""
        rows = [int(one[1:]) if len(one) == 8 and one[0] == "i" and one[1:].isdigit() else -1 for one in item_ids]
        return np.array([row if row < len(self) else -1 for row in rows], dtype=np.int32)

    def tables(self) -> Iterator[pa.Table]:
        """The items as canonical tables, in row order, in chunks."""
        for start in range(0, len(self), _CHUNK_ROWS):
            rows = np.arange(start, min(start + _CHUNK_ROWS, len(self)))
            columns = {
                "item_id": self.item_ids(rows),
                "title": self.titles[start : start + len(rows)],
                "category_path": [self._category_path(row) for row in rows.tolist()],
                "brand": [self.brand_names[brand] for brand in self.brand_of[rows].tolist()],
                "text": self._texts(rows),
                "price": self.prices[rows],
                "prior_score": self.prior_score[rows],
                "first_seen": pa.array(self.first_seen[rows]).cast(pa.timestamp("us", tz="UTC")),
            }
            yield pa.table(columns, schema=ITEMS)

    def _category_path(self, row: int) -> list[str]:
        if not self.categorised[row]:
            return []
        kind = self.types[self.type_of[row]]
        leaf = kind.titles[0].title()
        return [kind.department_name, kind.aisle_name, leaf, f"{attribute_values()[self.values[row, 0]].title.capitalize()} {leaf}"]

    def _texts(self, rows: np.ndarray) -> list[str]:
        """Attribute sheets; one in seven sellers also writes down another name that shoppers use."""
        rng = np.random.default_rng([self.seed, _STREAM, 1, int(rows[0])])
        also, which = rng.random(len(rows)) < 1 / 7, rng.random(len(rows))
        names, values = list(DIMENSIONS), attribute_values()
        texts = []
        for n, row in enumerate(rows.tolist()):
            kind = self.types[self.type_of[row]]
            sheet = " ".join(f"{names[values[v].dimension].capitalize()}: {values[v].title}." for v in self.values[row].tolist())
            if also[n]:
                other = kind.titles[1:] + kind.colloquial
                sheet += f" Also known as {other[int(which[n] * len(other))]}."
            texts.append(sheet)
        return texts


def build_catalog(size: MarketplaceSize, seed: int) -> MarketplaceCatalog:
    """Draw the catalogue of a marketplace."""
    rng = np.random.default_rng([seed, _STREAM])
    types = product_types(size.departments)
    type_department = np.array([kind.department for kind in types], dtype=np.int16)
    type_of = _spread(rng, size.items, zipf_weights(rng, len(types), 0.4)).astype(np.int16)

    value_of_dimension = [np.flatnonzero([value.dimension == d for value in attribute_values()]) for d in range(len(DIMENSIONS))]
    values = np.empty((size.items, 3), dtype=np.int16)
    for t, kind in enumerate(types):
        members = np.flatnonzero(type_of == t)
        for slot, dimension in enumerate(kind.dimensions):
            choices = value_of_dimension[dimension]
            values[members, slot] = rng.choice(choices, size=len(members), p=zipf_weights(rng, len(choices), 0.7))

    brand_names = _brand_names(rng, size.brands_per_department * size.departments)
    brand_department = np.repeat(np.arange(size.departments, dtype=np.int16), size.brands_per_department)
    brand_tier = rng.normal(size=len(brand_names)).astype(np.float32)
    brand_of = np.empty(size.items, dtype=np.int32)
    for t, kind in enumerate(types):
        members = np.flatnonzero(type_of == t)  # not every brand makes everything: a type is made by half of its department's brands
        makers = rng.permutation(np.flatnonzero(brand_department == kind.department))[: max(3, size.brands_per_department // 2)]
        brand_of[members] = rng.choice(makers, size=len(members), p=zipf_weights(rng, len(makers), 0.7))

    tier = brand_tier[brand_of]
    quality = (0.5 * tier + rng.normal(scale=0.87, size=size.items)).astype(np.float32)
    appeal = (0.5 * quality + rng.normal(scale=0.87, size=size.items)).astype(np.float32)
    price_level = (0.6 * tier + 0.3 * quality + rng.normal(scale=0.65, size=size.items)).astype(np.float32)
    base = rng.uniform(np.log(8.0), np.log(150.0), size=len(types))
    prices = np.round(np.exp(base[type_of] + 0.45 * price_level), 2)

    arrives = rng.random(size.items) < NEW_ITEM_SHARE
    day = np.where(arrives, rng.uniform(0, DAYS, size.items), -rng.uniform(1, 400, size.items))
    first_seen = WINDOW_START.astype(np.int64) + (day * 86_400e6).astype(np.int64)
    estimate = np.where(arrives, 0.0, 0.8 * appeal + rng.normal(scale=0.6, size=size.items))

    return MarketplaceCatalog(
        types=types,
        type_aisle=np.array([kind.aisle for kind in types], dtype=np.int16),
        type_department=type_department,
        type_of=type_of,
        values=values,
        brand_of=brand_of,
        brand_names=brand_names,
        brand_department=brand_department,
        prices=prices,
        price_level=price_level,
        quality=quality,
        appeal=appeal,
        prior_score=1.0 / (1.0 + np.exp(-estimate)),
        first_seen=first_seen,
        categorised=rng.random(size.items) >= UNCATEGORISED_SHARE,
        titles=_titles(rng, types, type_of, values, brand_of, brand_names),
        seed=seed,
    )


def zipf_weights(rng: np.random.Generator, count: int, exponent: float) -> np.ndarray:
    """Zipf probabilities in random order, float64 [count], summing to 1."""
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    return np.asarray(rng.permutation(weights / weights.sum()))


def _spread(rng: np.random.Generator, count: int, weights: np.ndarray) -> np.ndarray:
    """Numbers 0..len(weights)-1 in proportion to their weights, each at least once where `count` allows, in random order."""
    each = np.arange(min(count, len(weights)))
    rest = rng.choice(len(weights), size=count - len(each), p=weights)
    return np.asarray(rng.permutation(np.concatenate([each, rest])))


def _brand_names(rng: np.random.Generator, count: int) -> list[str]:
    chosen = rng.permutation(len(BRAND_STARTS) * len(BRAND_ENDS))[:count]
    return [BRAND_STARTS[one // len(BRAND_ENDS)] + BRAND_ENDS[one % len(BRAND_ENDS)] for one in chosen.tolist()]


def _titles(
    rng: np.random.Generator, types: tuple[ProductType, ...], type_of: np.ndarray, values: np.ndarray, brand_of: np.ndarray, brand_names: list[str]
) -> list[str]:
    """Titles as sellers write them: brand, some attributes, one of the type's title names, a model number; in changing order."""
    names = attribute_values()
    u = rng.random((len(type_of), 8))
    models = rng.integers(10, 990, size=len(type_of))
    titles = []
    for n, kind_id in enumerate(type_of.tolist()):
        kind, draw = types[kind_id], u[n].tolist()
        shown = [names[v].title for v, chance in zip(values[n].tolist(), draw[:3], strict=True) if chance < 0.7]
        name = kind.titles[0] if draw[3] < 0.6 else kind.titles[int((draw[3] - 0.6) / 0.4 * len(kind.titles))]
        brand = [brand_names[brand_of[n]]] if draw[4] < 0.85 else []
        filler = [TITLE_FILLERS[int(draw[5] / 0.35 * len(TITLE_FILLERS))]] if draw[5] < 0.35 else []
        model = [f"{chr(65 + int(draw[6] * 26))}{models[n]}"] if draw[6] < 0.3 else []
        if draw[7] < 0.6:
            parts = [*brand, *filler, *shown, name, *model]
        elif draw[7] < 0.85:
            parts = [*brand, name, *model, *filler, "-", *shown] if shown else [*brand, name, *model, *filler]
        else:
            parts = [name, *shown, *filler, *(["by", *brand] if brand else []), *model]
        titles.append(" ".join(part[0].upper() + part[1:] for part in parts))
    return titles
