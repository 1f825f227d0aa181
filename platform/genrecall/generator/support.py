"""What the score of a token is normalised over, and whether a decoder, a trie and such a support go together.

- "level": the level's whole alphabet; the trie masks afterwards. That of a decoder without guidance.
- "trie": the children of the prefix. That of a decoder with guidance, see `guidance.py`.
- "full": the whole vocabulary, text included, as Hugging Face does; for comparison only.

Shapes: B prompts, W beams or samples per prompt, C candidates.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from genrecall.generator.guidance import Guide
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.sid.trie import Children, Trie

Support = Literal["level", "trie", "full"]
SUPPORTS: tuple[Support, ...] = ("level", "trie", "full")


class DecodingError(ValueError):
    """A search, sample or score that the model and the trie cannot give."""


def check_support(model: Decoder, trie: Trie | None, support: str) -> None:
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


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise DecodingError(f"temperature: expected a positive number, got {temperature}")


def guide_of_prompts(model: Decoder, prompts: Prompts, trie: Trie | None) -> Guide | None:
    """What encoder and words say of every prefix, where the decoder is guided; `check_support` has passed."""
    return guide_with_vectors(model, prompts, trie)[0]


def guide_with_vectors(model: Decoder, prompts: Prompts, trie: Trie | None) -> tuple[Guide | None, Tensor | None]:
    """As `guide_of_prompts`, and the query vectors [B, d] after feedback where it has some."""
    if model.guidance is None:
        return None, None
    if prompts.soft is None:
        raise DecodingError("prompts: a guided decoder needs the query encoder's vectors; give soft [B, soft_prompt_dim]")
    assert trie is not None
    return model.guidance.with_vectors(prompts.soft, prompts.token_ids, prompts.lengths, trie)


def guide_of_children(level: Tensor, children: Children) -> Tensor:
    """The guide's entries [B, W, C] of children, given one level of it [B, nodes]."""
    return level.gather(1, children.ids.flatten(1)).view(children.ids.shape)
