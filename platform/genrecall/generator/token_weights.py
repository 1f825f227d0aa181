"""What a token is worth when query and item share it, learnt from clicks: its idf, corrected.

idf takes a rare token for a telling one. In queries the rare ones are often slips' pieces, and "inch" or "for" say little however few titles have them,
while brands and the nouns that name the thing say more. With u(w) = idf(w) * exp d(w) and the share that an item holds of the query's mass of u,
p(i | q) ~ exp(c * share) over all items; d and c are fitted to clicks on training queries from d = 0, with a small penalty on d^2. About one pass over
the queries is enough; more fits tokens that hardly a query has. The encoder has no part in it: it knows the training queries by heart.

Every training worker learns the same weights from the same draws on its CPU; the first one's are saved.

Source: term weights learnt from relevance (arXiv:1910.10687), here one weight a token, by the likelihood of the clicked item.

Shapes: N items, V text tokens, n prompts, P clicked (prompt, item) pairs, B pairs of a step.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from genrecall.generator.examples import PromptBank
from genrecall.generator.lexicon import Lexicon

logger = logging.getLogger(__name__)

PAIRS_A_STEP = 64
LEARNING_RATE = 0.03
PENALTY = 1e-4
"""On the sum of d^2, beside the mean loss of a step's pairs."""

_FIRST_SCALE = 12.0
"""c at the start."""

_SAID_EVERY = 25


def learn_token_weights(
    lexicon: Lexicon, prompts: PromptBank, owners: NDArray[np.integer], items: NDArray[np.integer], weights: NDArray[np.floating], *, steps: int, seed: int
) -> Lexicon:
    """The lexicon with learnt weights for `token_idf`; the same arguments give the same weights.

    Args:
        lexicon: on the CPU, with the tokens' idf.
        prompts: n training requests' queries, repeated ones as often as they were asked.
        owners: int [P], the prompt of each pair. items: int [P], its clicked item's place in the lexicon. weights: float [P], graded feedback.
            Each prompt with a pair is drawn as often as any other, its items in proportion to their weights.
        steps: of `PAIRS_A_STEP` pairs each. Without a pair nothing is learnt.
    """
    if not len(owners):
        return lexicon
    random = np.random.default_rng((seed, 21))
    total = np.bincount(owners, weights)
    chances = weights / total[owners]
    chances /= chances.sum()
    held, correction = lexicon.held(), torch.zeros_like(lexicon.token_idf, requires_grad=True)
    scale = torch.tensor(np.log(_FIRST_SCALE), dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([correction, scale], lr=LEARNING_RATE)
    for step in range(steps):
        drawn = random.choice(len(owners), PAIRS_A_STEP, p=chances)
        token_ids, lengths = prompts.padded(owners[drawn], 0)
        weighted = lexicon._replace(token_idf=lexicon.token_idf * correction.exp())
        scores = scale.exp() * (held @ weighted.shares(torch.from_numpy(token_ids), torch.from_numpy(lengths)).T)  # [N, B]
        clicked = torch.from_numpy(items[drawn].astype(np.int64))
        loss = (scores.logsumexp(dim=0) - scores[clicked, torch.arange(len(drawn))]).mean() + PENALTY * correction.square().sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % _SAID_EVERY == 0:
            logger.info("token weights: step %d/%d  loss %.4g", step + 1, steps, loss.item())
    return lexicon._replace(token_idf=(lexicon.token_idf * correction.exp()).detach())
