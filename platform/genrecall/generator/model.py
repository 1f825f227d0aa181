"""The generator: a Qwen2-compatible decoder whose head is sliced by SID level, one for training, search and export.

Source: Qwen2 (arXiv:2407.10671; RMSNorm, rotary positions, grouped-query attention, SwiGLU, biases on query, key and value), as in
`transformers`' Qwen2ForCausalLM, which it equals to 1e-4. CQ-SID (arXiv:2605.14434) for the answer of three tokens.

What differs from a plain language model:
- The vocabulary is text, then the level-1 codes, the level-2 codes, the level-3 codes, and the (code, group) pairs of split
  clusters. `level_logits` computes one level's slice only; no text token competes. A pair has no weights of its own: its
  row is the code's plus a term shared by all pairs with that group number, at the input and in the head alike.
- A frozen query encoder's vector can be projected to soft tokens that come first in every sequence.
- `prefill` reads a prompt once; `extend` lets many short suffixes per prompt (beams, a group of samples) attend to it. Both are differentiable.

Shapes: B prompts, L prompt tokens (soft ones included), G suffixes per prompt, T suffix tokens, d hidden, H query heads,
K key/value heads, e head size, V vocabulary, A1..A3 alphabet sizes, P (code, group) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrecall.config import ConfigError
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.guidance import Guidance
from genrecall.generator.prompts import PromptError, Prompts
from genrecall.generator.token_table import TokenTable


class KeysValues(NamedTuple):
    """One layer's keys and values: [B, K, L, e] of a prompt, [B, K, G, T, e] of its suffixes."""

    keys: Tensor
    values: Tensor

    def taken(self, suffixes: Tensor) -> KeysValues:
        """Those of the chosen suffixes int64 [B, G'] of each prompt."""
        index = suffixes[:, None, :, None, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3], self.keys.shape[4])
        return KeysValues(self.keys.gather(2, index), self.values.gather(2, index))


class PromptState(NamedTuple):
    """What is kept of a batch of prompts after one pass.

    layers: per layer, keys and values [B, K, L, e]; entries past a row's length are padding.
    lengths: int64 [B], soft tokens included. padding: float [B, 1, 1, L], 0 at tokens and -inf at padding.
    last_hidden: [B, d], the normed hidden state of each prompt's last token: it predicts level 1.
    """

    layers: list[KeysValues]
    lengths: Tensor
    padding: Tensor
    last_hidden: Tensor


