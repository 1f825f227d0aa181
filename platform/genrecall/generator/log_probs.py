"""Log-probabilities of given answers, and of all tokens of a level: the same for samples, for SFT and for the updates of RL.

Source: group-relative training as in EG-GRPO (arXiv:2605.14434). A group shares one prompt, as if packed [prompt | s1 | s2 ...] with a
block mask; the mask is implicit here: a suffix attends to the prompt's keys and values and to itself, so that the masked
part is never computed.

Shapes: B prompts, G answers per prompt, A1..A3 alphabet sizes, d hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from genrecall.generator.guidance import Guide
from genrecall.generator.model import Decoder, PromptState
from genrecall.generator.prompts import Prompts
from genrecall.generator.support import DecodingError, Support, check_support, check_temperature, guide_of_children, guide_of_prompts
from genrecall.sid.trie import Children, Trie


class GroupLogProbs(NamedTuple):
    """Log-probabilities of given answers, with the distributions that they come from.

    log_probs: [B, G, 3], 0 at masked tokens. levels: log-probabilities over each level's alphabet, [B, 1, A1] (the same for all
    of a group), [B, G, A2] and [B, G, A3]; -inf outside the trie under support "trie".
    """

    log_probs: Tensor
    levels: tuple[Tensor, Tensor, Tensor]


@overload
def group_log_probs(
    model: Decoder,
    prompts: Prompts,
    tokens: Tensor,
    *,
    support: Support = "level",
    trie: Trie | None = None,
    temperature: float = 1.0,
    state: PromptState | None = None,
    return_level_log_probs: Literal[False] = False,
) -> Tensor: ...


@overload
def group_log_probs(
    model: Decoder,
    prompts: Prompts,
    tokens: Tensor,
    *,
    support: Support = "level",
    trie: Trie | None = None,
    temperature: float = 1.0,
    state: PromptState | None = None,
    return_level_log_probs: Literal[True],
) -> GroupLogProbs: ...


def group_log_probs(
    model: Decoder,
    prompts: Prompts,
    tokens: Tensor,
    *,
    support: Support = "level",
    trie: Trie | None = None,
    temperature: float = 1.0,
    state: PromptState | None = None,
    return_level_log_probs: bool = False,
) -> Tensor | GroupLogProbs:
    """Differentiable log-probabilities [B, G, 3] of a group of answers per prompt: what SFT and RL train with.

    The prompt is read once for the whole group; level 1 is scored once per prompt. Values and gradients equal those of B * G
    full sequences.

    Args:
        tokens: int64 [B, G, 3]. A token of -1, and whatever follows it in the answer, is masked: it counts 0 and passes no gradient.
        support: see `support.py`. `trie` is needed for "trie".
        temperature: divides the logits; the same as in sampling, for a ratio of the two to mean anything.
        state: what `model.prefill(prompts)` gave, where it is known already.
        return_level_log_probs: also return the distributions, for KL and entropy.

    Raises:
        DecodingError: tokens of another shape, or out of their alphabet, or (under "trie") no path in the trie; "trie" without a trie.
    """
    if tokens.ndim != 3 or tokens.shape[0] != len(prompts) or tokens.shape[2] != 3:
        raise DecodingError(f"tokens: expected shape [{len(prompts)}, G, 3], got {list(tokens.shape)}")
    check_support(model, trie, support)
    check_temperature(temperature)
    kept = (tokens >= 0).cummin(dim=-1).values
    inputs = torch.where(kept, tokens, 0)
    _check_tokens(model, trie, support, inputs, kept)

    state = model.prefill(prompts) if state is None else state
    embedded = torch.stack((model.embed_level_tokens(inputs[..., 0], 0), model.embed_level_tokens(inputs[..., 1], 1)), dim=2)
    hidden, _ = model.extend(embedded, state)
    levels = LevelLogProbs.of(model, prompts, support=support, trie=trie, temperature=temperature)
    distributions = (
        levels.first(state.last_hidden),
        levels.second(hidden[:, :, 0], inputs[..., 0]),
        levels.third(hidden[:, :, 1], inputs[..., 0], inputs[..., 1]),
    )
    chosen = torch.stack([picked(log_probs, inputs[..., level]) for level, log_probs in enumerate(distributions)], dim=-1)
    log_probs = torch.where(kept, chosen, 0.0)
    return GroupLogProbs(log_probs, distributions) if return_level_log_probs else log_probs


def picked(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Entries [B, G] of log-probabilities [B, G or 1, A]."""
    if log_probs.shape[1] == 1:
        return log_probs[:, 0].gather(-1, tokens)
    return log_probs.gather(-1, tokens[..., None])[..., 0]


