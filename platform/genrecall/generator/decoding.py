"""Semantic IDs out of the decoder: constrained beam search, group sampling, and the log-probabilities that training needs.

Source: constrained generation over semantic IDs and group-relative training as in CQ-SID and EG-GRPO (arXiv:2605.14434); the trie
as compressed rows follows STATIC (arXiv:2602.22647) in idea. A group shares one prompt, as if packed [prompt | s1 | s2 ...] with a
block mask; the mask is implicit here: a suffix attends to the prompt's keys and values and to itself, so that the masked
part is never computed.

The support of a score says what a token's probability is normalised over:
- "level": the level's whole alphabet; the trie masks afterwards. That of a decoder without guidance.
- "trie": the children of the prefix. That of a decoder with guidance, see `guidance.py`.
- "full": the whole vocabulary, text included, as Hugging Face does; for comparison only.

Request-time filters bar SIDs and never change scores. Equal scores rank by smaller SID first, at every level and in the
result, so an answer does not depend on how a top-k breaks ties.

Shapes: B prompts, W beams, G samples per prompt, S SIDs, N2 level-2 nodes, A1..A3 alphabet sizes, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from genrecall.generator.guidance import Guide
from genrecall.generator.model import Decoder, KeysValues, Prompts, PromptState
from genrecall.sid.trie import Trie

Support = Literal["level", "trie", "full"]
SUPPORTS: tuple[Support, ...] = ("level", "trie", "full")


class DecodingError(ValueError):
    """A search, sample or score that the model and the trie cannot give."""


class PrefixMasks(NamedTuple):
    """What a request allows, as bool masks with one row per prompt or one for all.

    level1: [B or 1, A1]. nodes2: [B or 1, N2]. leaves: [B or 1, S].
    """

    level1: Tensor
    nodes2: Tensor
    leaves: Tensor

    @classmethod
    def from_leaves(cls, trie: Trie, leaves: Tensor) -> PrefixMasks:
        """The masks that allow exactly the prefixes of the allowed SIDs, bool [B or 1, S]."""
        if leaves.device.type == "cpu":
            nodes2 = _any_of_owner(leaves, trie.node_of_leaf, len(trie.tokens2))
            return cls(_any_of_owner(nodes2, trie.level1_of_node, trie.alphabet_sizes[0]), nodes2, leaves)
        nodes2 = _any_in_segment(leaves, trie.offsets3)
        return cls(_any_in_segment(nodes2, trie.offsets2), nodes2, leaves)

    def without(self, trie: Trie, sid_rows: Tensor) -> PrefixMasks:
        """These masks of one row less a few SIDs int64 [n], in the time of a copy: only the prefixes of those are looked at again."""
        left, nodes2, level1 = self.leaves.clone(), self.nodes2.clone(), self.level1.clone()
        left[:, sid_rows] = False
        nodes = trie.node_of_leaf[sid_rows]  # some twice, which does no harm
        children = _children(trie.offsets3, nodes, trie.max_children3)
        nodes2[0, nodes] = (left[0][children.ids] & children.valid).any(-1)
        tokens = trie.level1_of_node[nodes]
        children = _children(trie.offsets2, tokens, trie.max_children2)
        level1[0, tokens] = (nodes2[0][children.ids] & children.valid).any(-1)
        return PrefixMasks(level1, nodes2, left)


class BeamResult(NamedTuple):
    """The best SIDs of each prompt, best first.

    sid_rows: int32 [B, W], -1 where there are fewer SIDs than beams. tokens: int64 [B, W, 3], -1 there.
    scores: float32 [B, W], natural-log probability of the three tokens, -inf there.
    """

    sid_rows: Tensor
    tokens: Tensor
    scores: Tensor


class GroupSamples(NamedTuple):
    """Sampled answers.

    tokens: int64 [B, G, 3]. sid_rows: int32 [B, G], -1 where the tokens name no SID. log_probs: float32 [B, G, 3], per level,
    over the support and at the temperature that they were drawn from.
    """

    tokens: Tensor
    sid_rows: Tensor
    log_probs: Tensor


class GroupLogProbs(NamedTuple):
    """Log-probabilities of given answers, with the distributions that they come from.

    log_probs: [B, G, 3], 0 at masked tokens. levels: log-probabilities over each level's alphabet, [B, 1, A1] (the same for all
    of a group), [B, G, A2] and [B, G, A3]; -inf outside the trie under support "trie".
    """

    log_probs: Tensor
    levels: tuple[Tensor, Tensor, Tensor]


@torch.inference_mode()
def beam_search(model: Decoder, prompts: Prompts, trie: Trie, *, beam_size: int, support: Support = "level", allowed: PrefixMasks | None = None) -> BeamResult:
    """The `beam_size` best SIDs of each prompt under beam search of that width.

    The prompt is read once and its keys and values shared by all beams; nothing waits for the device. The result is exact (the
    best SIDs of all) when the beam covers every prefix. A beam whose children are all barred ends.

    Args:
        model, prompts, trie: on one device.
        beam_size: beams kept at each level.
        support: what scores are normalised over, see above.
        allowed: SIDs that the request admits; all if None.

    Raises:
        DecodingError: beam_size below 1, an unknown support, a trie of other alphabets, masks of another shape.
    """
    if beam_size < 1:
        raise DecodingError(f"beam_size: expected at least 1, got {beam_size}")
    _check(model, trie, support)
    if allowed is not None:
        _check_masks(allowed, trie, len(prompts))
    state = model.prefill(prompts)
    search = _Search(model, state, trie, support, allowed, _guide(model, prompts, trie))

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
        children = _children(trie.offsets2, token1, trie.max_children2)
        mask = None if self.allowed is None else self.allowed.nodes2
        chosen, best = self._choose(hidden[:, :, 0], 1, children, trie.tokens2, score1, mask, width)
        node, parent = children.ids.flatten(1).gather(1, chosen), chosen // trie.max_children2
        return node, best, parent, trie.tokens2[node].long(), past

    def third_level(self, node: Tensor, score2: Tensor, token2: Tensor, parent2: Tensor, past: list[KeysValues], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leaves, scores and parents [B, W] of the best SIDs."""
        embedded = self.model.embed_level_tokens(token2, 1)
        hidden, _ = self.model.extend(embedded[:, :, None], self.state, [kept_keys_values(layer, parent2) for layer in past])
        trie = self.trie
        children = _children(trie.offsets3, node, trie.max_children3)
        mask = None if self.allowed is None else self.allowed.leaves
        chosen, best = self._choose(hidden[:, :, 0], 2, children, trie.tokens3, score2, mask, width)
        return children.ids.flatten(1).gather(1, chosen), best, chosen // trie.max_children3

    def _choose(
        self, hidden: Tensor, level: int, children: _Children, tokens: Tensor, parent_scores: Tensor, mask: Tensor | None, width: int
    ) -> tuple[Tensor, Tensor]:
        """Positions (in the flattened candidates) and scores [B, W'] of the best children of all beams."""
        logits = self.model.level_logits(hidden, level).float()
        scores = logits.gather(-1, tokens[children.ids].long())
        if self.guide is not None:
            scores = scores + _guide_of(self.guide[level], children)
        if self.support == "trie":
            normaliser = scores.masked_fill(~children.valid, -math.inf).logsumexp(-1, keepdim=True)
            normaliser = normaliser.masked_fill(normaliser == -math.inf, 0.0)  # no children: a dead beam
        else:
            normaliser = self._normaliser(hidden, logits)
        valid = children.valid
        if mask is not None:
            valid = valid & mask.expand(len(hidden), -1).gather(1, children.ids.flatten(1)).view_as(valid)
        totals = (parent_scores[..., None] + (scores - normaliser)).masked_fill(~valid, -math.inf).flatten(1)
        return _best_positions(totals, children.ids.flatten(1), min(width, totals.shape[1], len(tokens)))

    def _normaliser(self, hidden: Tensor, logits: Tensor) -> Tensor:
        return (self.model.logits(hidden).float() if self.support == "full" else logits).logsumexp(-1, keepdim=True)


