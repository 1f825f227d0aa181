"""What the recall API takes and gives, as Pydantic models: the source of its OpenAPI document.

Unknown fields are errors, so that a misspelt one is not silently ignored.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_QUERY_CHARACTERS = 1000
MAX_HISTORY = 200
MAX_ITEM_ID_CHARACTERS = 256
MAX_LIMIT = 1000
MAX_BEAM_SIZE = 200


class Message(BaseModel):
    """Base of all messages: no fields beyond those declared, no coercion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Shopper(Message):
    """What the site knows of the shopper; values unseen at training count as unknown."""

    gender: str | None = Field(default=None, max_length=64)
    age_band: str | None = Field(default=None, max_length=64)


class RecallRequest(Message):
    """One search request."""

    query: str = Field(max_length=MAX_QUERY_CHARACTERS, description="as the shopper typed it; may be empty")
    shopper: Shopper = Shopper()
    history: list[Annotated[str, Field(max_length=MAX_ITEM_ID_CHARACTERS)]] = Field(
        default=[], max_length=MAX_HISTORY, description="ids of items clicked or bought before, oldest first; unknown ids are ignored"
    )
    beam_size: int | None = Field(default=None, ge=1, le=MAX_BEAM_SIZE, description="SIDs to generate; default: by load")
    limit: int = Field(default=100, ge=1, le=MAX_LIMIT, description="items to return at most")


class RecalledItem(Message):
    """One item of an answer."""

    item_id: str
    title: str
    brand: str
    category_path: list[str]
    rank: int = Field(description="0-based")
    sid: str = Field(description="the semantic cluster ID it came from, e.g. <12,5,7>")
    score: float = Field(description="natural-log probability of the item; of its SID where the generator is not guided")


class RecalledSid(Message):
    """One generated SID."""

    sid: str
    score: float
    size: int = Field(description="items in the cluster")


class Versions(Message):
    """What answered."""

    model: str = Field(description="name/version in the model registry")
    bundle: str = Field(description="hash of the bundle")


class Timings(Message):
    """Milliseconds, of the batch this request was in."""

    generate_ms: float
    expand_ms: float
    batch_size: int


class RecallResponse(Message):
    """The answer: items best first, and the SIDs they came from."""

    items: list[RecalledItem]
    sids: list[RecalledSid]
    beam_size: int
    versions: Versions
    timings: Timings


class ModelInfo(Message):
    """What is being served."""

    versions: Versions
    address: str = Field(description="what the server follows")
    items: int
    sids: int
    levels: list[int] = Field(description="tokens per level")
    stage: str = Field(description="the training stage of the generator: stage3 or stage4 (aligned)")
    refused: str | None = Field(description="why a newer version was not taken, where that happened")


class Health(Message):
    """Alive and holding a model."""

    status: str
    model: str


class Problem(Message):
    """One thing wrong with a request."""

    field: str
    message: str


class ErrorResponse(Message):
    """Why a request was not answered."""

    error: str
    problems: list[Problem] = []
