"""Encoders for use: load one from its folder and turn texts into unit vectors. No training code is imported here.

A folder holds `encoder.json` (what it is) and `encoder.safetensors` (its weights); a Hugging Face encoder also `model/`. The same text gives the same
vector on every machine, up to the last bits of float32 arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from genrecall.encoders.hugging_face import HuggingFaceTowers
from genrecall.encoders.ngram_hash import HASH_VERSION
from genrecall.encoders.towers import NgramTowers, Side, Towers

SPEC_FILE, WEIGHTS_FILE, MODEL_FOLDER = "encoder.json", "encoder.safetensors", "model"
_RERUN = "rerun jobs/train_encoder.py"


class EncoderFileError(ValueError):
    """An encoder folder that cannot be used; the message says which file and what to do."""


class TextEncoder(Protocol):
    """Texts to vectors of unit length, float32.

    Attributes:
        folds_text: whether case, compatibility forms (NFKC) and white space make no difference to a vector.
    """

    dim: int
    folds_text: bool

    def encode_items(self, texts: Sequence[str], category_paths: Sequence[Sequence[str]] | None = None) -> np.ndarray:
        """float32 [n, dim]. `texts` as `embed.item_text` makes them; `category_paths` only where the texts do not hold their category."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]."""
        ...


class TowerEncoder:
    """A `TextEncoder` over trained towers: batched inside, without gradients.

    Args:
        towers: moved to `device` and set to evaluation.
        device: where the vectors are computed.
        batch_size: texts at a time.
    """

    def __init__(self, towers: Towers, *, device: torch.device | str = "cpu", batch_size: int = 1024) -> None:
        self.dim = towers.dim
        self.folds_text = towers.folds_text
        self._towers = towers.to(device).eval()
        self._device = torch.device(device)
        self._batch_size = batch_size

    def encode_items(self, texts: Sequence[str], category_paths: Sequence[Sequence[str]] | None = None) -> np.ndarray:
        """Vectors of items.

        Args:
            texts: n item texts, as `embed.item_text` makes them; may be empty strings.
            category_paths: n paths, root first, appended to the texts. Leave it out where the texts already hold them.

        Returns:
            float32 [n, dim], unit length.
        """
        if category_paths is not None:
            if len(category_paths) != len(texts):
                raise ValueError(f"category_paths: expected one path for each of the {len(texts)} texts, got {len(category_paths)}")
            texts = [" ".join([text, *path]) for text, path in zip(texts, category_paths, strict=True)]
        return self._encode(texts, "item")

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries: float32 [n, dim], unit length; an empty query has a vector too."""
        return self._encode(texts, "query")

    def _encode(self, texts: Sequence[str], side: Side) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError("texts: expected a sequence of strings, got one string; put it in a list")
        vectors = np.empty((len(texts), self.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(texts), self._batch_size):
                tokens = self._towers.tokenize(texts[start : start + self._batch_size], side)
                batch = self._towers.embed(tuple(part.to(self._device) for part in tokens), side)
                vectors[start : start + len(batch)] = batch.cpu().numpy()
        return vectors


def load_encoder(folder: str | Path, *, device: torch.device | str = "cpu") -> TowerEncoder:
    """The encoder in `folder`, as `save_towers` or `train_encoder` wrote it.

    Raises:
        EncoderFileError: a file is missing, broken, of another version, or does not fit the others.
    """
    folder = Path(folder)
    spec = _read_spec(folder)
    weights_file = folder / WEIGHTS_FILE
    towers: Towers
    try:
        if spec["kind"] == "ngrams":
            with torch.device("meta"):  # the stored weights take their place: no time and no random numbers spent on a start
                towers = NgramTowers(dim=spec["dim"], hidden=spec["hidden"], num_buckets=spec["num_buckets"])
        else:
            towers = HuggingFaceTowers(
                folder / MODEL_FOLDER, dim=spec["dim"], max_tokens=spec["max_tokens"], query_prefix=spec["query_prefix"], item_prefix=spec["item_prefix"]
            )
        _fill(towers, load_file(weights_file))
    except KeyError as error:
        raise EncoderFileError(f"{folder / SPEC_FILE}: lacks {error}; {_RERUN}") from error
    except (OSError, SafetensorError) as error:
        raise EncoderFileError(f"{weights_file}: cannot be read ({error}); {_RERUN}") from error
    except RuntimeError as error:
        raise EncoderFileError(f"{weights_file}: does not fit {SPEC_FILE} ({error}); {_RERUN}") from error
    return TowerEncoder(towers, device=device)


def save_towers(towers: Towers, folder: str | Path) -> None:
    """Write towers as a folder that `load_encoder` reads. The weights are stored as float32."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec: dict[str, Any]
    if isinstance(towers, NgramTowers):
        spec = {"kind": "ngrams", "dim": towers.dim, "hidden": towers.widen.out_features, "num_buckets": towers.num_buckets, "hash_version": HASH_VERSION}
    elif isinstance(towers, HuggingFaceTowers):
        spec = {
            "kind": "huggingface",
            "dim": towers.dim,
            "max_tokens": towers.max_tokens,
            "query_prefix": towers.prefixes["query"],
            "item_prefix": towers.prefixes["item"],
        }
        towers.save_backbone(folder / MODEL_FOLDER)
    else:
        raise TypeError(f"expected NgramTowers or HuggingFaceTowers, got {type(towers).__name__}")
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in _own_weights(towers).items()}, folder / WEIGHTS_FILE)
    (folder / SPEC_FILE).write_text(json.dumps(spec, indent=2, sort_keys=True))


def _own_weights(towers: Towers) -> dict[str, torch.Tensor]:
    """The weights that go into `encoder.safetensors`: all but the transformer's, which has its own folder."""
    return {name: tensor for name, tensor in towers.state_dict().items() if not name.startswith("backbone.")}


def _fill(towers: Towers, weights: dict[str, torch.Tensor]) -> None:
    expected = _own_weights(towers)
    if set(weights) != set(expected):
        raise RuntimeError(f"expected the tensors {sorted(expected)}, found {sorted(weights)}")
    towers.load_state_dict(weights, strict=False, assign=True)


def _read_spec(folder: Path) -> dict[str, Any]:
    file = folder / SPEC_FILE
    if not file.is_file():
        raise EncoderFileError(f"{folder}: not an encoder folder (no {SPEC_FILE}); {_RERUN}")
    try:
        spec = json.loads(file.read_text())
    except ValueError as error:
        raise EncoderFileError(f"{file}: not JSON ({error}); {_RERUN}") from error
    if not isinstance(spec, dict) or spec.get("kind") not in ("ngrams", "huggingface"):
        raise EncoderFileError(f"{file}: expected kind 'ngrams' or 'huggingface', got {spec.get('kind') if isinstance(spec, dict) else spec!r}; {_RERUN}")
    if spec["kind"] == "ngrams" and spec.get("hash_version") != HASH_VERSION:
        raise EncoderFileError(f"{file}: made with n-gram hash {spec.get('hash_version')!r}, this version hashes as {HASH_VERSION}; {_RERUN}")
    return spec
