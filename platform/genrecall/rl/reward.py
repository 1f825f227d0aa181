"""Rewards of generated SIDs: logged feedback in tiers, the ranking model's opinion, or both.

Source: the tiers of EG-GRPO (arXiv:2605.14434, section 3.4): purchased 1.0, clicked 1.0, exposed 0.5, valid 0.1, else 0; the first that
applies counts. `ranker` and `mixed` are ours: logged feedback knows only what production showed, the ranking model also judges
the rest. Its reward starts at that of a valid SID, so an invalid answer is always the worst.

Shapes: B requests, G answers per request, P (request, item) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.config import from_dict
from genrecall.data.catalog import Catalog, load_catalog
from genrecall.data.interactions import Requests, load_requests
from genrecall.encoders.ngram_hash import ragged_positions
from genrecall.rl.bounded_scorer import BoundedScorer, Scorer
from genrecall.rl.feedback import Feedback, build_feedback
from genrecall.sid.index import SidIndex, load_index
from genrecall.storage import open_artifact


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What an answer is worth."""

    mode: Literal["feedback", "ranker", "mixed"] = "feedback"
    purchased: float = 1.0
    clicked: float = 1.0
    exposed: float = 0.5
    valid: float = 0.1
    invalid: float = 0.0
    ranker_share: float = 0.5  # of the ranking model in mode "mixed"
    ranker_items: int = 3  # a SID is worth its best item among so many first ones in served order
    cache_size: int = 200_000  # (request, SID) scores kept
    timeout_s: float = 60.0  # of one call of the ranking model; one that takes longer gives no reward
    max_failures: int = 3  # calls in a row without an answer of the ranking model that end the run
    ranker_uri: str | None = None  # models:/NAME@ALIAS: a pyfunc of the MLflow registry in place of the pipeline's ranking model
    trust_pyfunc: bool = False  # loading one runs its code
    trust_pickles: bool = False  # also one that is unpickled

    def problems(self) -> list[str]:
        found = self._ranker_problems()
        if not self.invalid <= self.valid <= self.exposed <= self.clicked <= self.purchased <= 1.0:
            found.append("expected invalid <= valid <= exposed <= clicked <= purchased <= 1, got " + ", ".join(f"{value:g}" for value in self.tier_rewards))
        if not 0 <= self.ranker_share <= 1:
            found.append(f"ranker_share: expected between 0 and 1, got {self.ranker_share}")
        found += [
            f"{name}: expected at least 1, got {getattr(self, name)}" for name in ("ranker_items", "cache_size", "max_failures") if getattr(self, name) < 1
        ]
        idle = {"ranker_share": self.mode != "mixed", "ranker_items": self.mode == "feedback"}
        found += [
            f"{name}: has no effect with mode {self.mode!r}; leave it out"
            for name, without_effect in idle.items()
            if without_effect and getattr(self, name) != getattr(RewardConfig, name)
        ]
        if self.timeout_s <= 0:
            found.append(f"timeout_s: expected above 0, got {self.timeout_s}")
        return found

    def _ranker_problems(self) -> list[str]:
        if self.ranker_uri is None:
            return [f"{name}: has no effect without ranker_uri" for name in ("trust_pyfunc", "trust_pickles") if getattr(self, name)]
        found = []
        if not self.needs_ranker:
            found.append("ranker_uri: has no effect with mode 'feedback'; set mode to ranker or mixed")
        if not self.ranker_uri.startswith("models:/"):
            found.append(f"ranker_uri: expected models:/NAME@ALIAS or models:/NAME/VERSION, got {self.ranker_uri!r}")
        if not self.trust_pyfunc:
            found.append("ranker_uri: loading a pyfunc runs its code; set trust_pyfunc=true if you trust whoever registered it")
        return found

    @property
    def tier_rewards(self) -> tuple[float, float, float, float, float]:
        """Reward by tier, INVALID to PURCHASED."""
        return self.invalid, self.valid, self.exposed, self.clicked, self.purchased

    @property
    def needs_ranker(self) -> bool:
        return self.mode != "feedback"


@dataclass(frozen=True)
class Rewards:
    """Rewards of a batch. A value is nan where the ranking model gave none."""

    values: NDArray[np.float32]  # [B, G]
    tiers: NDArray[np.int8]  # [B, G], INVALID to PURCHASED, from logged feedback in every mode
    failed_calls: int = 0  # of the ranking model, for this batch