@dataclass
class LevelLogProbs:
    """Log-probabilities over whole alphabets, -inf outside the support; the same for samples and for their update."""

    model: Decoder
    support: Support
    trie: Trie | None
    temperature: float
    guide: Guide | None

    @classmethod
    def of(cls, model: Decoder, prompts: Prompts, *, support: Support, trie: Trie | None, temperature: float) -> LevelLogProbs:
        """Those of prompts whose model and trie have been checked, see `check_sampling`."""
        return cls(model, support, trie, temperature, guide_of_prompts(model, prompts, trie))

    def first(self, last_hidden: Tensor) -> Tensor:
        """[B, 1, A1]."""
        logits = self.model.level_logits(last_hidden[:, None], 0).float()
        if self.guide is not None:
            logits = logits + self.guide.level1[:, None]
        return self._log_probs(last_hidden[:, None], logits, lambda trie: trie.level1_valid)

    def second(self, hidden: Tensor, token1: Tensor) -> Tensor:
        """[B, G, A2] of hidden states [B, G, d] after level-1 tokens [B, G]."""
        return self._below(hidden, 1, lambda trie: (trie.children2(token1), trie.tokens2))

    def third(self, hidden: Tensor, token1: Tensor, token2: Tensor) -> Tensor:
        """[B, G, A3] of hidden states [B, G, d] after level-1 and level-2 tokens [B, G]."""
        return self._below(hidden, 2, lambda trie: (trie.children3(trie.find_node(token1, token2).clamp(min=0)), trie.tokens3))

    def _below(self, hidden: Tensor, level: int, children_of: Callable[[Trie], tuple[Children, Tensor]]) -> Tensor:
        logits = self.model.level_logits(hidden, level).float()
        if self.guide is not None:
            assert self.trie is not None
            children, tokens = children_of(self.trie)
            near = torch.where(children.valid, guide_of_children(self.guide[level], children), 0.0)
            logits = logits.scatter_add(-1, tokens[children.ids].long(), near)

        def mask(trie: Trie) -> Tensor:
            children, tokens = children_of(trie)
            return _child_mask(children, tokens, logits.shape[-1])

        return self._log_probs(hidden, logits, mask)

    def _log_probs(self, hidden: Tensor, logits: Tensor, mask: Callable[[Trie], Tensor]) -> Tensor:
        logits = logits / self.temperature
        if self.support == "full":
            return logits - (self.model.logits(hidden).float() / self.temperature).logsumexp(-1, keepdim=True)
        if self.support == "trie":
            assert self.trie is not None
            valid = mask(self.trie)
            # The prefix of a masked token may have no children: any finite row will do, it is not used.
            logits = logits.masked_fill(~(valid | ~valid.any(-1, keepdim=True)), -math.inf)
        return logits.log_softmax(-1)


def _child_mask(children: Children, tokens: Tensor, alphabet: int) -> Tensor:
    """bool [B, G, A], True at the tokens of the children; padding lands in a column that is cut off."""
    columns = torch.where(children.valid, tokens[children.ids].long(), alphabet)
    mask = torch.zeros((*columns.shape[:-1], alphabet + 1), dtype=torch.bool, device=columns.device)
    return mask.scatter_(-1, columns, True)[..., :alphabet]


def _check_tokens(model: Decoder, trie: Trie | None, support: Support, tokens: Tensor, kept: Tensor) -> None:
    sizes = torch.tensor(model.config.alphabet_sizes, device=tokens.device)
    if bool((tokens >= sizes).any()):
        raise DecodingError(f"tokens: a token is out of its alphabet; expected below {model.config.alphabet_sizes} by level")
    if support != "trie":
        return
    assert trie is not None
    node = trie.find_node(tokens[..., 0], tokens[..., 1])
    paths = torch.stack((trie.level1_valid[tokens[..., 0]], node >= 0, trie.find_leaf(node, tokens[..., 2]) >= 0), dim=-1)
    if bool((kept & ~paths).any()):
        row, sample, level = (int(index) for index in torch.nonzero(kept & ~paths)[0])
        raise DecodingError(
            f"tokens: [{row}, {sample}] = {tokens[row, sample].tolist()} leaves the trie at level {level + 1}; score it with support 'level' or mask it with -1"
        )