def _guide(model: Decoder, prompts: Prompts, trie: Trie | None) -> Guide | None:
    """What encoder and words say of every prefix, where the decoder is guided; decoding checks have passed."""
    if model.guidance is None:
        return None
    if prompts.soft is None:
        raise DecodingError("prompts: a guided decoder needs the query encoder's vectors; give soft [B, soft_prompt_dim]")
    assert trie is not None
    guide: Guide = model.guidance(prompts.soft, prompts.token_ids, prompts.lengths, trie)
    return guide


def _guide_of(level: Tensor, children: _Children) -> Tensor:
    """The guide's entries [B, W, C] of children, given one level of it [B, nodes]."""
    return level.gather(1, children.ids.flatten(1)).view(children.ids.shape)


class _Children(NamedTuple):
    """The children of nodes [B, W], padded: ids int64 [B, W, C] (in range also where padded), valid bool."""

    ids: Tensor
    valid: Tensor


def _children(offsets: Tensor, parents: Tensor, most: int) -> _Children:
    first, end = offsets[parents].long(), offsets[parents + 1].long()
    ids = first[..., None] + torch.arange(most, device=offsets.device)
    valid = ids < end[..., None]
    return _Children(torch.where(valid, ids, 0), valid)


def kept_keys_values(layer: KeysValues, parents: Tensor) -> KeysValues:
    """The keys and values [B, K, W, T, e] of each beam's parent [B, W']."""
    keys, values = layer
    index = parents[:, None, :, None, None].expand(-1, keys.shape[1], -1, keys.shape[3], keys.shape[4])
    return KeysValues(keys.gather(2, index), values.gather(2, index))


