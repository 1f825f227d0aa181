"""Constrained beam search: the best semantic IDs of each prompt.

Source: constrained generation over semantic IDs as in CQ-SID (arXiv:2605.14434); the trie as compressed rows follows STATIC
(arXiv:2602.22647) in idea.

Request-time filters bar SIDs and never change scores. Equal scores rank by smaller SID first, at every level and in the
result, so an answer does not depend on how a top-k breaks ties.

Shapes: B prompts, W beams, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from genrecall.generator.guidance import Guide
from genrecall.generator.model import Decoder, KeysValues, PromptState
from genrecall.generator.prefix_masks import PrefixMasks, check_masks
from genrecall.generator.prompts import Prompts
from genrecall.generator.support import DecodingError, Support, check_support, guide_of_children, guide_with_vectors
from genrecall.sid.trie import Children, Trie


class BeamResult(NamedTuple):
    """The best SIDs of each prompt, best first.

    sid_rows: int32 [B, W], -1 where there are fewer SIDs than beams. tokens: int64 [B, W, 3], -1 there.
    scores: float32 [B, W], natural-log probability of the three tokens, -inf there.
    query_vectors: float [B, d], after the guide's feedback; None without.
    """

    sid_rows: Tensor
    tokens: Tensor
    scores: Tensor
    query_vectors: Tensor | None = None


@torch.inference_mode()
def beam_search(model: Decoder, prompts: Prompts, trie: Trie, *, beam_size: int, support: Support = "level", allowed: PrefixMasks | None = None) -> BeamResult:
    """The `beam_size` best SIDs of each prompt under beam search of that width.

    The prompt is read once and its keys and values shared by all beams; nothing waits for the device. The result is exact (the
    best SIDs of all) when the beam covers every prefix. A beam whose children are all barred ends. Under "trie", on a CPU, a level-2 prefix with a
    single child, whose probability is 1, is not read.

    Args:
        model, prompts, trie: on one device.
        beam_size: beams kept at each level.
        support: what scores are normalised over, see `support.py`.
        allowed: SIDs that the request admits; all if None.

    Raises:
        DecodingError: beam_size below 1, an unknown support, a trie of other alphabets, masks of another shape.
    """
    if beam_size < 1:
        raise DecodingError(f"beam_size: expected at least 1, got {beam_size}")
    check_support(model, trie, support)
    if allowed is not None:
        check_masks(allowed, trie, len(prompts))
    state = model.prefill(prompts)
    guide, query_vectors = guide_with_vectors(model, prompts, trie)
    search = _Search(model, state, trie, support, allowed, guide)

    token1, score1 = search.first_level(beam_size)
    node, score2, parent2, token2, past = search.second_level(token1, score1, beam_size)
    leaf, score3, parent3 = search.third_level(node, score2, token2, parent2, past, beam_size)

    token2 = token2.gather(1, parent3)
    token1 = token1.gather(1, parent2.gather(1, parent3))
    alive = score3 > -math.inf
    tokens = torch.stack((token1, token2, trie.tokens3[leaf].long()), dim=-1)
    missing = beam_size - leaf.shape[1]
    return BeamResult(
        torch.nn.functional.pad(torch.where(alive, leaf, -1).int(), (0, missing), value=-1),
        torch.nn.functional.pad(torch.where(alive[..., None], tokens, -1), (0, 0, 0, missing), value=-1),
        torch.nn.functional.pad(score3, (0, missing), value=-math.inf),
        query_vectors,
    )


@dataclass
class _Search:
    """One beam search. Dead beams stay in place with score -inf; widths depend on shapes only, so no step waits for data."""

    model: Decoder
    state: PromptState
    trie: Trie
    support: Support
    allowed: PrefixMasks | None
    guide: Guide | None

    def first_level(self, width: int) -> tuple[Tensor, Tensor]:
        """Tokens and scores [B, W] of the best level-1 tokens."""
        valid = self.trie.level1_valid if self.allowed is None else self.trie.level1_valid & self.allowed.level1
        logits = self.model.level_logits(self.state.last_hidden, 0).float()
        if self.guide is not None:
            logits = logits + self.guide.level1
        if self.support == "trie":
            normaliser = logits.masked_fill(~self.trie.level1_valid, -math.inf).logsumexp(-1, keepdim=True)
        else:
            normaliser = self._normaliser(self.state.last_hidden, logits)
        scores = (logits - normaliser).masked_fill(~valid, -math.inf)
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(scores)
        chosen, best = _best(scores, ids, min(width, scores.shape[1]))
        return chosen, best

    def second_level(self, token1: Tensor, score1: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[KeysValues]]:
        """Level-2 nodes, scores, parents and tokens [B, W] of the best prefixes, and the parents' keys and values."""
        embedded = self.model.embed_level_tokens(token1, 0)
        hidden, past = self.model.extend(embedded[:, :, None], self.state)
        trie = self.trie
        children = trie.children2(token1)
        mask = None if self.allowed is None else self.allowed.nodes2
        log_probs = self._log_probs(hidden[:, :, 0], 1, children, trie.tokens2)
        chosen, best = self._choose(log_probs, children, score1, mask, width, len(trie.tokens2))
        node, parent = children.ids.flatten(1).gather(1, chosen), chosen // trie.max_children2
        return node, best, parent, trie.tokens2[node].long(), past

    def third_level(self, node: Tensor, score2: Tensor, token2: Tensor, parent2: Tensor, past: list[KeysValues], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves, scores and parents [B, W] of the best SIDs."""
        trie = self.trie
        children = trie.children3(node)
        open_ = self._open(children, score2)
        if open_ is None:
            log_probs = self._read_third(token2, parent2, past, children)
        else:
            log_probs = torch.zeros(children.ids.shape, dtype=score2.dtype)  # of a single child: log 1
            if open_.shape[1]:
                rows = open_[..., None].expand(-1, -1, trie.max_children3)
                few = Children(children.ids.gather(1, rows), children.valid.gather(1, rows))
                log_probs.scatter_(1, rows, self._read_third(token2.gather(1, open_), parent2.gather(1, open_), past, few))
        mask = None if self.allowed is None else self.allowed.leaves
        chosen, best = self._choose(log_probs, children, score2, mask, width, len(trie))
        return children.ids.flatten(1).gather(1, chosen), best, chosen // trie.max_children3

    def _read_third(self, token2: Tensor, parent2: Tensor, past: list[KeysValues], children: Children) -> Tensor:
        """Log-probabilities [B, U, C] of the children of level-2 prefixes, given their tokens and parents [B, U]."""
        embedded = self.model.embed_level_tokens(token2, 1)
        hidden, _ = self.model.extend(embedded[:, :, None], self.state, [layer.taken(parent2) for layer in past])
        return self._log_probs(hidden[:, :, 0], 2, children, self.trie.tokens3)

    def _open(self, children: Children, scores: Tensor) -> Tensor | None:
        """The beams int64 [B, U] that have more than one child, U being the most of any prompt (others fill the places that are left); None for all of them.

        Over the children a single one has probability 1, and its prefix need not be read. To count them would make a device wait: CPUs only.
        """
        if self.support != "trie" or scores.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        several = (children.valid.sum(dim=-1) > 1) & (scores > -math.inf)
        most = int(several.sum(dim=1).max())
        return None if most == scores.shape[1] else several.int().argsort(dim=1, descending=True, stable=True)[:, :most]

    def _log_probs(self, hidden: Tensor, level: int, children: Children, tokens: Tensor) -> Tensor:
        """Log-probabilities [B, W, C] of children (anything where padded), given the hidden states [B, W, d] of their prefixes."""
        logits = self.model.level_logits(hidden, level).float()
        scores = logits.gather(-1, tokens[children.ids].long())
        if self.guide is not None:
            scores = scores + guide_of_children(self.guide[level], children)
        if self.support == "trie":
            normaliser = scores.masked_fill(~children.valid, -math.inf).logsumexp(-1, keepdim=True)
            normaliser = normaliser.masked_fill(normaliser == -math.inf, 0.0)  # no children: a dead beam
        else:
            normaliser = self._normaliser(hidden, logits)
        return scores - normaliser

    def _choose(self, log_probs: Tensor, children: Children, parent_scores: Tensor, mask: Tensor | None, width: int, most: int) -> tuple[Tensor, Tensor]:
        """Positions (in the flattened candidates) and scores [B, W'] of the best children of all beams, of which there are at most `most`."""
        valid = children.valid
        if mask is not None:
            valid = valid & mask.expand(len(log_probs), -1).gather(1, children.ids.flatten(1)).view_as(valid)
        totals = (parent_scores[..., None] + log_probs).masked_fill(~valid, -math.inf).flatten(1)
        return best_positions(totals, children.ids.flatten(1), min(width, totals.shape[1], most))

    def _normaliser(self, hidden: Tensor, logits: Tensor) -> Tensor:
        return (self.model.logits(hidden).float() if self.support == "full" else logits).logsumexp(-1, keepdim=True)


def _best(scores: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and scores [B, count] of the best, given scores and ids [B, C]."""
    position, best = best_positions(scores, ids, count)
    return ids.gather(1, position), best


def best_positions(scores: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions and scores [B, count] of the highest scores float32 [B, C], equal ones by smaller id (int64, below 2^31).

    The float's bits, made monotone, and the id are packed into one integer, so that no two candidates compare equal.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0, which has other bits, into 0.0
    monotone = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (monotone.long() << 32) | (0x7FFFFFFF - ids)
    position = keys.topk(count, dim=-1).indices
    return position, scores.gather(1, position)
