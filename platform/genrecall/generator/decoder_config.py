"""The shape of a decoder, and what is wrong with an impossible one.

Shapes: K1..K3 codebook sizes, P (code, group) pairs, V vocabulary, e head size.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder.

    Args:
        text_vocab_size: text tokens, ids 0 to text_vocab_size - 1.
        level_sizes: codebook sizes (K1, K2, K3); all 0 for a plain language model, see `Decoder.extend_for_sids`.
        groups: the P (code3, group >= 1) pairs of the SID space, in its order.
        head_dim: size of a head; hidden_size / num_heads if None.
        soft_prompt_dim: size of the query encoder's vector; 0 for none.
        soft_prompt_tokens: tokens that vector becomes.
        guide_sharpness: t of the guidance, see `guidance.py`, which needs that vector; 0 for none.
        guide_lexical, guide_items, guide_entries: its weight of the query's words (0 for none), and the sizes of its lexicon.
        guide_feedback: how far it moves the query's vector towards the items it finds first; 0 for not at all.
        max_positions: longest sequence, soft tokens and answer included.
    """

    text_vocab_size: int
    level_sizes: tuple[int, int, int] = (0, 0, 0)
    groups: tuple[tuple[int, int], ...] = ()
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    intermediate_size: int = 384
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    soft_prompt_dim: int = 0
    soft_prompt_tokens: int = 1
    guide_sharpness: float = 0.0
    guide_lexical: float = 0.0
    guide_items: int = 0
    guide_entries: int = 0
    guide_feedback: float = 0.0
    max_positions: int = 512

    def problems(self) -> list[str]:
        """What is wrong with the combination of settings."""
        found = [
            f"{name}: must be at least 1, got {getattr(self, name)}"
            for name in (
                "text_vocab_size",
                "hidden_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "intermediate_size",
                "soft_prompt_tokens",
                "max_positions",
            )
            if getattr(self, name) < 1
        ]
        if found:
            return found
        if self.num_heads % self.num_kv_heads:
            found.append(f"num_heads: must be a multiple of num_kv_heads ({self.num_kv_heads}), got {self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            found.append(f"hidden_size: must be a multiple of num_heads ({self.num_heads}), got {self.hidden_size}; or set head_dim")
        elif self.head_size % 2:
            found.append(f"head_dim: must be even for rotary positions, got {self.head_size}")
        if self.soft_prompt_dim < 0:
            found.append(f"soft_prompt_dim: must be 0 (none) or more, got {self.soft_prompt_dim}")
        if self.guide_sharpness < 0:
            found.append(f"guide_sharpness: must be 0 (no guidance) or more, got {self.guide_sharpness}")
        if self.guide_sharpness and not self.soft_prompt_dim:
            found.append("guide_sharpness: guidance needs the query encoder's vector; set soft_prompt_dim, or guide_sharpness=0")
        if self.guide_feedback < 0 or (self.guide_feedback and not self.guide_sharpness):
            found.append(f"guide_feedback: must be 0, or positive with guide_sharpness, got {self.guide_feedback}")
        if self.guide_lexical < 0 or (self.guide_lexical and not (self.guide_sharpness and self.guide_items)):
            found.append(f"guide_lexical: must be 0, or positive with guide_sharpness and a lexicon (guide_items, guide_entries), got {self.guide_lexical}")
        if min(self.level_sizes) < 0 or (min(self.level_sizes) == 0 and max(self.level_sizes) > 0):
            found.append(f"level_sizes: must be three sizes of at least 1, or all 0 for a text model, got {self.level_sizes}")
        codes3 = self.level_sizes[2]
        bad = [pair for pair in self.groups if len(pair) != 2 or not 0 <= pair[0] < codes3 or pair[1] < 1]
        if bad:
            found.append(f"groups: expected (code, group) with 0 <= code < {codes3} and group >= 1, got {bad[0]}")
        if len(set(self.groups)) != len(self.groups):
            found.append("groups: a (code, group) pair is repeated")
        return found

    @property
    def head_size(self) -> int:
        """e, the size of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def alphabet_sizes(self) -> tuple[int, int, int]:
        """Tokens per level: (K1, K2, K3 + P)."""
        return self.level_sizes[0], self.level_sizes[1], self.level_sizes[2] + len(self.groups)

    @property
    def level_offsets(self) -> tuple[int, int, int]:
        """Token id of each level's token 0."""
        return self.text_vocab_size, self.text_vocab_size + self.level_sizes[0], self.text_vocab_size + self.level_sizes[0] + self.level_sizes[1]

    @property
    def vocab_size(self) -> int:
        """V: text tokens and the three alphabets."""
        return self.text_vocab_size + sum(self.alphabet_sizes)
