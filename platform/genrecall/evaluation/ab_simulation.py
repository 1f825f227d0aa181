"""Simulated A/B test on the built-in marketplace: the site's own channels with and without ours, behind the same ranker.

Both arms answer the same requests; shoppers' luck is drawn anew in each arm and `repeats` times, as if twins had searched. Values are per
shopper and intervals resample shoppers, whose requests hang together. GMV is money spent; UCTCVR is the share of shoppers who buy at least
once (the paper's term, arXiv:2605.14434, for user-level click-through conversion). Only items that had arrived by the time of the request
enter a page.

Shapes: R requests, U shoppers, P places of a page, n candidate pairs (request, item).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from genrecall.data.marketplace import Marketplace
from genrecall.data.marketplace_shoppers import MarketRequests
from genrecall.evaluation.bootstrap import Bootstrap, Interval

RankerFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Scores of candidate pairs: (request number int64 [n] in 0 to R - 1, item row int32 [n]) -> float [n], higher is better."""

OUTCOMES = ("gmv", "uctcvr", "purchases", "clicks")


@dataclass(frozen=True)
class Pages:
    """Pages of one arm: item rows int32 [R, P] (-1 where empty) and, beside each, whether a channel of the site and whether ours proposed it."""

    rows: np.ndarray
    from_site: np.ndarray
    from_ours: np.ndarray


@dataclass(frozen=True)
class AbResult:
    """Outcome of a simulated test.

    Attributes:
        control, treatment: mean per shopper of each of `OUTCOMES`, with interval.
        gains: relative difference of treatment over control, paired by shopper.
        shares: share of the treatment's exposures, clicks and purchases that our channel proposed (`..._share`) and that only it did
            (`..._only_share`).
    """

    control: dict[str, Interval]
    treatment: dict[str, Interval]
    gains: dict[str, Interval]
    shares: dict[str, float]


def build_pages(
    requests: MarketRequests, site: tuple[np.ndarray, np.ndarray], ours: np.ndarray | None, arrived: np.ndarray, rank: RankerFunction, *, page_size: int
) -> Pages:
    """Rank the union of the channels' candidates into pages.

    Args:
        site: candidate pairs of the site's own channels, as `Production.candidates` gives them.
        ours: int32 [R, K] items of our channel, -1 padded; None for the arm without it.
        arrived: int64 [N], time from which each item may be shown, in microseconds.
    """
    which, rows = (np.asarray(part, dtype=np.int64) for part in site)
    num_items = len(arrived)
    keys = [which * num_items + rows]
    if ours is not None:
        request, place = np.nonzero(ours >= 0)
        items = ours[request, place].astype(np.int64)
        known = arrived[items] <= requests.times[request]
        keys.append(request[known] * num_items + items[known])
    pairs = np.unique(np.concatenate(keys))
    request, items = pairs // num_items, (pairs % num_items).astype(np.int32)
    scores = rank(request, items)
    order = np.lexsort((-scores, request))
    request, items, pairs = request[order], items[order], pairs[order]
    place = np.arange(len(order)) - np.searchsorted(request, request)
    top = place < page_size
    page = np.full((len(requests), page_size), -1, dtype=np.int32)
    page[request[top], place[top]] = items[top]
    sources = []
    for source in (keys[0], keys[1] if ours is not None else np.zeros(0, dtype=np.int64)):
        flags = np.zeros(page.shape, dtype=bool)
        flags[request[top], place[top]] = np.isin(pairs[top], source)
        sources.append(flags)
    return Pages(page, sources[0], sources[1])


