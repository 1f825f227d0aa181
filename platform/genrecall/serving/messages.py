"""What the recall API takes and gives, as Pydantic models: the source of its OpenAPI document.

Unknown fields are errors, so that a misspelt one is not silently ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from genrecall.data.schema import MAX_ID_BYTES
from genrecall.registry.catalogue_records import ItemRecord, id_problem

MAX_QUERY_CHARACTERS = 1000
MAX_HISTORY = 200
MAX_ITEM_ID_CHARACTERS = 256
MAX_LIMIT = 1000
MAX_BEAM_SIZE = 200
MAX_CATEGORIES = 50
MAX_CATEGORY_DEPTH = 16
MAX_BRANDS = 100
MAX_NAME_CHARACTERS = 256
MAX_EXCLUDED = 500
MAX_DEADLINE_MS = 60_000
MAX_REQUESTS = 64
MAX_ITEMS = 1000
MAX_TITLE_CHARACTERS = 1000
MAX_TEXT_CHARACTERS = 10_000

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
ItemId = Annotated[str, Field(max_length=MAX_ITEM_ID_CHARACTERS)]


Role = Literal["champion", "challenger"]


class Message(BaseModel):
    """Base of all messages: no fields beyond those declared, no coercion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Shopper(Message):
    """What the site knows of the shopper; values unseen at training count as unknown."""

    gender: str | None = Field(default=None, max_length=64)
    age_band: str | None = Field(default=None, max_length=64)


class Filters(Message):
    """What every item of the answer must meet; a clause that is left out or empty asks nothing."""

    categories: list[Annotated[list[Name], Field(min_length=1, max_length=MAX_CATEGORY_DEPTH)]] = Field(
        default=[], max_length=MAX_CATEGORIES, description="paths, root first; an item of any of them, or of a category below, passes"
    )
    brands: list[Name] = Field(default=[], max_length=MAX_BRANDS, description="an item of any of them passes")
    in_stock: bool = Field(default=False, description="only items in stock")
    excluded: list[ItemId] = Field(default=[], max_length=MAX_EXCLUDED, description="ids of items to leave out; unknown ids are ignored")


class RecallRequest(Message):
    """One search request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "angle bracket"},
                {
                    "query": "garden hose",
                    "shopper": {"gender": "f", "age_band": "25-34"},
                    "history": ["100001", "100005"],
                    "filters": {"categories": [["Garden", "Watering"]], "in_stock": True},
                    "limit": 20,
                    "explain": True,
                    "deadline_ms": 150,
                },
            ]
        }
    )

    query: str = Field(max_length=MAX_QUERY_CHARACTERS, description="as the shopper typed it; may be empty")
    shopper: Shopper = Shopper()
    history: list[ItemId] = Field(
        default=[], max_length=MAX_HISTORY, description="ids of items clicked or bought before, oldest first; unknown ids are ignored"
    )
    beam_size: int | None = Field(default=None, ge=1, le=MAX_BEAM_SIZE, description="SIDs to generate; default: by load")
    filters: Filters | None = Field(default=None, description="names as the catalogue writes them; one that no item has admits nothing")
    limit: int = Field(default=100, ge=1, le=MAX_LIMIT, description="items to return at most")
    explain: bool = Field(default=False, description="also say where each item's score comes from and what each SID holds")
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="milliseconds from the request's arrival after which nobody wants the answer. When its batch starts and less than half of them are left, "
        "the narrowest beam is used; when none are, the answer is 503",
    )
    version: Role | None = Field(
        default=None, description="which of the versions that are loaded is to answer; default: by the server's shares. In a batch: champion only"
    )


class RecallBatchRequest(Message):
    """Several search requests, answered by one version."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [{"query": "angle bracket"}, {"query": "garden hose", "limit": 20}]}]})

    requests: list[RecallRequest] = Field(min_length=1, max_length=MAX_REQUESTS)


class ItemExplanation(Message):
    """Where an item's score comes from: the log-probability of its SID and its share of that."""

    sid_score: float = Field(description="natural-log probability of the item's SID")
    share: float = Field(description="natural-log probability of the item given its SID; 0 where the generator is not guided and ranks by SID alone")
    path: list[str] = Field(description="the SID's prefixes from the root, e.g. <12>, <12,5>, <12,5,7>; their labels stand with the SID")


class Prefix(Message):
    """A step of a SID's path and what lies below it."""

    prefix: str = Field(description="e.g. <12,5>")
    label: str = Field(description="the commonest category and the most telling words of the titles below it; empty where there are none")
    size: int = Field(description="items below it, as published")