class RewardModel:
    """Scores (request, SID) pairs.

    Args:
        config: the mode and its numbers.
        feedback: logged feedback per (request, SID).
        index: SID -> items, for the ranking model.
        scorer: the ranking model; needed in the modes "ranker" and "mixed". A call of it that fails gives nan, see `BoundedScorer`.

    Raises:
        ValueError: a mode that needs a scorer got none.
    """

    def __init__(self, config: RewardConfig, feedback: Feedback, index: SidIndex, scorer: Scorer | None = None) -> None:
        if config.needs_ranker and scorer is None:
            raise ValueError(f"reward.mode={config.mode!r} needs a ranking model; run jobs/train_ranker.py or set reward.mode=feedback")
        self._config = config
        self._feedback = feedback
        self._index = index
        self._scorer = None if scorer is None else BoundedScorer(scorer, timeout_s=config.timeout_s, max_failures=config.max_failures)
        self._cache: dict[int, float] = {}
        self._tier_rewards = np.array(config.tier_rewards, dtype=np.float32)

    def score(self, request_rows: NDArray[np.int64], sid_rows: NDArray[np.int32]) -> Rewards:
        """Reward each answer.

        Args:
            request_rows: int64 [B].
            sid_rows: int32 [B, G]; -1 where the answer is no SID.

        Raises:
            RankerFailedError: the ranking model failed several times in a row.
        """
        tiers = self._feedback.tiers_of(request_rows, sid_rows)
        by_tier = self._tier_rewards[tiers]
        if not self._config.needs_ranker:
            return Rewards(by_tier, tiers)
        assert self._scorer is not None
        failed_before = self._scorer.failed_calls
        probabilities = self._probabilities(np.broadcast_to(request_rows[:, None], sid_rows.shape), sid_rows)
        by_ranker = np.where(sid_rows >= 0, self._config.valid + (1.0 - self._config.valid) * probabilities, self._config.invalid)
        share = 1.0 if self._config.mode == "ranker" else self._config.ranker_share
        return Rewards(((1.0 - share) * by_tier + share * by_ranker).astype(np.float32), tiers, self._scorer.failed_calls - failed_before)

    def _probabilities(self, request_rows: NDArray[np.int64], sid_rows: NDArray[np.int32]) -> NDArray[np.float64]:
        """The best of each SID's first items by click probability [B, G]; 0 where there is no SID. Known pairs come from the cache."""
        keys, inverse = np.unique(request_rows.astype(np.int64) * (len(self._index) + 1) + sid_rows + 1, return_inverse=True)
        requests, sids = np.divmod(keys, len(self._index) + 1)
        sids = (sids - 1).astype(np.int32)
        values = np.array([self._cache.get(key, -1.0) for key in keys.tolist()])
        values[sids < 0] = 0.0
        unknown = np.flatnonzero(values < 0)
        if len(unknown):
            values[unknown] = self._best_item(requests[unknown], sids[unknown])
            fresh = unknown[np.isfinite(values[unknown])]
            self._cache.update(zip(keys[fresh].tolist(), values[fresh].tolist(), strict=True))
            while len(self._cache) > self._config.cache_size:  # the oldest entry goes first
                del self._cache[next(iter(self._cache))]
        return values[inverse].reshape(sid_rows.shape)

    def _best_item(self, requests: NDArray[np.int64], sids: NDArray[np.int32]) -> NDArray[np.float64]:
        assert self._scorer is not None
        sizes = np.minimum(self._index.sizes(sids), self._config.ranker_items)
        items = self._index.item_rows[ragged_positions(self._index.offsets[sids], sizes)]
        scores = np.asarray(self._scorer(np.repeat(requests, sizes), np.asarray(items, dtype=np.int32)), dtype=np.float64)
        best = np.zeros(len(sids))
        filled = sizes > 0
        best[filled] = np.maximum.reduceat(scores, (np.cumsum(sizes) - sizes)[filled])
        return best


class RewardActor:
    """A `RewardModel` in a process of its own; `spec` holds artifact URIs and the reward config as JSON."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        torch.set_num_threads(1)
        config = from_dict(RewardConfig, spec["reward"])
        dataset = open_artifact(spec["dataset"])
        catalog = load_catalog(dataset)
        requests = load_requests(dataset, "train", catalog)
        index = load_index(open_artifact(spec["sid_index"]).path)
        scorer = None
        if config.needs_ranker:
            ranker = _ranker(config, spec, catalog, requests)

            def scorer(request_rows: NDArray[np.int64], item_rows: NDArray[np.int32]) -> NDArray[np.float64]:
                asked, place = np.unique(request_rows, return_inverse=True)
                return ranker.score(requests.take(asked), place, item_rows)

        self._model = RewardModel(config, build_feedback(requests, index.item_sid, len(index)), index, scorer)

    def score(self, request_rows: NDArray[np.int64], sid_rows: NDArray[np.int32]) -> Rewards:
        """Reward the answers of some requests."""
        return self._model.score(request_rows, sid_rows)


class _Ranker(Protocol):
    def score(self, requests: Requests, request_rows: NDArray[np.integer], item_rows: NDArray[np.integer]) -> NDArray[np.float64]: ...


def _ranker(config: RewardConfig, spec: Mapping[str, Any], catalog: Catalog, train: Requests) -> _Ranker:
    """The ranking model that the config names: the registry's or the pipeline's."""
    encoder_folder = open_artifact(spec["encoder"]).path
    if config.ranker_uri is None:
        from genrecall.ranking.ranker import load_ranker  # LightGBM is slow to import, and only this process needs it

        return load_ranker(open_artifact(spec["ranker"]).path, catalog=catalog, encoder_folder=encoder_folder)
    from genrecall.ranking.registered_ranker import load_registered_ranker

    return load_registered_ranker(
        config.ranker_uri,
        tracking_uri=spec.get("tracking_uri"),
        trust_pyfunc=config.trust_pyfunc,
        trust_pickles=config.trust_pickles,
        catalog=catalog,
        train=train,
        validation=load_requests(open_artifact(spec["dataset"]), "validation", catalog),
        encoder_folder=encoder_folder,
    )
