"""Decoders as Hugging Face Qwen2 folders: `config.json` and `model.safetensors` with its names, ours beside them.

`transformers` reads the folder as a Qwen2ForCausalLM over the whole vocabulary, in which every (code, group) pair has a row of
its own. What it has no place for lies in `genrecall.json` (the decoder's config) and `genrecall.safetensors` (soft prompt,
group terms, guidance): through `transformers` soft prompt and guidance are left out. Nothing but safetensors and JSON is read; a
folder's generation_config.json is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from genrecall.config import ConfigError, from_dict, to_dict
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.lexicon import Lexicon
from genrecall.generator.model import Decoder

FORMAT_VERSION = 1
_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "output_weight": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "down_weight": "mlp.down_proj.weight",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


class ModelFolderError(ValueError):
    """A folder that is not a decoder that we can load; the message says what is missing or different."""


def save_decoder(model: Decoder, folder: Path) -> None:
    """Write `config.json`, `model.safetensors`, `genrecall.json` and `genrecall.safetensors` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    weights = {"model.embed_tokens.weight": model.tokens.rows(), "model.norm.weight": model.norm.weight}
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = model.tokens.rows(head=True)
    state = model.state_dict()
    sizes = [config.num_heads * config.head_size, config.num_kv_heads * config.head_size, config.num_kv_heads * config.head_size]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        weights |= {theirs + name: state[ours + own] for own, name in _LAYER_NAMES.items()}
        for part in ("weight", "bias"):
            weights |= {f"{theirs}{name}.{part}": rows for name, rows in zip(_QKV, state[f"{ours}qkv_{part}"].split(sizes), strict=True)}
        weights |= {theirs + name: rows for name, rows in zip(_GATE_UP, state[f"{ours}gate_up_weight"].chunk(2), strict=True)}
    extra = {name: tensor for name, tensor in state.items() if name.startswith(("soft_prompt.", "guidance.")) or name.endswith("group_terms")}
    _write(weights, folder / "model.safetensors")
    _write(extra, folder / "genrecall.safetensors")
    (folder / "config.json").write_text(json.dumps(_hugging_face_config(model), indent=2) + "\n")
    (folder / "genrecall.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "decoder": to_dict(config)}, indent=2) + "\n")


def load_decoder(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    """Read a folder written by `save_decoder`, or a Hugging Face Qwen2 or Qwen2.5 folder (single or sharded safetensors).

    A folder without `genrecall.json` gives a text model without SID levels, see `Decoder.extend_for_sids`.

    Raises:
        ModelFolderError: no config.json, another model type, weights in a pickled format only, a setting that the decoder does not
            have, or weights that do not fit the config.
    """
    folder = Path(folder)
    described = _read_json(folder, "config.json")
    _check_supported(folder, described)
    config = _decoder_config(folder, described)
    weights = _read_weights(folder)
    model = Decoder(config, seed=None)
    state = _our_state(folder, config, weights)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [f"{name} {list(state[name].shape)} instead of {list(shape)}" for name, shape in expected.items() if tuple(state[name].shape) != shape]
    if wrong:
        raise ModelFolderError(f"{folder}: weights do not fit config.json: {'; '.join(wrong[:5])}")
    model.load_state_dict(state)
    _check_pairs(folder, model, weights)
    return model.to(device=torch.device(device), dtype=dtype)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _hugging_face_config(model: Decoder) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,  # read by transformers 4; 5 reads rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."),
    }


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ModelFolderError(f"{folder}: no {name}; expected a Hugging Face Qwen2 folder (config.json and model.safetensors)")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelFolderError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _rope(described: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings as transformers 5 writes them, from either of its spellings."""
    older = {**(described.get("rope_scaling") or {}), "rope_theta": described.get("rope_theta", 10_000.0)}
    return {**older, **(described.get("rope_parameters") or {})}


def _check_supported(folder: Path, described: dict[str, Any]) -> None:
    if described.get("model_type") != "qwen2":
        raise ModelFolderError(f"{folder}/config.json: model_type: expected 'qwen2' (Qwen2 and Qwen2.5), got {described.get('model_type')!r}")
    rope = _rope(described)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ModelFolderError(f"{folder}/config.json: rope_type: only 'default' rotary positions are supported, got {kind!r}")
    if described.get("use_sliding_window"):
        raise ModelFolderError(f"{folder}/config.json: use_sliding_window: only full attention is supported, got true")
    if described.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"{folder}/config.json: hidden_act: only 'silu' is supported, got {described['hidden_act']!r}")


def _decoder_config(folder: Path, described: dict[str, Any]) -> DecoderConfig:
    try:
        heads = described["num_attention_heads"]
        values = {
            "text_vocab_size": described["vocab_size"],
            "hidden_size": described["hidden_size"],
            "num_layers": described["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": described.get("num_key_value_heads") or heads,
            "head_dim": described.get("head_dim"),
            "intermediate_size": described["intermediate_size"],
            "rope_theta": _rope(described)["rope_theta"],
            "rms_norm_eps": described.get("rms_norm_eps", 1e-6),
            "tie_word_embeddings": described.get("tie_word_embeddings", False),
            "max_positions": described.get("max_position_embeddings", 32_768),
        }
    except KeyError as error:
        raise ModelFolderError(f"{folder}/config.json: {error.args[0]}: missing") from error
    path = folder / "genrecall.json"
    try:
        if not path.is_file():
            return from_dict(DecoderConfig, values)
        ours = _read_json(folder, "genrecall.json")
        if ours.get("format_version") != FORMAT_VERSION:
            raise ModelFolderError(f"{path}: format_version: expected {FORMAT_VERSION}, got {ours.get('format_version')!r}")
        config = from_dict(DecoderConfig, ours.get("decoder", {}))
    except ConfigError as error:
        raise ModelFolderError(f"{folder}: {error}") from error
    own = {"text_vocab_size": config.vocab_size, **{name: getattr(config, name) for name in values if name not in ("text_vocab_size", "head_dim")}}
    differing = [f"{name} {values[name]!r} in config.json, {value!r} in genrecall.json" for name, value in own.items() if values[name] != value]
    if differing:
        raise ModelFolderError(f"{folder}: config.json and genrecall.json are not of the same model: {'; '.join(differing)}")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(folder, index.name).get("weight_map", {}).values()))
    elif (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {', '.join(pickled)} may hold pickled code and is not read: save the model as safetensors" if pickled else ""
        raise ModelFolderError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")
    if (folder / "genrecall.json").is_file():
        shards.append("genrecall.safetensors")
    weights: dict[str, Tensor] = {}
    for shard in shards:
        path = folder / shard
        if Path(shard).name != shard or not path.is_file():
            raise ModelFolderError(f"{folder}: weight file {shard!r} is missing or lies outside the folder")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except safetensors.SafetensorError as error:
            raise ModelFolderError(f"{path}: not a whole safetensors file ({error})") from error
    return weights


def _our_state(folder: Path, config: DecoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in weights:
            missing.append(name)
            return torch.empty(0)
        return weights[name].float() if weights[name].is_floating_point() else weights[name]

    state = {"norm.weight": take("model.norm.weight")}
    text, codes = config.text_vocab_size, sum(config.level_sizes)
    for prefix, name in (("", "model.embed_tokens.weight"), ("head_", "lm_head.weight"))[: 1 if config.tie_word_embeddings else 2]:
        rows = take(name)
        if len(rows) not in (0, config.vocab_size):
            raise ModelFolderError(f"{folder}: {name} has {len(rows)} rows, config.json's vocab_size says {config.vocab_size}")
        state[f"tokens.{prefix}text"] = rows[:text]
        if codes:
            state[f"tokens.{prefix}codes"] = rows[text : text + codes]
        if config.groups:
            state[f"tokens.{prefix}group_terms"] = take(f"tokens.{prefix}group_terms")
    if config.soft_prompt_dim:
        state |= {name: take(name) for name in ("soft_prompt.weight", "soft_prompt.bias")}
    if config.guide_sharpness:
        names = ("level_weights", *(Lexicon._fields if config.guide_lexical else ()))
        weights = {"guidance.token_stems": torch.arange(text, dtype=torch.int32), **weights}  # a folder from before tokens counted by their stems has none
        state |= {f"guidance.{name}": take(f"guidance.{name}") for name in names}
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        state |= {ours + own: take(theirs + name) for own, name in _LAYER_NAMES.items()}
        state |= {f"{ours}qkv_{part}": torch.cat([take(f"{theirs}{name}.{part}") for name in _QKV]) for part in ("weight", "bias")}
        state[f"{ours}gate_up_weight"] = torch.cat([take(theirs + name) for name in _GATE_UP])
    if missing:
        raise ModelFolderError(f"{folder}: weights missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    return state


def _check_pairs(folder: Path, model: Decoder, weights: dict[str, Tensor]) -> None:
    """Rows of (code, group) pairs that were trained apart cannot be kept: say so rather than lose them."""
    names = {"model.embed_tokens.weight": False} | ({} if model.config.tie_word_embeddings else {"lm_head.weight": True})
    for name, head in names.items():
        if model.config.groups and not torch.allclose(weights[name].float(), model.tokens.rows(head=head), atol=1e-2, rtol=1e-2):
            raise ModelFolderError(f"{folder}: {name}: rows of (code, group) pairs are not code plus group term; the folder was changed after it was saved")
