"""Which requests the challenger gets: shares of the traffic, chosen by what was asked, so that equal requests get the same version."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from genrecall.serving.messages import RecallRequest


class TrafficShares(BaseModel):
    """`user_config` of `serve_apps/recall.yaml`, which `serve deploy` changes in place, without a restart; unknown settings are errors.

    Attributes:
        canary_share: of the requests to /v1/recall, answered by the challenger.
        shadow_share: of those that the champion answered, answered again by the challenger, for the metrics only.
        load_challenger: load it though both shares are 0, so that requests and the page may ask for it by `version`.
    """

    model_config = ConfigDict(extra="forbid")

    canary_share: float = Field(default=0.0, ge=0, le=1)
    shadow_share: float = Field(default=0.0, ge=0, le=1)
    load_challenger: bool = False

    @property
    def needs_challenger(self) -> bool:
        """Whether a second bundle is kept loaded."""
        return self.load_challenger or self.canary_share > 0 or self.shadow_share > 0


def is_chosen(request: RecallRequest, share: float, version: int, purpose: Literal["canary", "shadow"]) -> bool:
    """Whether a request belongs to the share of the traffic that a challenger gets.

    The same query, shopper and history always get the same answer; a larger share keeps the requests of a smaller one. Other versions and purposes choose
    other requests.

    Args:
        share: 0 to 1; 0 chooses none, 1 all.
        version: the challenger's number.
    """
    if share <= 0 or share >= 1:
        return share >= 1
    asked = [purpose, version, request.query, request.shopper.gender, request.shopper.age_band, request.history]
    digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 < share
