"""Groups of answers drawn from the decoder, independently of each other.

Source: the rollouts of EG-GRPO (arXiv:2605.14434). A group shares one prompt, which is read once.

Shapes: B prompts, G samples per prompt, U distinct prefixes, A codes of a level, d hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genrecall.generator.log_probs import LevelLogProbs, picked
from genrecall.generator.model import Decoder, PromptState
from genrecall.generator.prompts import Prompts
from genrecall.generator.support import DecodingError, Support, check_support, check_temperature
from genrecall.sid.trie import Trie


class GroupSamples(NamedTuple):
    """Sampled answers.

    tokens: int64 [B, G, 3]. sid_rows: int32 [B, G], -1 where the tokens name no SID. log_probs: float32 [B, G, 3], per level,
    over the support and at the temperature that they were drawn from.
    """

    tokens: Tensor
    sid_rows: Tensor
    log_probs: Tensor


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
    past = [layer.taken(first.places.gather(1, second.samples)) for layer in past]
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
    return token, picked(log_probs, token)


def check_sampling(model: Decoder, trie: Trie, support: str, temperature: float, group_size: int) -> None:
    """Check that groups can be sampled.

    Raises:
        DecodingError: support "full" or an unknown one, group_size below 1, a temperature that is not positive, or a trie that is not the model's.
    """
    check_support(model, trie, support)
    if support == "full":
        raise DecodingError("support: samples are drawn from 'level' or 'trie', got 'full'")
    check_temperature(temperature)
    if group_size < 1:
        raise DecodingError(f"group_size: expected at least 1, got {group_size}")