class RecalledItem(Message):
    """One item of an answer."""

    item_id: str
    title: str
    brand: str
    category_path: list[str]
    rank: int = Field(description="0-based")
    sid: str = Field(description="the semantic cluster ID it came from, e.g. <12,5,7>")
    score: float = Field(description="natural-log probability of the item; of its SID where the generator is not guided")
    explanation: ItemExplanation | None = Field(default=None, description="only where the request asks to explain")


class RecalledSid(Message):
    """One generated SID."""

    sid: str
    score: float
    size: int = Field(description="items in the cluster")
    label: str | None = Field(
        default=None, description="what the cluster holds, in words; of bundles that were built without labels only where the request asks to explain"
    )
    path: list[Prefix] | None = Field(default=None, description="its prefixes from the root, itself last; only where the request asks to explain")


class Versions(Message):
    """What answered."""

    model: str = Field(description="name/version in the model registry")
    bundle: str = Field(description="hash of the bundle")
    catalog_seq: int = Field(default=0, description="the last change of the catalogue that the answer knows, see POST /v1/items")
    role: Role = Field(default="champion", description="as what it answered: the champion, or the challenger beside it")


class Timings(Message):
    """Milliseconds, of the batch this request was in."""

    generate_ms: float
    expand_ms: float
    batch_size: int
    cached: bool = Field(default=False, description="kept from an equal request: the milliseconds are those of the batch that request was in")


Reason = Literal["load", "deadline", "filters", "history"]


