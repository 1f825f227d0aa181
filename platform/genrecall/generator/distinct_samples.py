"""Groups of different answers: samples without replacement of the decoder's SIDs, by stochastic beam search.

Source: Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them" (arXiv:1903.06059), algorithm 1 and appendix B.3. Every answer's
log-probability gets a Gumbel number; the G largest sums are a sample without replacement, in the order in which it would be drawn. Going down
level by level, a prefix's sum is the largest of its answers', so only the G best prefixes need to be extended, and the sample is exact.

Deviation: a Gumbel number is a function of (request's stream, prefix) alone instead of a generator's state, so that a request's sample depends neither
on the batch nor on how many are asked for: a smaller group is the beginning of a larger one.

Shapes: B prompts, G samples per prompt, W prefixes kept, A codes of a level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genrecall.generator.group_sampling import GroupSamples, check_sampling
from genrecall.generator.log_probs import LevelLogProbs
from genrecall.generator.model import Decoder, PromptState
from genrecall.generator.prompts import Prompts
from genrecall.generator.support import DecodingError, Support
from genrecall.sid.trie import Trie

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@torch.no_grad()
def sample_distinct(
    model: Decoder,
    prompts: Prompts,
    trie: Trie,
    *,
    group_size: int,
    streams: Tensor,
    support: Support = "trie",
    temperature: float = 1.0,
    state: PromptState | None = None,
) -> GroupSamples:
    """Draw `group_size` different answers per prompt without replacement, in the order drawn.

    Under "level" an answer may be no SID (`sid_rows` -1), but no token triple comes twice. Where there are fewer answers than places, the last places are
    missing: tokens and `sid_rows` -1, log-probabilities 0.

    The first answer of a group is distributed as one of `sample_group`; the others are not: an answer's chance to be in the group exceeds its share
    of G independent draws the less likely it is, so plain means over the group are not means over the policy.

    Args:
        model, prompts, trie: on one device.
        group_size: G.
        streams: int64 [B], one random stream per prompt (all 64 bits count).
        support: "level" or "trie".
        temperature: divides the logits.
        state: what `model.prefill(prompts)` gave, where it is known already.

    Returns:
        answers with their log-probabilities by level, those of one independent draw.

    Raises:
        DecodingError: another support, group_size below 1, streams of another shape or dtype.
    """
    check_sampling(model, trie, support, temperature, group_size)
    if tuple(streams.shape) != (len(prompts),) or streams.dtype != torch.int64:
        raise DecodingError(f"streams: expected int64 [{len(prompts)}], one per prompt, got {streams.dtype} {list(streams.shape)}")
    streams = streams.to(model.device)
    state = model.prefill(prompts) if state is None else state
    levels = LevelLogProbs.of(model, prompts, support=support, trie=trie, temperature=temperature)

    root = torch.zeros(len(prompts), 1, dtype=torch.float64, device=model.device)
    prefix = torch.zeros(len(prompts), 1, dtype=torch.int64, device=model.device)
    first = _Prefixes(log_probs=root, sums=root + _gumbels(streams, 0, prefix), numbers=prefix)
    one, _, token1, log1 = _extended(first, levels.first(state.last_hidden), streams, 1, group_size)

    hidden, past = model.extend(model.embed_level_tokens(token1, 0)[:, :, None], state)
    two, parent, token2, log2 = _extended(one, levels.second(hidden[:, :, 0], token1), streams, 2, group_size)
    token1, log1 = token1.gather(1, parent), log1.gather(1, parent)

    past = [layer.taken(parent) for layer in past]
    hidden, _ = model.extend(model.embed_level_tokens(token2, 1)[:, :, None], state, past)
    three, parent, token3, log3 = _extended(two, levels.third(hidden[:, :, 0], token1, token2), streams, 3, group_size)
    tokens = torch.stack((token1.gather(1, parent), token2.gather(1, parent), token3), dim=-1)
    log_probs = torch.stack((log1.gather(1, parent), log2.gather(1, parent), log3), dim=-1)

    there = three.sums > -math.inf
    tokens = torch.where(there[..., None], tokens, -1)
    sid_rows = torch.where(there, trie.find(tokens.clamp(min=0)), -1).int()
    short = group_size - tokens.shape[1]
    return GroupSamples(
        torch.nn.functional.pad(tokens, (0, 0, 0, short), value=-1),
        torch.nn.functional.pad(sid_rows, (0, short), value=-1),
        torch.nn.functional.pad(torch.where(there[..., None], log_probs, 0.0), (0, 0, 0, short)),
    )


class _Prefixes:
    """The prefixes kept so far, best first.

    log_probs: float64 [B, W], -inf where there is none. sums: float64 [B, W], log-probability plus Gumbel number; -inf there. numbers: int64 [B, W],
    the tokens read as one number.
    """

    def __init__(self, log_probs: Tensor, sums: Tensor, numbers: Tensor) -> None:
        self.log_probs, self.sums, self.numbers = log_probs, sums, numbers


def _extended(prefixes: _Prefixes, by_token: Tensor, streams: Tensor, level: int, count: int) -> tuple[_Prefixes, Tensor, Tensor, Tensor]:
    """The best `count` one-token extensions [B, W'], their parents and tokens, and the tokens' own log-probabilities, given those float32 [B, W, A]."""
    alphabet = by_token.shape[-1]
    tokens = torch.arange(alphabet, device=by_token.device)
    numbers = prefixes.numbers[..., None] * alphabet + tokens
    log_probs = (prefixes.log_probs[..., None] + by_token.double()).masked_fill(prefixes.sums[..., None] == -math.inf, -math.inf)
    sums = conditioned(log_probs + _gumbels(streams, level, numbers), prefixes.sums)
    width = min(count, sums.shape[1] * alphabet)
    best, place = sums.flatten(1).topk(width, dim=-1)
    kept = _Prefixes(log_probs.flatten(1).gather(1, place), best, numbers.flatten(1).gather(1, place))
    return kept, place // alphabet, place % alphabet, by_token.flatten(1).gather(1, place)


def conditioned(sums: Tensor, most: Tensor) -> Tensor:
    """Gumbel sums [B, W, A] moved so that the largest of each row is `most` [B, W], without changing their joint law given that (appendix B.3).

    A sum of -inf stays so; a row without any other, or whose `most` is -inf, is -inf throughout.
    """
    top = sums.amax(dim=-1, keepdim=True)
    dead = (top == -math.inf) | (most[..., None] == -math.inf)
    top, target = torch.where(dead, 0.0, top), torch.where(dead, 0.0, most[..., None])
    away = target - sums + torch.log1p(-torch.exp(torch.where(dead, -1.0, sums - top)))
    moved = target - away.clamp(min=0.0) - torch.log1p(torch.exp(-away.abs()))
    return torch.where(dead | (sums == -math.inf), -math.inf, moved)


def _gumbels(streams: Tensor, level: int, numbers: Tensor) -> Tensor:
    """Gumbel(0) numbers float64, one per prefix: functions of (stream, level, number) alone. streams [B]; numbers int64 [B, ...]."""
    keys = _mixed(_mixed(streams) + level).view(-1, *(1,) * (numbers.ndim - 1))
    bits = _shifted(_mixed(keys + numbers + 1), 12)
    uniforms = (bits.double() + 0.5) * 2.0**-52  # 52 bits, so that neither 0 nor 1 comes out
    return -torch.log(-torch.log(uniforms))


def _mixed(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on int64, which wraps around as unsigned numbers do."""
    mixed = values * _signed(_GOLDEN) + _signed(_GOLDEN)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(_MIX_1)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(_MIX_2)
    return mixed ^ _shifted(mixed, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift to the right, zeros coming in."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