class Rotation(NamedTuple):
    """Cosines and sines [..., L, 1, e] of rotary positions; the sines carry the sign of the half that they multiply."""

    cos: Tensor
    sin: Tensor


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each head's pairs (x_i, x_{i + e/2}) by its position's angles; x [..., L, heads, e]."""
    return x * rotation.cos + x.roll(x.shape[-1] // 2, dims=-1) * rotation.sin


class Layer(nn.Module):
    """One decoder layer. Its weights belong to the layer itself, with query, key and value in one matrix and gate and up in another."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d, e, inner = config.hidden_size, config.head_size, config.intermediate_size
        self.heads, self.kv_heads, self.head_size, self.eps = config.num_heads, config.num_kv_heads, e, config.rms_norm_eps
        self.query_size = self.heads * e
        rows = self.query_size + 2 * self.kv_heads * e
        self.attention_norm = nn.Parameter(torch.empty(d))
        self.qkv_weight = nn.Parameter(torch.empty(rows, d))
        self.qkv_bias = nn.Parameter(torch.empty(rows))
        self.output_weight = nn.Parameter(torch.empty(d, self.query_size))
        self.mlp_norm = nn.Parameter(torch.empty(d))
        self.gate_up_weight = nn.Parameter(torch.empty(2 * inner, d))
        self.down_weight = nn.Parameter(torch.empty(d, inner))

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        *,
        attention_mask: Tensor | None = None,
        last: Tensor | None = None,
        prompt: KeysValues | None = None,
        padding: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Run the layer in one of three ways.

        Args:
            x: [B, L, d]; with `prompt`, suffixes [B, G, T, d].
            rotation: angles of x's positions.
            attention_mask: bool, broadcastable to [B, 1, L, L], True where row may see column; causal if None.
            last: int64 [B]; if given, only these positions are computed beyond their keys and values (for the top layer of a prompt).
            prompt, padding: the layer's prompt keys and values, which all suffixes share, and the padding term of the scores.
            past: keys and values [B, K, G, T', e] of the suffixes' earlier tokens.

        Returns:
            Hidden states like x ([B, 1, d] with `last`), and the keys and values of x (of the whole suffix with `past`).
        """
        normed = F.rms_norm(x, x.shape[-1:], self.attention_norm, self.eps)
        if prompt is not None:
            attended, cache = self._attend_to_prompt(normed, rotation, prompt, padding, past)
        elif last is not None:
            attended, cache = self._attend_from_last(normed, rotation, last)
            x = _at(x, last)
        else:
            attended, cache = self._attend(normed, rotation, attention_mask)
        return self._add_mlp(self._add_attended(x, attended)), cache

    def _add_attended(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + F.linear(attended, self.output_weight)

    def _add_mlp(self, x: Tensor) -> Tensor:
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], self.mlp_norm, self.eps), self.gate_up_weight).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down_weight)

    def _heads(self, x: Tensor, rows: slice) -> Tensor:
        """Chosen rows of the query, key and value product, by head: [..., heads, e]."""
        product = F.linear(x, self.qkv_weight[rows], self.qkv_bias[rows])
        return product.view(*product.shape[:-1], -1, self.head_size)

    def _attend(self, x: Tensor, rotation: Rotation, attention_mask: Tensor | None) -> tuple[Tensor, KeysValues]:
        qkv = self._heads(x, slice(None))
        turned = _rotate(qkv[..., : self.heads + self.kv_heads, :], rotation).transpose(1, 2)
        cache = KeysValues(turned[:, self.heads :], qkv[..., self.heads + self.kv_heads :, :].transpose(1, 2))
        attended = F.scaled_dot_product_attention(
            turned[:, : self.heads], cache.keys, cache.values, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2), cache

    def _attend_from_last(self, x: Tensor, rotation: Rotation, last: Tensor) -> tuple[Tensor, KeysValues]:
        key_value = self._heads(x, slice(self.query_size, None))
        cache = KeysValues(_rotate(key_value[..., : self.kv_heads, :], rotation).transpose(1, 2), key_value[..., self.kv_heads :, :].transpose(1, 2))
        query = self._heads(_at(x, last), slice(self.query_size))
        query = _rotate(query, Rotation(rotation.cos[last].unsqueeze(1), rotation.sin[last].unsqueeze(1))).transpose(1, 2)
        seen = (torch.arange(x.shape[1], device=x.device) <= last[:, None])[:, None, None]
        attended = F.scaled_dot_product_attention(query, cache.keys, cache.values, attn_mask=seen, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2), cache

    def _attend_to_prompt(
        self, x: Tensor, rotation: Rotation, prompt: KeysValues, padding: Tensor | None, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """Suffix tokens see their prompt, which is not repeated per suffix, and their own suffix up to themselves."""
        batch, suffixes, tokens, _ = x.shape
        kv, repeat, e = self.kv_heads, self.heads // self.kv_heads, self.head_size
        qkv = self._heads(x, slice(None))
        turned = _rotate(qkv[..., : self.heads + kv, :], rotation)
        # Rows of one key/value head side by side: [B, K, G, T * H/K, e], so that prompt scores are one product per (B, K).
        query = turned[..., : self.heads, :].reshape(batch, suffixes, tokens, kv, repeat, e).permute(0, 3, 1, 2, 4, 5)
        query = query.reshape(batch, kv, suffixes, tokens * repeat, e) * e**-0.5
        keys = turned[..., self.heads :, :].permute(0, 3, 1, 2, 4)
        values = qkv[..., self.heads + kv :, :].permute(0, 3, 1, 2, 4)
        if past is not None:
            keys, values = torch.cat((past.keys, keys), dim=3), torch.cat((past.values, values), dim=3)
        width, own = prompt.keys.shape[2], keys.shape[3]
        to_prompt = query.flatten(2, 3) @ prompt.keys.mT
        if padding is not None:
            to_prompt = to_prompt + padding
        to_own = query @ keys.mT
        if tokens > 1:
            step = torch.arange(own, device=x.device)
            hidden = (step > step[own - tokens :, None]).repeat_interleave(repeat, dim=0)
            to_own = to_own.masked_fill(hidden, -math.inf)
        weights = torch.cat((to_prompt, to_own.flatten(2, 3)), dim=-1).softmax(dim=-1)
        attended = weights[..., :width] @ prompt.values
        attended = attended.view_as(query) + weights[..., width:].reshape(*query.shape[:4], own) @ values
        attended = attended.view(batch, kv, suffixes, tokens, repeat, e).permute(0, 2, 3, 1, 4, 5)
        return attended.flatten(3), KeysValues(keys, values)


def _at(x: Tensor, position: Tensor) -> Tensor:
    """x [B, L, d] at one position per row: [B, 1, d]."""
    return x.gather(1, position[:, None, None].expand(-1, 1, x.shape[-1]))


class Norm(nn.Module):
    """RMSNorm with a learned scale [d]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Decoder(nn.Module):
    """The generator.

    Args:
        config: its shape.
        seed: for the initial weights; None leaves them unset (for loading).

    Raises:
        ConfigError: listing every impossible setting.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        problems = config.problems()
        if problems:
            raise ConfigError(problems)
        self.config = config
        self.tokens = TokenTable(config.text_vocab_size, config.level_sizes, config.groups, hidden_size=config.hidden_size, tied=config.tie_word_embeddings)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.soft_prompt = nn.Linear(config.soft_prompt_dim, config.soft_prompt_tokens * config.hidden_size) if config.soft_prompt_dim else None
        self.guidance = None
        if config.guide_sharpness:
            lexicon = {"vocab_size": config.text_vocab_size, "items": config.guide_items, "entries": config.guide_entries}
            self.guidance = Guidance(config.guide_sharpness, lexical_weight=config.guide_lexical, feedback=config.guide_feedback, **lexicon)
        e = config.head_size
        frequencies = config.rope_theta ** -(torch.arange(0, e, 2, dtype=torch.int64).float() / e)
        angles = (torch.arange(config.max_positions).float()[:, None] * frequencies)[:, None]
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=-1), persistent=False)
        if seed is not None:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Normal weights with variance 2 / 5d (Nguyen and Salazar 2019), smaller where a layer adds to the residual."""
        generator = torch.Generator().manual_seed(seed)
        std = math.sqrt(2 / (5 * self.config.hidden_size))
        into_residual = 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith(("norm", "norm.weight")) else 0.0)
            else:
                parameter.normal_(0, std * (into_residual if name.endswith(("output_weight", "down_weight")) else 1.0), generator=generator)
        if self.guidance is not None:
            self.guidance.level_weights.fill_(1.0)

    @property
    def device(self) -> torch.device:
        return self.cos.device

    def embed_prompts(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Input vectors of prompts, soft tokens first.

        Returns:
            Embeddings [B, L, d], padded on the right, and lengths int64 [B] with the soft tokens counted.

        Raises:
            PromptError: soft vectors for a decoder without soft prompt, or of another size.
        """
        embedded = self.tokens.embed_ids(prompts.token_ids)
        if prompts.soft is None:
            return embedded, prompts.lengths
        if self.soft_prompt is None or prompts.soft.shape[1] != self.config.soft_prompt_dim:
            raise PromptError(
                f"prompts: soft vectors of size {prompts.soft.shape[1]}, the decoder takes {self.config.soft_prompt_dim or 'none'}; use the encoder that it was trained with"
            )
        soft = self.soft_prompt(prompts.soft.to(embedded.dtype)).view(len(prompts), self.config.soft_prompt_tokens, -1)
        return torch.cat((soft, embedded), dim=1), prompts.lengths + self.config.soft_prompt_tokens

    def embed_level_tokens(self, tokens: Tensor, level: int) -> Tensor:
        """Input vectors [..., d] of level tokens int64 [...], `level` 0 to 2."""
        return self.tokens.embed_codes(tokens + self.tokens.level_starts[level])

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Logits [..., A_level] of hidden states [..., d] over one level's alphabet, `level` 0 to 2."""
        return self.tokens.level_logits(hidden, level)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] over the whole vocabulary."""
        return self.tokens.all_logits(hidden)

    def forward(self, inputs_embeds: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Normed hidden states [B, L, d] of input vectors [B, L, d].

        Args:
            inputs_embeds: see `embed_prompts`.
            positions: int64 [L] or [B, L]; 0, 1, 2, ... if None.
            attention_mask: bool, broadcastable to [B, 1, L, L], True where a row may see a column; causal if None. (Padding on
                the right needs no mask: no real token sees it.)

        Raises:
            PromptError: a sequence longer than the rotary table.
        """
        rotation = self._rotation(inputs_embeds.shape[1], positions)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden, _ = layer(hidden, rotation, attention_mask=attention_mask)
        normed: Tensor = self.norm(hidden)
        return normed

    def prefill(self, prompts: Prompts) -> PromptState:
        """Read prompts once, for `extend`. At the top layer only the last token is computed beyond its keys and values.

        Raises:
            PromptError: see `embed_prompts`; or a prompt that leaves no room for an answer.
        """
        hidden, lengths = self.embed_prompts(prompts)
        width = hidden.shape[1]
        if width + 2 > self.config.max_positions:
            raise PromptError(
                f"prompts: {width} tokens and an answer of three do not fit the decoder's {self.config.max_positions} positions; shorten the prompts or raise max_positions"
            )
        rotation = self._rotation(width)
        caches = []
        for index, layer in enumerate(self.layers):
            hidden, cache = layer(hidden, rotation, last=lengths - 1 if index == len(self.layers) - 1 else None)
            caches.append(cache)
        outside = torch.arange(width, device=hidden.device) >= lengths[:, None]
        padding = torch.zeros_like(outside, dtype=hidden.dtype).masked_fill(outside, -math.inf)[:, None, None]
        return PromptState(caches, lengths, padding, self.norm(hidden).squeeze(1))

    def extend(self, embedded: Tensor, state: PromptState, past: list[KeysValues] | None = None) -> tuple[Tensor, list[KeysValues]]:
        """Read T more tokens of G suffixes per prompt; a suffix sees its prompt and itself, not the others.

        Args:
            embedded: [B, G, T, d].
            state: from `prefill`.
            past: per layer, keys and values [B, K, G, T', e] of the suffixes so far.

        Returns:
            Normed hidden states [B, G, T, d], and per layer the keys and values of the suffixes, these tokens included.
        """
        done = 0 if past is None else past[0].keys.shape[3]
        # A row's first suffix token continues its own prompt, wherever padding ends.
        positions = state.lengths[:, None, None] + torch.arange(done, done + embedded.shape[2], device=embedded.device)
        rotation = Rotation(self.cos[positions], self.sin[positions])
        hidden, caches = embedded, []
        for index, layer in enumerate(self.layers):
            hidden, cache = layer(hidden, rotation, prompt=state.layers[index], padding=state.padding, past=None if past is None else past[index])
            caches.append(cache)
        return self.norm(hidden), caches

    def _rotation(self, width: int, positions: Tensor | None = None) -> Rotation:
        if width > self.config.max_positions:
            raise PromptError(f"sequence of {width} tokens: the decoder has {self.config.max_positions} positions")
        return Rotation(self.cos[:width], self.sin[:width]) if positions is None else Rotation(self.cos[positions], self.sin[positions])

    @torch.no_grad()
    def extend_for_sids(
        self,
        level_sizes: tuple[int, int, int],
        groups: tuple[tuple[int, int], ...] = (),
        *,
        soft_prompt_dim: int = 0,
        soft_prompt_tokens: int = 1,
        guide: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Decoder:
        """A decoder with this one's weights and new rows for the SIDs' codes, drawn with the text rows' mean and spread.

        Raises:
            ConfigError: this decoder has SID levels already, or impossible sizes.
        """
        from_config = self.config
        if any(from_config.level_sizes):
            raise ConfigError([f"extend_for_sids: the decoder has SID levels {from_config.level_sizes} already; extend the text model it came from"])
        changes = {"level_sizes": level_sizes, "groups": groups, "soft_prompt_dim": soft_prompt_dim, "soft_prompt_tokens": soft_prompt_tokens}
        changes |= dict(guide or {})
        extended = Decoder(DecoderConfig(**{**from_config.__dict__, **changes}), seed=seed)
        extended.to(self.device, self.cos.dtype)
        extended.load_state_dict(self.state_dict(), strict=False)
        table = extended.tokens
        scale = self.tokens.text.float().std() / math.sqrt(2 / (5 * from_config.hidden_size))
        for text, codes, terms in ((table.text, table.codes, table.group_terms), (table.head_text, table.head_codes, table.head_group_terms)):
            if text is not None and codes is not None:
                codes.mul_(scale).add_(text.mean(dim=0))
                if terms is not None:
                    terms.mul_(scale)
        return extended

    def save_pretrained(self, folder: Path) -> None:
        """Write a Hugging Face Qwen2 folder that also holds what is ours, see `generator/hugging_face.py`."""
        from genrecall.generator.hugging_face import save_decoder

        save_decoder(self, folder)

    @classmethod
    def from_pretrained(cls, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """Read a folder written by `save_pretrained`, or any Hugging Face Qwen2 or Qwen2.5 folder in safetensors.

        Raises:
            ModelFolderError: see `generator/hugging_face.py`.
        """
        from genrecall.generator.hugging_face import load_decoder

        return load_decoder(folder, device=device, dtype=dtype)