class RecallResponse(Message):
    """The answer: items best first, and the SIDs they came from."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {
                            "item_id": "100001",
                            "title": "Simpson Strong-Tie 12-Gauge Angle",
                            "brand": "Simpson Strong-Tie",
                            "category_path": ["Hardware", "Brackets"],
                            "rank": 0,
                            "sid": "<12,5,7>",
                            "score": -1.73,
                        }
                    ],
                    "sids": [{"sid": "<12,5,7>", "score": -0.42, "size": 14}],
                    "beam_size": 100,
                    "versions": {"model": "genrecall-home_depot/3", "bundle": "0123456789abcdef", "catalog_seq": 0},
                    "timings": {"generate_ms": 14.2, "expand_ms": 0.9, "batch_size": 1, "cached": False},
                    "degraded": False,
                    "degraded_by": [],
                }
            ]
        }
    )

    items: list[RecalledItem]
    sids: list[RecalledSid]
    beam_size: int
    versions: Versions
    timings: Timings
    degraded: bool = Field(default=False, description="less than was asked for, because of what `degraded_by` says")
    degraded_by: list[Reason] = Field(
        default=[],
        description="load, deadline: a narrower beam; filters: the bundle cannot search within them, so what fails was only taken out afterwards; "
        "history: none of its items is known, or the generator does not read it",
    )
    read_as: str | None = Field(
        default=None,
        description="the query with its spelling corrected, as it became tokens (the encoder reads what was typed); only where the request asks to explain and there was "
        "something to correct",
    )


class RecallBatchResponse(Message):
    """Answers in the order of the requests, all of the same versions."""

    answers: list[RecallResponse]


class CatalogueInfo(Message):
    """What happened to the catalogue since the bundle was built, and how far it has drifted from what the bundle was trained on."""

    later_items: int = Field(description="items in service that the bundle does not have")
    changed_items: int = Field(description="items of the bundle that answers show otherwise")
    delisted_items: int = Field(description="items of the bundle that are gone")
    out_of_stock_items: int = Field(default=0, description="items in service that are out of stock")
    error_ratio: float | None = Field(description="mean quantisation error of later items over that of the bundle's; null without later items")
    oversize_sids: int = Field(description="SIDs that later items brought beyond twice the cap")
    unknown_categories: float | None = Field(description="share of later items whose category the bundle does not know; null without later items")
    alarms: list[str] = Field(description="what is beyond its limit: time to retrain")
    problem: str | None = Field(description="why the catalogue log is not followed, where that is so; answers stay as they are")


class ChallengerInfo(Message):
    """The version beside the champion."""

    versions: Versions | None = Field(description="null where none is loaded: the alias is absent, names the champion, or was refused")
    canary_share: float = Field(description="of the requests, answered by it")
    shadow_share: float = Field(description="of the requests, answered by it too, for the metrics only")
    refused: str | None = Field(description="why it was not taken, where that happened")


class ModelInfo(Message):
    """What is being served."""

    versions: Versions
    address: str = Field(description="what the server follows")
    items: int
    sids: int
    levels: list[int] = Field(description="tokens per level")
    stage: str = Field(description="the training stage of the generator: stage3 or stage4 (aligned)")
    refused: str | None = Field(description="why a newer version was not taken, where that happened")
    genders: list[str] = Field(default=[], description="the values of shopper.gender that the generator knows")
    age_bands: list[str] = Field(default=[], description="the values of shopper.age_band that the generator knows")
    catalogue: CatalogueInfo | None = Field(default=None, description="null where the server follows no catalogue log")
    challenger: ChallengerInfo | None = Field(default=None, description="null where the server's shares ask for none")


def _can_be_kept(item_id: str) -> str:
    if problem := id_problem(item_id):
        raise ValueError(problem)
    return item_id


NewItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES), AfterValidator(_can_be_kept)]


class ItemUpsert(Message):
    """An item that is new, changed or listed again: its whole record."""

    item_id: NewItemId
    title: str = Field(min_length=1, max_length=MAX_TITLE_CHARACTERS)
    category_path: list[Name] = Field(default=[], max_length=MAX_CATEGORY_DEPTH, description="root first; empty when unknown")
    brand: str = Field(default="", max_length=MAX_NAME_CHARACTERS)
    text: str = Field(default="", max_length=MAX_TEXT_CHARACTERS, description="attributes and description; read where the item is placed, not shown")
    price: float | None = Field(default=None, allow_inf_nan=False)
    prior_score: float | None = Field(default=None, allow_inf_nan=False, description="what the site orders by inside a cluster; null counts as 0")


class ItemsRequest(Message):
    """Changes of the catalogue, applied whole or not at all: records first, then ids to delist, then stock; an id stands once in the first two and once in the
    others."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "upsert": [{"item_id": "300001", "title": "Chrome angle bracket, 90 degrees", "category_path": ["Hardware", "Brackets"], "brand": "Acme"}],
                    "delist": ["100005"],
                    "out_of_stock": ["300001"],
                }
            ]
        }
    )

    upsert: list[ItemUpsert] = Field(default=[], max_length=MAX_ITEMS)
    delist: list[NewItemId] = Field(default=[], max_length=MAX_ITEMS, description="ids that no answer shall hold; unknown ones do no harm")
    out_of_stock: list[NewItemId] = Field(
        default=[], max_length=MAX_ITEMS, description="ids that the filter in_stock passes over from now on, whatever record they get and while they have none"
    )
    in_stock: list[NewItemId] = Field(default=[], max_length=MAX_ITEMS, description="ids that it passes over no longer")

    def records(self) -> list[ItemRecord]:
        """What to upsert, as the catalogue log holds it."""
        return [ItemRecord(**{**one.model_dump(), "category_path": tuple(one.category_path)}) for one in self.upsert]

    def stock_flags(self) -> dict[str, bool]:
        """Whether an item is in stock, by id."""
        return {**dict.fromkeys(self.out_of_stock, False), **dict.fromkeys(self.in_stock, True)}

    def accepted(self, sequence: int) -> ItemsAccepted:
        """The answer once the log has the changes, the last of them under the number `sequence`."""
        return ItemsAccepted(catalog_seq=sequence, upserted=len(self.upsert), delisted=len(self.delist), stock_flags=len(self.stock_flags()))

    def repeats(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Where an id stands that stood before, and what is wrong with that; or that there is nothing at all."""
        if not (self.upsert or self.delist or self.out_of_stock or self.in_stock):
            return [(("upsert",), "expected at least one record here, or an id in delist, out_of_stock or in_stock")]
        records = [(one.item_id, ("upsert", place, "item_id")) for place, one in enumerate(self.upsert)]
        return [
            *_repeats([*records, *_places("delist", self.delist)]),
            *_repeats([*_places("out_of_stock", self.out_of_stock), *_places("in_stock", self.in_stock)]),
        ]


def _places(field: str, ids: Sequence[str]) -> list[tuple[str, tuple[str | int, ...]]]:
    return [(one, (field, place)) for place, one in enumerate(ids)]


def _repeats(ids: Sequence[tuple[str, tuple[str | int, ...]]]) -> list[tuple[tuple[str | int, ...], str]]:
    first_at: dict[str, str] = {}
    found: list[tuple[tuple[str | int, ...], str]] = []
    for item_id, where in ids:
        first = first_at.setdefault(item_id, ".".join(map(str, where)))
        if first != ".".join(map(str, where)):
            found.append((where, f"expected each id once, this one stands at {first} too"))
    return found


class ItemsAccepted(Message):
    """The changes are on disk; within seconds every replica serves them."""

    catalog_seq: int = Field(description="their last number: an answer whose versions.catalog_seq is at least this one knows them")
    upserted: int
    delisted: int
    stock_flags: int = Field(default=0, description="of either kind")


class Health(Message):
    """Alive and holding a model."""

    status: str
    model: str


class Readiness(Message):
    """A bundle is verified and warmed up, and batches get done."""

    status: Literal["ready"]
    model: str


class Problem(Message):
    """One thing wrong with a request."""

    field: str
    message: str


class ErrorResponse(Message):
    """Why a request was not answered."""

    error: str
    problems: list[Problem] = []
