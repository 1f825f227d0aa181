"""How much a guided decoder's own logits should count, chosen on validation requests.

Ours. The decoder learns from the training queries, the encoder's guidance (`guidance.py`) was trained on them too, and on few queries the
decoder is too sure of what it learned by heart: on Home Depot its full weight costs recall, on the marketplace it brings some. So each
stage keeps the weight, of a few, with the best recall of items on validation requests. It is folded into the last norm's scale, which
multiplies every logit of the decoder and nothing else, so that search, samples and updates need not know of it.

Shapes: R requests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from genrecall.data.interactions import Requests
from genrecall.generator.model import Decoder
from genrecall.generator.retriever import Retriever

DECODER_WEIGHTS = (1.0, 0.75, 0.5, 0.25)
"""Candidates, the first wins among equals. 0 is none: it would be the encoder alone under another name."""
CUTS = (10, 100)
_BEAM_SIZE = 100


@contextlib.contextmanager
def weighted_decoder(model: Decoder, weight: float) -> Iterator[None]:
    """Inside, the decoder's logits count `weight` times beside the guidance."""
    scale = model.norm.weight
    trained = scale.detach().clone()
    try:
        with torch.no_grad():
            scale.mul_(weight)
        yield
    finally:
        with torch.no_grad():
            scale.copy_(trained)


def choose_decoder_weight(
    retriever: Retriever, requests: Requests, *, personalised: bool, weights: Sequence[float] = DECODER_WEIGHTS
) -> tuple[float, dict[str, float]]:
    """The weight with the best recall of clicked items, the mean of recall@10 and recall@100, and that mean for each weight as text.

    Args:
        retriever: the guided generator.
        requests: R validation requests with a click each.
        personalised: whether prompts hold the shopper.
    """
    found: dict[str, float] = {}
    for weight in weights:
        with weighted_decoder(retriever.model, weight):
            found[f"{weight:g}"] = _recall(retriever, requests, personalised=personalised)
    best = max(found, key=lambda name: found[name])
    return float(best), found


def _recall(retriever: Retriever, requests: Requests, *, personalised: bool) -> float:
    results = retriever.recall(
        requests.queries, requests.genders, requests.age_bands, requests.history, beam_size=_BEAM_SIZE, limit=max(CUTS), personalised=personalised
    )
    shares = [np.isin(clicked, result.item_rows[:cut]).mean() for result, clicked in zip(results, requests.clicked, strict=True) for cut in CUTS]
    return float(np.mean(shares))