def simulate_ab(
    marketplace: Marketplace,
    request_ids: Sequence[str],
    ours: np.ndarray,
    *,
    rank: RankerFunction | None = None,
    page_size: int = 10,
    repeats: int = 4,
    samples: int = 1000,
    seed: int = 0,
) -> AbResult:
    """Play requests against pages without and with our channel.

    Args:
        marketplace: where shoppers and truth come from.
        request_ids: R of its requests.
        ours: int32 [R, K] items of our channel, best first, -1 padded.
        rank: the ranker of both arms; the marketplace's own production ranker when omitted.
        repeats: times that each request is played in each arm.
        samples: bootstrap resamples.

    Raises:
        ValueError: `ours` does not have a row per request.
    """
    if len(ours) != len(request_ids):
        raise ValueError(f"ab simulation: {len(request_ids)} requests but rankings for {len(ours)}; give one row of item rows per request")
    requests = marketplace.requests(request_ids)
    score = rank or (lambda which, rows: marketplace.production.rank_scores(requests, which, rows))
    site, arrived = marketplace.production.candidates(requests), np.asarray(marketplace.catalog.first_seen)
    control = build_pages(requests, site, None, arrived, score, page_size=page_size)
    treatment = build_pages(requests, site, ours, arrived, score, page_size=page_size)
    shopper = np.unique(requests.users, return_inverse=True)[1]
    first, _ = play(marketplace, requests, shopper, control, repeats=repeats, rng=np.random.default_rng([seed, 0]))
    second, shares = play(marketplace, requests, shopper, treatment, repeats=repeats, rng=np.random.default_rng([seed, 1]))
    bootstrap = Bootstrap(len(first), samples=samples, seed=seed)
    named = [dict(zip(OUTCOMES, found, strict=True)) for found in (bootstrap.intervals(first), bootstrap.intervals(second), bootstrap.gains(second, first))]
    return AbResult(control=named[0], treatment=named[1], gains=named[2], shares=shares)


def play(
    marketplace: Marketplace, requests: MarketRequests, shopper: np.ndarray, pages: Pages, *, repeats: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, float]]:
    """Let shoppers act on pages.

    Args:
        shopper: int [R], number of the shopper of each request.

    Returns:
        float64 [U, 4], mean over the repeats of each shopper's `OUTCOMES`; and the channel's shares, see `AbResult`.
    """
    users = int(shopper.max()) + 1
    totals = np.zeros((users, len(OUTCOMES)))
    counts = {"exposure": pages.rows >= 0, "click": np.zeros(pages.rows.shape), "purchase": np.zeros(pages.rows.shape)}
    for _ in range(repeats):
        outcome = marketplace.simulate_page(requests, pages.rows, rng)
        per_request = (outcome.gmv, outcome.purchases.any(axis=1), outcome.purchases.sum(axis=1), outcome.clicks.sum(axis=1))
        sums = np.stack([np.bincount(shopper, weights=np.asarray(one, dtype=np.float64), minlength=users) for one in per_request], axis=1)
        sums[:, 1] = sums[:, 1] > 0
        totals += sums / repeats
        counts["click"] = counts["click"] + outcome.clicks
        counts["purchase"] = counts["purchase"] + outcome.purchases
    shares = {}
    for action, count in counts.items():
        total = max(float(count.sum()), 1.0)
        shares[f"{action}_share"] = float(count[pages.from_ours].sum()) / total
        shares[f"{action}_only_share"] = float(count[pages.from_ours & ~pages.from_site].sum()) / total
    return totals, shares


def false_alarm_rate(marketplace: Marketplace, request_ids: Sequence[str], *, runs: int = 200, page_size: int = 10, samples: int = 400, seed: int = 0) -> float:
    """Share of A/A tests (the same pages in both arms) whose GMV interval leaves out zero; about 5 % when intervals are honest."""
    requests = marketplace.requests(request_ids)
    site, arrived = marketplace.production.candidates(requests), np.asarray(marketplace.catalog.first_seen)
    pages = build_pages(requests, site, None, arrived, lambda which, rows: marketplace.production.rank_scores(requests, which, rows), page_size=page_size)
    shopper = np.unique(requests.users, return_inverse=True)[1]
    alarms = 0
    for run in range(runs):
        arms = [play(marketplace, requests, shopper, pages, repeats=1, rng=np.random.default_rng([seed, run, arm]))[0] for arm in (0, 1)]
        gain = Bootstrap(len(arms[0]), samples=samples, seed=run).gains(arms[1][:, :1], arms[0][:, :1])[0]
        alarms += gain.low is not None and gain.high is not None and (gain.low > 0 or gain.high < 0)
    return alarms / runs
