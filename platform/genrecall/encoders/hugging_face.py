"""Any Hugging Face text encoder, by name or folder, as a pair of towers: mean of the last layer over the text's tokens, an optional projection.

Mean pooling follows Reimers and Gurevych, "Sentence-BERT" (EMNLP 2019). Weights are read from safetensors only and no code of the model's repository
is ever run.

Shapes: n texts, L tokens of the longest, d = `dim`, h the model's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrecall.encoders.towers import Side, Tokens, Towers


class HuggingFaceError(ValueError):
    """A Hugging Face model that cannot be used as an encoder; the message says which and what to do."""


class HuggingFaceTowers(Towers):
    """One transformer for queries and items, each with its own prefix.

    Args:
        source: a name on the Hugging Face hub or a folder with config.json, model.safetensors and a tokenizer.
        dim: d; where it differs from the model's hidden size, a projection is learned. 0: the hidden size.
        max_tokens: longer texts are cut.
        query_prefix: put before every query ("query: " for E5 models).
        item_prefix: put before every item.

    Raises:
        HuggingFaceError: no such model, no safetensors, no tokenizer, or a model that needs code of its own.
    """

    def __init__(self, source: str | Path, *, dim: int = 0, max_tokens: int = 64, query_prefix: str = "", item_prefix: str = "") -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer  # seconds to import; n-gram encoders do without

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
            self.backbone: Any = AutoModel.from_pretrained(str(source), trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise HuggingFaceError(
                f"{source}: cannot be loaded as a Hugging Face encoder ({error}); give the name of a model or a folder with config.json, model.safetensors and tokenizer.json"
            ) from error
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise HuggingFaceError(f"{source}: its tokenizer has neither a padding nor an end token; set pad_token in tokenizer_config.json")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        hidden_size = int(self.backbone.config.hidden_size)
        self.dim = dim or hidden_size
        self.max_tokens = max_tokens
        self.prefixes: dict[str, str] = {"query": query_prefix, "item": item_prefix}
        self.projection = nn.Linear(hidden_size, self.dim, bias=False) if self.dim != hidden_size else nn.Identity()

    def tokenize(self, texts: Sequence[str], side: Side) -> Tokens:
        prefix = self.prefixes[side]
        encoded = self.tokenizer([prefix + text for text in texts], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        input_ids, attention_mask = encoded["input_ids"].long(), encoded["attention_mask"].long()
        if input_ids.shape[1] == 0:
            input_ids, attention_mask = torch.full((len(texts), 1), self.tokenizer.pad_token_id), torch.zeros(len(texts), 1, dtype=torch.long)
        # A text without a token reads as one padding token: its vector is defined, and attention over nothing never happens.
        attention_mask[:, 0] = 1
        return input_ids, attention_mask

    def embed(self, tokens: Tokens, side: Side) -> Tensor:
        input_ids, attention_mask = tokens
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).float()
        mean = (hidden.float() * weight).sum(1) / weight.sum(1)
        return F.normalize(self.projection(mean.to(hidden.dtype)).float(), dim=-1)

    def save_backbone(self, folder: Path) -> None:
        """Write the model and its tokenizer as a Hugging Face folder (safetensors)."""
        self.backbone.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