def _best(scores: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and scores [B, count] of the best, given scores and ids [B, C]."""
    position, best = _best_positions(scores, ids, count)
    return ids.gather(1, position), best


def _best_positions(scores: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions and scores [B, count] of the highest scores float32 [B, C], equal ones by smaller id (int64, below 2^31).

    The float's bits, made monotone, and the id are packed into one integer, so that no two candidates compare equal.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0, which has other bits, into 0.0
    monotone = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (monotone.long() << 32) | (0x7FFFFFFF - ids)
    position = keys.topk(count, dim=-1).indices
    return position, scores.gather(1, position)


@torch.no_grad()
def sample_group(
    model: Decoder,
    prompts: Prompts,
    trie: Trie,
    *,
    group_size: int,
    support: Support = "level",
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    state: PromptState | None = None,
) -> GroupSamples:
    """Draw `group_size` independent answers per prompt by inverting the cumulative distribution of each level.

    Under "level" an answer may be no SID (`sid_rows` -1); under "trie" it never is. "full" has no sampling: a text token is no answer.
    On a CPU a prefix that several samples share is read once, and one with a single child, whose probability is 1, not at all.

    Args:
        model, prompts, trie: on one device.
        group_size: G.
        support: "level" or "trie".
        uniforms: float [B, G, 3] in [0, 1); the answers are a function of them, whatever the batch they are drawn in.
        generator: draws the uniforms where they are not given; one of the two is needed.
        temperature: divides the logits.
        state: what `model.prefill(prompts)` gave, where it is known already.

    Raises:
        DecodingError: another support, group_size below 1, uniforms of another shape, neither or both sources of randomness.
    """
    check_sampling(model, trie, support, temperature, group_size)
    if (uniforms is None) == (generator is None):
        raise DecodingError("sample_group: give either uniforms [B, G, 3] or a torch.Generator")
    shape = (len(prompts), group_size, 3)
    if uniforms is None:
        assert generator is not None
        uniforms = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    elif tuple(uniforms.shape) != shape:
        raise DecodingError(f"uniforms: expected shape {list(shape)}, got {list(uniforms.shape)}")
    uniforms = uniforms.to(model.device)

    state = model.prefill(prompts) if state is None else state
    levels = LevelLogProbs.of(model, prompts, support=support, trie=trie, temperature=temperature)
    token1, log1 = _draw(levels.first(state.last_hidden), uniforms[..., 0])
    first = _Distinct.of(token1)
    hidden, past = model.extend(model.embed_level_tokens(token1.gather(1, first.samples), 0)[:, :, None], state)
    token2, log2 = _draw(levels.second(first.spread(hidden), token1), uniforms[..., 1])
    prefixes = token1 * trie.alphabet_sizes[1] + token2
    if support == "trie":
        node = trie.find_node(token1, token2)
        prefixes = torch.where(trie.offsets3[node + 1] - trie.offsets3[node] > 1, prefixes, -1)
    second = _Distinct.of(prefixes)
    past = [kept_keys_values(layer, first.places.gather(1, second.samples)) for layer in past]
    hidden, _ = model.extend(model.embed_level_tokens(token2.gather(1, second.samples), 1)[:, :, None], state, past)
    token3, log3 = _draw(levels.third(second.spread(hidden), token1, token2), uniforms[..., 2])
    tokens = torch.stack((token1, token2, token3), dim=-1)
    return GroupSamples(tokens, trie.find(tokens).int(), torch.stack((log1, log2, log3), dim=-1))


class _Distinct(NamedTuple):
    """The distinct ones among the prefixes of each group.

    samples: int64 [B, U], a sample that has each of them, U being the most that any group has. places: int64 [B, G], each sample's prefix among them.
    """

    samples: Tensor
    places: Tensor

    @classmethod
    def of(cls, prefixes: Tensor) -> _Distinct:
        """Of prefixes int64 [B, G]; off the CPU each sample counts as distinct, because counting would wait for the device."""
        if prefixes.device.type != "cpu":
            every = torch.arange(prefixes.shape[1], device=prefixes.device).expand_as(prefixes)
            return cls(every, every)
        ordered, order = prefixes.sort(dim=1, stable=True)
        rank = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(1)
        samples = torch.zeros(len(prefixes), int(rank.max()) + 1, dtype=torch.int64).scatter_reduce(1, rank, order, "amin", include_self=False)
        return cls(samples, torch.empty_like(order).scatter_(1, order, rank))

    def spread(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, G, d] of all samples, given those [B, U, 1, d] of the distinct prefixes."""
        return hidden[:, :, 0].gather(1, self.places[..., None].expand(-1, -1, hidden.shape[-1]))


def _draw(log_probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities [B, G], given log-probabilities [B, G or 1, A] and uniforms [B, G]."""
    cumulative = log_probs.double().exp().cumsum(-1)
    points = uniforms.double() * cumulative[..., -1]
    if log_probs.shape[1] == 1:
        token = torch.searchsorted(cumulative[:, 0], points, right=True)
    else:
        token = torch.searchsorted(cumulative, points[..., None], right=True)[..., 0]
    token = token.clamp(max=log_probs.shape[-1] - 1)
    return token, _picked(log_probs, token)


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
        support: see the module's head. `trie` is needed for "trie".
        temperature: divides the logits; the same as in sampling, for a ratio of the two to mean anything.
        state: what `model.prefill(prompts)` gave, where it is known already.
        return_level_log_probs: also return the distributions, for KL and entropy.

    Raises:
        DecodingError: tokens of another shape, or out of their alphabet, or (under "trie") no path in the trie; "trie" without a trie.
    """
    if tokens.ndim != 3 or tokens.shape[0] != len(prompts) or tokens.shape[2] != 3:
        raise DecodingError(f"tokens: expected shape [{len(prompts)}, G, 3], got {list(tokens.shape)}")
    _check(model, trie, support)
    _check_temperature(temperature)
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
    picked = torch.stack([_picked(log_probs, inputs[..., level]) for level, log_probs in enumerate(distributions)], dim=-1)
    log_probs = torch.where(kept, picked, 0.0)
    return GroupLogProbs(log_probs, distributions) if return_level_log_probs else log_probs


def _picked(log_probs: Tensor, tokens: Tensor) -> Tensor:
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
        return cls(model, support, trie, temperature, _guide(model, prompts, trie))

    def first(self, last_hidden: Tensor) -> Tensor:
        """[B, 1, A1]."""
        logits = self.model.level_logits(last_hidden[:, None], 0).float()
        if self.guide is not None:
            logits = logits + self.guide.level1[:, None]
        return self._log_probs(last_hidden[:, None], logits, lambda trie: trie.level1_valid)

    def second(self, hidden: Tensor, token1: Tensor) -> Tensor:
        """[B, G, A2] of hidden states [B, G, d] after level-1 tokens [B, G]."""
        return self._below(hidden, 1, lambda trie: (_children(trie.offsets2, token1, trie.max_children2), trie.tokens2))

    def third(self, hidden: Tensor, token1: Tensor, token2: Tensor) -> Tensor:
        """[B, G, A3] of hidden states [B, G, d] after level-1 and level-2 tokens [B, G]."""
        return self._below(hidden, 2, lambda trie: (_children(trie.offsets3, trie.find_node(token1, token2).clamp(min=0), trie.max_children3), trie.tokens3))

    def _below(self, hidden: Tensor, level: int, children_of: Callable[[Trie], tuple[_Children, Tensor]]) -> Tensor:
        logits = self.model.level_logits(hidden, level).float()
        if self.guide is not None:
            assert self.trie is not None
            children, tokens = children_of(self.trie)
            near = torch.where(children.valid, _guide_of(self.guide[level], children), 0.0)
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


def _child_mask(children: _Children, tokens: Tensor, alphabet: int) -> Tensor:
    """bool [B, G, A], True at the tokens of the children; padding lands in a column that is cut off."""
    columns = torch.where(children.valid, tokens[children.ids].long(), alphabet)
    mask = torch.zeros((*columns.shape[:-1], alphabet + 1), dtype=torch.bool, device=columns.device)
    return mask.scatter_(-1, columns, True)[..., :alphabet]


def _any_in_segment(values: Tensor, offsets: Tensor) -> Tensor:
    """Whether any of bool [B, C] is set in each slice `offsets[i]:offsets[i + 1]`: bool [B, len(offsets) - 1]."""
    counts = torch.nn.functional.pad(values.cumsum(-1, dtype=torch.int32), (1, 0)).index_select(1, offsets)
    return counts[:, 1:] > counts[:, :-1]


def _any_of_owner(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """As `_any_in_segment`, given the segment int64 [C] of each entry; on a CPU, where looking for the set ones costs no sync and a quarter of the sums."""
    found = torch.zeros(len(values), count, dtype=torch.bool)
    for row, flags in zip(found.numpy(), values.numpy(), strict=True):
        row[owner.numpy()[flags.nonzero()[0]]] = True
    return found


def _check(model: Decoder, trie: Trie | None, support: str) -> None:
    if support not in SUPPORTS:
        raise DecodingError(f"support: expected one of {', '.join(map(repr, SUPPORTS))}, got {support!r}")
    if model.guidance is not None:
        _check_guided(model, trie, support)
    if trie is None:
        if support == "trie":
            raise DecodingError("support 'trie' needs a trie")
        return
    if tuple(trie.alphabet_sizes) != model.config.alphabet_sizes:
        raise DecodingError(
            f"trie: its alphabets {tuple(trie.alphabet_sizes)} are not the decoder's {model.config.alphabet_sizes}; use the SID index that the generator was trained on"
        )
    if trie.device != model.device:
        raise DecodingError(f"trie: lies on {trie.device}, the decoder on {model.device}; move it with trie.to(...)")


def check_sampling(model: Decoder, trie: Trie, support: str, temperature: float, group_size: int) -> None:
    """Check that groups can be sampled.

    Raises:
        DecodingError: support "full" or an unknown one, group_size below 1, a temperature that is not positive, or a trie that is not the model's.
    """
    _check(model, trie, support)
    if support == "full":
        raise DecodingError("support: samples are drawn from 'level' or 'trie', got 'full'")
    _check_temperature(temperature)
    if group_size < 1:
        raise DecodingError(f"group_size: expected at least 1, got {group_size}")


def _check_guided(model: Decoder, trie: Trie | None, support: str) -> None:
    if support != "trie":
        raise DecodingError(f"support: a guided decoder scores the children of a prefix only; expected 'trie', got {support!r}")
    if trie is None or trie.item_vectors is None:
        raise DecodingError("trie: a guided decoder needs the trie with its items' vectors; rerun jobs/build_sid_index.py")
    if trie.item_vectors.shape[1] != model.config.soft_prompt_dim:
        raise DecodingError(
            f"trie: its vectors have {trie.item_vectors.shape[1]} dimensions, the decoder's query vectors {model.config.soft_prompt_dim}; "
            "rerun jobs/build_sid_index.py and jobs/train_generator.py with one encoder"
        )
    if model.config.guide_lexical and model.config.guide_items != len(trie.item_vectors):
        raise DecodingError(
            f"trie: it holds {len(trie.item_vectors)} items, the decoder's lexicon {model.config.guide_items}; use the SID index that the generator was trained on"
        )


def _check_masks(allowed: PrefixMasks, trie: Trie, batch: int) -> None:
    widths = (trie.alphabet_sizes[0], len(trie.tokens2), len(trie))
    for name, mask, width in zip(PrefixMasks._fields, allowed, widths, strict=True):
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != width:
            raise DecodingError(f"allowed.{name}: expected bool [{batch} or 1, {width}], got {mask.dtype} {list(mask.shape)}")


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise DecodingError(f"temperature: expected a positive number, got {temperature}")


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
