"""The shoppers of the built-in marketplace and what they search for.

A shopper has a gender and age band, departments and a few product types of interest, one preferred value per attribute
dimension, two favourite brands per department and a budget. A request is an intent (product type, up to two attribute values,
perhaps a brand) drawn from these and from popularity, which drifts over the days, and a query text for the intent: shoppers'
words for the product, synonyms for attributes, misspellings. Requests are drawn in blocks of `BLOCK` from
(seed, block number), so any request can be drawn again from its id without holding the others.

Shapes: U shoppers, T product types, D departments, K attribute dimensions, R requests of a batch; -1 stands for "not asked for".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from genrecall.data.marketplace_catalog import DAYS, WINDOW_START, MarketplaceCatalog, MarketplaceSize, zipf_weights
from genrecall.data.marketplace_vocabulary import CHEAP_WORDS, DIMENSIONS, FINE_WORDS, attribute_values
from genrecall.data.schema import USERS

BLOCK = 1024
AGE_BANDS = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
_STREAM = 202
_FAVOURITE_TYPES = 6
_FAVOURITE_TYPE_SHARE = 0.55
_REQUEST_ARRAYS = ("numbers", "times", "users", "types", "wanted", "brands", "mood")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Shoppers:
    """All shoppers as arrays.

    Attributes:
        gender: int8 [U], 0 female, 1 male, -1 unknown to the site (taste still has one: `true_gender`, int8 [U]).
        age_band: int8 [U], index into AGE_BANDS or -1.
        activity: float64 [U], running sum of the share of requests.
        departments: float64 [U, D], running sum of interest.
        favourite_types: int16 [U, 6], most wanted first.
        preferred: int16 [U, K], preferred attribute value of each dimension.
        favourite_brands: int32 [U, D, 2].
        budget: float32 [U], in standard deviations of log price within a type.
    """

    gender: np.ndarray
    true_gender: np.ndarray
    age_band: np.ndarray
    activity: np.ndarray
    departments: np.ndarray
    favourite_types: np.ndarray
    preferred: np.ndarray
    favourite_brands: np.ndarray
    budget: np.ndarray

    def __len__(self) -> int:
        return len(self.gender)

    def table(self) -> pa.Table:
        """The shoppers as one canonical table; gender and age band are null where the site does not know them."""
        columns = {
            "user_id": [f"u{n:06d}" for n in range(len(self))],
            "gender": [None if g < 0 else ("female", "male")[g] for g in self.gender.tolist()],
            "age_band": [None if a < 0 else AGE_BANDS[a] for a in self.age_band.tolist()],
        }
        return pa.table(columns, schema=USERS)


@dataclass(frozen=True)
class MarketRequests:
    """Requests of the marketplace with the intent behind each; all arrays have R rows.

    Attributes:
        numbers: int64, request numbers in time order; `request_ids` are made of them.
        times: int64, microseconds since 1970.
        users: int32.
        types: int16, the product type wanted.
        wanted: int16 [R, 2], attribute values asked for, or -1.
        brands: int32, brand asked for, or -1.
        mood: int8, -1 looks for something cheap, 1 for something fine, 0 neither.
        queries: R query texts.
    """

    numbers: np.ndarray
    times: np.ndarray
    users: np.ndarray
    types: np.ndarray
    wanted: np.ndarray
    brands: np.ndarray
    mood: np.ndarray
    queries: list[str]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def request_ids(self) -> list[str]:
        return [f"r{number:08d}" for number in self.numbers.tolist()]

    def take(self, indices: np.ndarray) -> MarketRequests:
        """The requests at `indices` (int [n]), in that order."""
        arrays = {name: getattr(self, name)[indices] for name in _REQUEST_ARRAYS}
        return MarketRequests(**arrays, queries=[self.queries[i] for i in indices.tolist()])

    @staticmethod
    def concat(parts: list[MarketRequests]) -> MarketRequests:
        """The requests of all parts, one after the other."""
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _REQUEST_ARRAYS}
        return MarketRequests(**arrays, queries=[query for part in parts for query in part.queries])


def build_shoppers(size: MarketplaceSize, catalog: MarketplaceCatalog, seed: int) -> Shoppers:
    """Draw the shoppers of a marketplace."""
    rng = np.random.default_rng([seed, _STREAM])
    users, departments = size.users, size.departments
    true_gender = (rng.random(users) < 0.5).astype(np.int8)
    age = rng.integers(0, len(AGE_BANDS), size=users).astype(np.int8)
    # Departments appeal differently by gender and age: what makes demographic features worth something.
    appeal = np.log(zipf_weights(rng, departments, 0.6)) + 0.6 * rng.normal(size=(2, len(AGE_BANDS), departments))
    interest = np.exp(appeal[true_gender, age] + 0.8 * rng.normal(size=(users, departments)))
    interest /= interest.sum(axis=1, keepdims=True)

    type_weights = np.log(zipf_weights(rng, len(catalog.types), 0.8)) + np.log(interest)[:, catalog.type_department]
    keys = type_weights + rng.gumbel(size=type_weights.shape)  # Gumbel top-k: draws without replacement in proportion
    favourite_types = np.argsort(-keys, axis=1)[:, :_FAVOURITE_TYPES].astype(np.int16)

    preferred = np.empty((users, len(DIMENSIONS)), dtype=np.int16)
    dimension_of = np.array([value.dimension for value in attribute_values()])
    for number, name in enumerate(DIMENSIONS):
        choices = np.flatnonzero(dimension_of == number)
        if name == "audience":  # womens, mens, kids, unisex: one in eight shops for children
            preferred[:, number] = np.where(rng.random(users) < 0.125, choices[2], choices[true_gender])
        else:
            preferred[:, number] = rng.choice(choices, size=users, p=zipf_weights(rng, len(choices), 0.5))

    favourite_brands = np.empty((users, departments, 2), dtype=np.int32)
    for department in range(departments):
        brands = np.flatnonzero(catalog.brand_department == department)
        favourite_brands[:, department] = rng.choice(brands, size=(users, 2), p=zipf_weights(rng, len(brands), 0.6))
    activity = rng.lognormal(sigma=1.0, size=users)
    return Shoppers(
        gender=np.where(rng.random(users) < 0.1, -1, true_gender).astype(np.int8),
        true_gender=true_gender,
        age_band=np.where(rng.random(users) < 0.2, -1, age).astype(np.int8),
        activity=np.cumsum(activity / activity.sum()),
        departments=np.cumsum(interest, axis=1),
        favourite_types=favourite_types[:, : len(catalog.types)],
        preferred=preferred,
        favourite_brands=favourite_brands,
        budget=(0.8 * rng.normal(size=users)).astype(np.float32),
    )


@dataclass(frozen=True)
class RequestSource:
    """Draws the requests of a marketplace, block by block."""

    size: MarketplaceSize
    catalog: MarketplaceCatalog
    shoppers: Shoppers
    seed: int

    @property
    def num_blocks(self) -> int:
        return -(-self.size.requests // BLOCK)

    def block(self, number: int) -> MarketRequests:
        """Requests `number * BLOCK` up to the end of the block, in time order: always the same for the same seed and size."""
        rng = np.random.default_rng([self.seed, _STREAM, 1, number])
        numbers = np.arange(number * BLOCK, min((number + 1) * BLOCK, self.size.requests))
        count = len(numbers)
        # The same number of draws for a short last block, so that a request does not depend on how many follow it.
        u = rng.random((BLOCK, 24))[:count]
        times = self._times(numbers, u[:, 0])
        day = ((times - WINDOW_START.astype(np.int64)) // 86_400_000_000).astype(np.int64)
        users = np.minimum(np.searchsorted(self.shoppers.activity, u[:, 1]), len(self.shoppers) - 1).astype(np.int32)
        types = self._types(users, day, u[:, 2:5])
        wanted, brands = self._constraints(users, types, u[:, 5:12])
        mood = np.select([u[:, 12] < 0.05, u[:, 12] < 0.09], [-1, 1], 0).astype(np.int8)
        queries = [self._query(*row) for row in zip(types.tolist(), wanted.tolist(), brands.tolist(), mood.tolist(), u[:, 13:].tolist(), strict=True)]
        return MarketRequests(numbers, times, users, types, wanted, brands, mood, queries)

    def _times(self, numbers: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Evenly many requests a day, most in the evening; rising with the request number."""
        day, within = np.divmod((numbers + u) / self.size.requests * DAYS, 1.0)
        hours = self._hours
        return np.asarray(WINDOW_START.astype(np.int64) + ((day * 24 + np.interp(within, hours, np.linspace(0, 24, len(hours)))) * 3_600e6).astype(np.int64))

    @cached_property
    def _hours(self) -> np.ndarray:
        hour = (np.arange(96) + 0.5) / 4
        share = 0.25 + np.exp(-(((hour - 20) / 3.0) ** 2)) + 0.6 * np.exp(-(((hour - 12) / 3.5) ** 2))
        return np.concatenate([[0.0], np.cumsum(share / share.sum())])

    @cached_property
    def _type_shares(self) -> tuple[np.ndarray, np.ndarray]:
        """Type ids [D, m] (padded by the last) and their running popularity [DAYS, D, m]: trends rise or fall fourfold in the window."""
        rng = np.random.default_rng([self.seed, _STREAM, 2])
        departments = self.size.departments
        members = [np.flatnonzero(self.catalog.type_department == d) for d in range(departments)]
        most = max(map(len, members))
        ids = np.stack([np.pad(m, (0, most - len(m)), mode="edge") for m in members])
        base = np.stack([np.pad(zipf_weights(rng, len(m), 0.9), (0, most - len(m))) for m in members])
        trend = rng.normal(scale=0.7, size=base.shape)
        shares = base * np.exp(trend * np.linspace(-1, 1, DAYS)[:, None, None])
        return ids, np.cumsum(shares / shares.sum(axis=2, keepdims=True), axis=2)

    def _types(self, users: np.ndarray, day: np.ndarray, u: np.ndarray) -> np.ndarray:
        department = (self.shoppers.departments[users] < u[:, :1]).sum(axis=1).clip(max=self.size.departments - 1)
        ids, shares = self._type_shares
        place = (shares[day, department] < u[:, 1:2]).sum(axis=1).clip(max=ids.shape[1] - 1)
        popular = ids[department, place]
        favourites = self.shoppers.favourite_types[users]
        weights = np.cumsum(0.7 ** np.arange(favourites.shape[1]))
        rank = np.searchsorted(weights / weights[-1], u[:, 1])
        favourite = favourites[np.arange(len(users)), np.minimum(rank, favourites.shape[1] - 1)]
        return np.asarray(np.where(u[:, 2] < _FAVOURITE_TYPE_SHARE, favourite, popular), dtype=np.int16)

    def _constraints(self, users: np.ndarray, types: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attribute values and brand asked for: nothing 40 %, one value 33 %, two 12 %, brand 10 %, brand and value 5 %."""
        slots_of_type = np.array([kind.dimensions for kind in self.catalog.types])
        dimension_of = np.array([value.dimension for value in attribute_values()])
        first_value = np.searchsorted(dimension_of, np.arange(len(DIMENSIONS)))
        count_values = np.bincount(dimension_of, minlength=len(DIMENSIONS))
        slot = np.minimum((u[:, 1] * 3).astype(int), 2)
        wanted = np.full((len(users), 2), -1, dtype=np.int16)
        for which, (needed, chance) in enumerate((((u[:, 0] < 0.45) | (u[:, 0] >= 0.95), u[:, 2]), (u[:, 0] < 0.12, u[:, 3]))):
            dimension = slots_of_type[types, (slot + which) % 3]
            preferred = self.shoppers.preferred[users, dimension]
            popular = first_value[dimension] + (count_values[dimension] * (chance * 2 % 1) ** 1.7).astype(int)
            wanted[:, which] = np.where(needed, np.where(chance < 0.5, preferred, popular), -1)
        department = self.catalog.type_department[types]
        favourite = self.shoppers.favourite_brands[users, department, (u[:, 4] < 0.4).astype(int)]
        per_department = self.size.brands_per_department
        popular_brand = department * per_department + np.minimum((u[:, 5] ** 2 * per_department).astype(int), per_department - 1)
        brands = np.where(u[:, 0] >= 0.85, np.where(u[:, 6] < 0.6, favourite, popular_brand), -1)
        return wanted, brands.astype(np.int32)

    @cached_property
    def _names(self) -> list[list[str]]:
        """Per type, the words shoppers use for it, most used first: the seed decides whether a title name or a shoppers' word leads."""
        rng = np.random.default_rng([self.seed, _STREAM, 3])
        return [[(kind.titles + kind.colloquial)[i] for i in rng.permutation(len(kind.titles) + len(kind.colloquial))] for kind in self.catalog.types]

    def _query(self, kind: int, wanted: list[int], brand: int, mood: int, u: list[float]) -> str:
        names = self._names[kind]
        name = names[_geometric(u[0], 0.5, len(names))]
        values = [attribute_values()[value] for value in wanted if value >= 0]
        words = [value.title if u[1 + n] < 0.6 else value.synonyms[int((u[1 + n] - 0.6) / 0.4 * len(value.synonyms))] for n, value in enumerate(values)]
        if u[3] < 0.12 and not name.endswith("s"):
            name += "s"
        parts: list[str] = [*words, name] if u[4] < 0.75 else [name, *words]
        if brand >= 0:
            parts.insert(0 if u[5] < 0.8 else len(parts), self.catalog.brand_names[brand].lower())
        if mood:
            choices = CHEAP_WORDS if mood < 0 else FINE_WORDS
            parts.insert(0, choices[int(u[6] * len(choices))])
        text = " ".join(parts)
        return _misspell(text, u[8], u[9], u[10]) if u[7] < 0.08 else text


def _geometric(u: float, keep: float, count: int) -> int:
    """A place below `count`, each next one `keep` times as likely as the one before."""
    total, place = 1.0 - keep**count, 0
    while place < count - 1 and u * total >= 1.0 - keep ** (place + 1):
        place += 1
    return place


def _misspell(text: str, which: float, where: float, how: float) -> str:
    """One slip in one word of four letters or more: a letter dropped, doubled, swapped with its neighbour or hit wrongly."""
    words: list[Any] = text.split(" ")
    long_ones = [n for n, word in enumerate(words) if len(word) >= 4]
    if not long_ones:
        return text
    n = long_ones[int(which * len(long_ones))]
    word = words[n]
    i = 1 + int(where * (len(word) - 2))  # people rarely miss the first letter
    if how < 0.3:
        word = word[:i] + word[i + 1 :]
    elif how < 0.5:
        word = word[:i] + word[i] + word[i:]
    elif how < 0.8:
        word = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    else:
        word = word[:i] + _LETTERS[int((how - 0.8) / 0.2 * 26)] + word[i + 1 :]
    words[n] = word
    return " ".join(words)
