"""The settings of the generator and of its three supervised stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.examples import longest_prompt
from genrecall.generator.guidance import LARGEST_SPREAD
from genrecall.generator.lexicon import Lexicon
from genrecall.generator.token_stems import LANGUAGES
from genrecall.sid.semantic_id import SidTable


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Length, batch (rows over all workers) and peak learning rate of one stage."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 50

    def problems(self) -> list[str]:
        found = [f"{name}: must be at least 1, got {getattr(self, name)}" for name in ("steps", "batch_size") if getattr(self, name) < 1]
        if self.learning_rate <= 0:
            found.append(f"learning_rate: must be positive, got {self.learning_rate}")
        if self.warmup_steps < 0:
            found.append(f"warmup_steps: must not be negative, got {self.warmup_steps}")
        return found


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The generator and its three supervised stages.

    Args:
        base_model: a Hugging Face Qwen2 folder to start from; its sizes and tokenizer replace `vocab_size` and the decoder's sizes.
        soft_prompt: put the encoder's query vector in front of every prompt.
        guided: let the encoder's own opinion of every prefix count too, see `guidance.py`. Without both the generator is the paper's.
        guide_sharpness, guide_lexical: by how much a cosine counts there (an encoder trained at temperature T says 1 / T), and the words that
            query and item share (0: not at all).
        guide_stemmer: Snowball's name of the catalogue's language, e.g. "english": words of one stem are the same word there; "" compares them as they are.
        guide_feedback: how far a query's vector is moved there towards the items that it finds first (0: not at all).
        guide_weight_steps: steps in which the weights of tokens are learnt from the clicks of training queries, see `token_weights.py`; 0: they
            are worth their idf.
        correct_spelling: correct the words of a query by those of the catalogue before they become tokens, see `spelling.py`.
        targets_per_query: SIDs sampled for an example in stages 2 and 3.
        short_text_share: share of stage-1 examples that are short texts in query form; the rest are titles, half of them corrupted.
        stage2_item_fraction: share of stage-2 examples that are stage 1's.
        stage3_query_fraction: share of stage-3 examples that are stage 2's.
        corrupted_query_fraction: share of query examples (stage 2) and of copied requests (stage 3) with words dropped or misspelt; what is
            misspelt is corrected again before it becomes tokens where `correct_spelling` is on.
        query_vector_drop: in training a query's vector is that of a copy of it, with each word missing (and misspelt) at this rate, while its tokens
            stay whole; 0: its own vector, which the encoder knows by heart.
        query_frequency_power: a query is drawn in proportion to its clicked requests to this power.
        validation_requests: at most so many validation requests are decoded after each stage.
    """

    seed: int = 0
    base_model: str | None = None
    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 384
    soft_prompt: bool = True
    soft_prompt_tokens: int = 1
    guided: bool = True
    guide_sharpness: float = 20.0
    guide_lexical: float = 4.0
    guide_stemmer: str = ""
    guide_feedback: float = 0.0
    guide_weight_steps: int = 0
    correct_spelling: bool = False
    max_query_tokens: int = 24
    max_title_tokens: int = 32
    max_history: int = 8
    related_codes: int = 8
    targets_per_query: int = 3
    short_text_share: float = 0.4
    stage2_item_fraction: float = 0.3
    stage3_query_fraction: float = 0.4
    corrupted_query_fraction: float = 0.3
    query_vector_drop: float = 0.35
    query_frequency_power: float = 0.75
    weight_decay: float = 0.05
    gradient_clipping: float = 1.0
    stage1: StageConfig = StageConfig(steps=300, batch_size=64, learning_rate=2e-3)
    stage2: StageConfig = StageConfig(steps=600, batch_size=64, learning_rate=2e-3)
    stage3: StageConfig = StageConfig(steps=200, batch_size=64, learning_rate=5e-4, warmup_steps=20)
    validation_requests: int = 400

    @property
    def support(self) -> Literal["level", "trie"]:
        """Over what a level's probabilities are normalised, at training, in search and in the bundle."""
        return "trie" if self.guided else "level"

    @property
    def stages(self) -> tuple[StageConfig, StageConfig, StageConfig]:
        return self.stage1, self.stage2, self.stage3

    def problems(self) -> list[str]:
        found = [
            f"{name}: must be at least 1, got {getattr(self, name)}"
            for name in ("targets_per_query", "related_codes", "max_query_tokens", "max_title_tokens")
            if getattr(self, name) < 1
        ]
        found += [
            f"{name}: must not be negative, got {getattr(self, name)}"
            for name in ("max_history", "validation_requests", "query_frequency_power", "weight_decay")
            if getattr(self, name) < 0
        ]
        for name in ("short_text_share", "stage2_item_fraction", "stage3_query_fraction", "corrupted_query_fraction", "query_vector_drop"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}: must be between 0 and 1, got {getattr(self, name)}")
        if self.gradient_clipping <= 0:
            found.append(f"gradient_clipping: must be positive, got {self.gradient_clipping}")
        if self.guided and not self.soft_prompt:
            found.append("guided: needs the query vectors that soft_prompt=true brings; set guided=false too")
        if self.guide_sharpness <= 0:
            found.append(f"guide_sharpness: must be positive, got {self.guide_sharpness}; guided=false switches guidance off")
        found += [
            f"{name}: must not be negative, got {getattr(self, name)}"
            for name in ("guide_lexical", "guide_feedback", "guide_weight_steps")
            if getattr(self, name) < 0
        ]
        if self.guide_stemmer and self.guide_stemmer not in LANGUAGES:
            found.append(f"guide_stemmer: expected one of {', '.join(LANGUAGES)}, or none, got {self.guide_stemmer!r}")
        if self.guided and 2 * self.guide_sharpness + self.guide_lexical > LARGEST_SPREAD:
            found.append(
                f"guide_sharpness, guide_lexical: 2 * guide_sharpness + guide_lexical must be at most {LARGEST_SPREAD:g}, by which two items' scores may differ in single "
                f"precision, got {self.guide_sharpness} and {self.guide_lexical}"
            )
        defaults = GeneratorConfig.__dataclass_fields__
        idle: dict[str, tuple[str, ...]] = {
            "guided=false": () if self.guided else ("guide_sharpness", "guide_lexical", "guide_stemmer", "guide_feedback", "guide_weight_steps")
        }
        idle["guide_lexical=0"] = () if self.guide_lexical or not self.guided else ("guide_stemmer", "guide_weight_steps")
        idle["soft_prompt=false"] = () if self.soft_prompt else ("soft_prompt_tokens", "query_vector_drop")
        found += [
            f"{name}: has no effect with {switch}; leave it out"
            for switch, names in idle.items()
            for name in names
            if getattr(self, name) != defaults[name].default
        ]
        if self.stage2_item_fraction == 1:
            found.append("stage2_item_fraction: must be below 1, else stage 2 sees no query")
        if self.stage3_query_fraction == 1:
            found.append("stage3_query_fraction: must be below 1, else stage 3 sees no request")
        if self.base_model is None:
            found += self.decoder_config(self.vocab_size, None, 0).problems()
        else:
            sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
            found += [
                f"{name}: has no effect with base_model={self.base_model!r}, whose size counts; leave it out"
                for name in sizes
                if getattr(self, name) != defaults[name].default
            ]
        return found

    def guide_config(self, lexicon: Lexicon | None) -> dict[str, float]:
        """The decoder's settings of the guidance; without a lexicon words do not count."""
        if not self.guided:
            return {}
        found: dict[str, float] = {"guide_sharpness": self.guide_sharpness, "guide_feedback": self.guide_feedback}
        if lexicon is None or not self.guide_lexical:
            return found
        sizes = {"guide_items": len(lexicon.item_offsets) - 1, "guide_entries": len(lexicon.item_tokens)}
        return found | sizes | {"guide_lexical": self.guide_lexical}

    def decoder_config(self, text_vocab_size: int, table: SidTable | None, soft_prompt_dim: int, lexicon: Lexicon | None = None) -> DecoderConfig:
        """The decoder trained from scratch (without SID levels where `table` is None)."""
        limits = {name: getattr(self, name) for name in ("max_query_tokens", "max_title_tokens", "max_history")}
        return DecoderConfig(
            text_vocab_size=text_vocab_size,
            level_sizes=table.space.level_sizes if table else (0, 0, 0),
            groups=table.space.groups if table else (),
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            soft_prompt_dim=soft_prompt_dim if self.soft_prompt else 0,
            soft_prompt_tokens=self.soft_prompt_tokens,
            **(self.guide_config(lexicon) if soft_prompt_dim else {}),  # type: ignore[arg-type]
            max_positions=self.soft_prompt_tokens + 3 + longest_prompt(**limits),
        )
