"""What shoppers did with a request, per SID: the graded feedback that rewards answers and supplies experts.

Source: the reward tiers of EG-GRPO (arXiv:2605.14434, section 3.4). The best tier of a SID's items counts, never the sum.

Shapes: R requests, S SIDs, M (request, SID) pairs with feedback, B requests of a batch, G answers per request.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from genrecall.data.interactions import Requests, flattened

INVALID, VALID, EXPOSED, CLICKED, PURCHASED = range(5)
TIER_NAMES = ("invalid", "valid", "exposed", "clicked", "purchased")


@dataclass(frozen=True)
class Feedback:
    """Every (request, SID) pair with feedback and its best tier, sorted by request, then SID."""

    num_sids: int
    offsets: NDArray[np.int64]  # [R + 1]: the pairs of request r are offsets[r]:offsets[r + 1]
    sid_rows: NDArray[np.int32]  # [M]
    tiers: NDArray[np.int8]  # [M], EXPOSED to PURCHASED

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, request_row: int) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """SID rows and tiers of one request."""
        span = slice(self.offsets[request_row], self.offsets[request_row + 1])
        return self.sid_rows[span], self.tiers[span]

    def tiers_of(self, request_rows: NDArray[np.integer], sid_rows: NDArray[np.integer]) -> NDArray[np.int8]:
        """The tier of each answer.

        Args:
            request_rows: int [B].
            sid_rows: int [B, G]; -1 where the answer is no SID.

        Returns:
            int8 [B, G], INVALID to PURCHASED.
        """
        keys = self._keys
        wanted = request_rows.astype(np.int64)[:, None] * self.num_sids + sid_rows
        tiers = np.where(sid_rows >= 0, VALID, INVALID).astype(np.int8)
        if len(keys):
            places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            known = (sid_rows >= 0) & (keys[places] == wanted)
            tiers[known] = self.tiers[places][known]
        return tiers

    def with_feedback(self, least: int = EXPOSED) -> NDArray[np.int64]:
        """Rows of the requests that have a SID of tier `least` or better."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return np.unique(owners[self.tiers >= least]).astype(np.int64)

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        owners = np.repeat(np.arange(len(self), dtype=np.int64), np.diff(self.offsets))
        return owners * self.num_sids + self.sid_rows


def build_feedback(requests: Requests, item_sid: NDArray[np.int32], num_sids: int) -> Feedback:
    """Lift item feedback to SIDs: each (request, SID) pair gets the best tier among its items.

    Args:
        requests: exposed, clicked and purchased item rows per request.
        item_sid: int32 [N], the SID row of each item; -1 for an item without one, which gives no feedback.
        num_sids: S.
    """
    keys_parts, tier_parts = [], []
    for tier, lists in ((EXPOSED, requests.exposed), (CLICKED, requests.clicked), (PURCHASED, requests.purchased)):
        owners, items = flattened(lists)
        sids = item_sid[items]
        known = sids >= 0
        keys_parts.append(owners[known] * num_sids + sids[known])
        tier_parts.append(np.full(int(known.sum()), tier, dtype=np.int8))
    keys, tiers = np.concatenate(keys_parts), np.concatenate(tier_parts)
    order = np.lexsort((-tiers, keys))
    keys, tiers = keys[order], tiers[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    keys, tiers = keys[first], tiers[first]
    offsets = np.searchsorted(keys, np.arange(len(requests) + 1, dtype=np.int64) * num_sids)
    return Feedback(num_sids=num_sids, offsets=offsets.astype(np.int64), sid_rows=(keys % num_sids).astype(np.int32), tiers=tiers)
