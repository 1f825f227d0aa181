"""The decoder: equality with transformers, the factorised level-3 alphabet, soft prompts, folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from genrecall.config import ConfigError
from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.hugging_face import ModelFolderError
from genrecall.generator.lexicon import Lexicon
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import PromptError, Prompts

GROUPS = ((0, 1), (3, 1), (3, 2))
CONFIG = DecoderConfig(
    text_vocab_size=30,
    level_sizes=(5, 4, 6),
    groups=GROUPS,
    hidden_size=32,
    num_layers=2,
    intermediate_size=48,
    soft_prompt_dim=8,
    soft_prompt_tokens=2,
    max_positions=64,
)


def hugging_face_folder(folder: Path, **changes: object) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            **changes,
        }
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start, which would hide a mistake
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def logits_of(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        embedded, _ = model.embed_prompts(Prompts(ids, torch.full((len(ids),), ids.shape[1])))
        return model.logits(model(embedded))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tmp_path: Path, tied: bool) -> None:
    theirs = hugging_face_folder(tmp_path, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    ours = Decoder.from_pretrained(tmp_path)
    ids = torch.randint(0, 50, (3, 17))
    assert ours.config.tie_word_embeddings == tied
    assert ours.config.rope_theta == 1e6
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_sharded_folder_loads(tmp_path: Path) -> None:
    theirs = hugging_face_folder(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(Decoder.from_pretrained(tmp_path / "sharded"), ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_settings_as_transformers_4_spells_them_load(tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5, "rope_scaling": None}))
    assert Decoder.from_pretrained(tmp_path).config.rope_theta == 5e5


@pytest.mark.parametrize("tied", [True, False])
def test_saved_folder_gives_the_same_decoder_back_and_transformers_reads_it(tmp_path: Path, tied: bool) -> None:
    ours = Decoder(DecoderConfig(**{**CONFIG.__dict__, "tie_word_embeddings": tied}), seed=3)
    ours.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())

    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, ours.config.vocab_size, (3, 11))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_guidance_is_saved_with_the_decoder_and_left_out_of_transformers(tmp_path: Path) -> None:
    ours = Decoder(DecoderConfig(**{**CONFIG.__dict__, "guide_sharpness": 12.5}), seed=3)
    assert ours.guidance is not None
    assert ours.guidance.level_weights.tolist() == [1.0, 1.0, 1.0]
    with torch.no_grad():
        ours.guidance.level_weights.copy_(torch.tensor([0.5, 0.25, 2.0]))
    ours.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert again.guidance is not None
    assert again.guidance.sharpness == 12.5
    assert again.guidance.level_weights.tolist() == [0.5, 0.25, 2.0]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())

    assert not any("guidance" in name for name in load_file(tmp_path / "model.safetensors"))
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, ours.config.vocab_size, (3, 11))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, ids), theirs(ids).logits, atol=1e-4, rtol=0)

    Decoder(CONFIG, seed=3).save_pretrained(tmp_path / "unguided")
    (tmp_path / "genrecall.safetensors").write_bytes((tmp_path / "unguided" / "genrecall.safetensors").read_bytes())
    with pytest.raises(ModelFolderError, match=r"weights missing: guidance\.level_weights"):
        Decoder.from_pretrained(tmp_path)


WORDS = {"guide_sharpness": 5.0, "guide_lexical": 2.5, "guide_items": 300, "guide_entries": 900}


def lexicon_of(vocab_size: int) -> Lexicon:
    """300 items of three tokens each."""
    ids = np.concatenate([np.random.default_rng(item).choice(vocab_size, 3, replace=False) for item in range(300)])
    return Lexicon.build(ids, np.arange(301) * 3, vocab_size, np.ones(300, dtype=bool))


def worded() -> Decoder:
    model = Decoder(DecoderConfig(**{**CONFIG.__dict__, **WORDS}), seed=3)
    model.guidance.set_lexicon(lexicon_of(30))
    return model


def test_a_folder_from_before_stems_counts_every_token_as_itself(tmp_path: Path) -> None:
    model = worded()
    model.guidance.token_stems[5] = 3
    model.save_pretrained(tmp_path)
    assert Decoder.from_pretrained(tmp_path).guidance.token_stems[5] == 3
    saved = load_file(tmp_path / "genrecall.safetensors")
    assert saved.pop("guidance.token_stems").dtype == torch.int32
    save_file(saved, tmp_path / "genrecall.safetensors")
    assert Decoder.from_pretrained(tmp_path).guidance.token_stems.tolist() == list(range(CONFIG.text_vocab_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lexicon_is_saved_with_the_decoder(tmp_path: Path, dtype: torch.dtype) -> None:
    # Offsets go up to 900, of which bfloat16 would keep every eighth.
    model = worded().to(dtype)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "genrecall.safetensors")
    assert saved["guidance.item_offsets"].dtype == saved["guidance.item_tokens"].dtype == torch.int32
    assert not any("guidance" in name for name in load_file(tmp_path / "model.safetensors"))
    for again in (Decoder.from_pretrained(tmp_path), Decoder.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        assert again.config == model.config
        assert again.guidance.lexical_weight == 2.5
        assert torch.equal(again.guidance.item_offsets, lexicon_of(30).item_offsets)
        assert torch.equal(again.guidance.item_tokens, lexicon_of(30).item_tokens)
        torch.testing.assert_close(
            again.guidance.token_idf.float(), lexicon_of(30).token_idf, rtol=2**-8 if torch.bfloat16 in (dtype, again.guidance.token_idf.dtype) else 0, atol=0
        )


def test_a_folder_whose_lexicon_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    worded().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "genrecall.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "guidance.item_tokens"}, tmp_path / "genrecall.safetensors")
    with pytest.raises(ModelFolderError, match=r"weights missing: guidance\.item_tokens"):
        Decoder.from_pretrained(tmp_path)
    save_file({**weights, "guidance.item_offsets": torch.zeros(12, dtype=torch.int32)}, tmp_path / "genrecall.safetensors")
    with pytest.raises(ModelFolderError, match=r"guidance\.item_offsets \[12\] instead of \[301\]"):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"guide_sharpness": 5.0}, WORDS])
def test_the_same_seed_gives_the_same_weights_with_guidance_as_without(change: dict) -> None:
    guided = Decoder(DecoderConfig(**{**CONFIG.__dict__, **change}), seed=4).state_dict()
    assert all(torch.equal(tensor, guided[name]) for name, tensor in Decoder(CONFIG, seed=4).state_dict().items())


def test_a_sparse_forward_equals_the_whole_one() -> None:
    model = Decoder(CONFIG, seed=0)
    prompts = Prompts.from_rows([[1, 2, 3], [4, 5, 6, 7, 8], [9]], torch.randn(3, 8))
    with torch.no_grad():
        state = model.prefill(prompts)
        embedded, lengths = model.embed_prompts(prompts)
        hidden = model(embedded)
        torch.testing.assert_close(state.last_hidden, hidden[torch.arange(3), lengths - 1])
        causal = torch.ones(embedded.shape[1], embedded.shape[1], dtype=torch.bool).tril()
        torch.testing.assert_close(model(embedded, torch.arange(embedded.shape[1]), causal[None, None]), hidden)


def test_token_ids_are_text_then_the_three_alphabets() -> None:
    assert CONFIG.alphabet_sizes == (5, 4, 6 + 3)
    assert CONFIG.level_offsets == (30, 35, 39)
    assert CONFIG.vocab_size == 48


@pytest.mark.parametrize("tied", [True, False])
def test_level_logits_are_slices_of_the_whole_head(tied: bool) -> None:
    model = Decoder(DecoderConfig(**{**CONFIG.__dict__, "tie_word_embeddings": tied}))
    hidden = torch.randn(2, 3, 32)
    whole = model.logits(hidden)
    for level, (first, size) in enumerate(zip(CONFIG.level_offsets, CONFIG.alphabet_sizes, strict=True)):
        torch.testing.assert_close(model.level_logits(hidden, level), whole[..., first : first + size])


def test_a_pair_is_its_code_plus_a_term_shared_by_the_group_number() -> None:
    model = Decoder(CONFIG)
    hidden = torch.randn(32)
    logits = model.level_logits(hidden, 2)
    terms = model.tokens.group_terms @ hidden
    # Tokens 6, 7, 8 are the pairs (0, 1), (3, 1), (3, 2).
    torch.testing.assert_close(logits[6:], torch.stack((logits[0] + terms[0], logits[3] + terms[0], logits[3] + terms[1])))
    embedded = model.embed_level_tokens(torch.arange(9), 2)
    torch.testing.assert_close(embedded[7] - embedded[3], model.tokens.group_terms[0])
    torch.testing.assert_close(embedded[6] - embedded[0], model.tokens.group_terms[0])
    torch.testing.assert_close(embedded[8] - embedded[3], model.tokens.group_terms[1])


def test_vocabulary_ids_and_level_tokens_embed_alike() -> None:
    model = Decoder(CONFIG)
    for level, (first, size) in enumerate(zip(CONFIG.level_offsets, CONFIG.alphabet_sizes, strict=True)):
        ids = torch.arange(first, first + size)[None]
        embedded, _ = model.embed_prompts(Prompts(ids, torch.tensor([size])))
        torch.testing.assert_close(embedded[0], model.embed_level_tokens(torch.arange(size), level))


def test_the_same_seed_gives_the_same_weights() -> None:
    assert torch.equal(Decoder(CONFIG, seed=5).tokens.codes, Decoder(CONFIG, seed=5).tokens.codes)
    assert not torch.equal(Decoder(CONFIG, seed=5).tokens.codes, Decoder(CONFIG, seed=6).tokens.codes)


def test_soft_tokens_come_first_and_count() -> None:
    model = Decoder(CONFIG)
    prompts = Prompts.from_rows([[1, 2, 3], [4]], torch.randn(2, 8))
    embedded, lengths = model.embed_prompts(prompts)
    assert embedded.shape == (2, 5, 32)
    assert lengths.tolist() == [5, 3]
    torch.testing.assert_close(embedded[:, :2].flatten(1), model.soft_prompt(prompts.soft))
    torch.testing.assert_close(embedded[:, 2:], model.embed_prompts(Prompts(prompts.token_ids, prompts.lengths))[0])


def test_prompts_pad_on_the_right_and_take_rows() -> None:
    prompts = Prompts.from_rows([[1, 2], [3], [4, 5, 6]], torch.eye(3), pad_id=7)
    assert prompts.token_ids.tolist() == [[1, 2, 7], [3, 7, 7], [4, 5, 6]]
    taken = prompts.take(torch.tensor([2, 0]))
    assert taken.lengths.tolist() == [3, 2]
    assert taken.soft is not None
    assert taken.soft.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_text_model_gains_sids_and_keeps_its_text(tmp_path: Path) -> None:
    theirs = hugging_face_folder(tmp_path / "text")
    text = Decoder.from_pretrained(tmp_path / "text")
    assert text.config.alphabet_sizes == (0, 0, 0)
    extended = text.extend_for_sids((5, 4, 6), GROUPS, soft_prompt_dim=8, guide={**WORDS, "guide_sharpness": 7.0})
    assert extended.guidance is not None
    assert (extended.guidance.sharpness, extended.guidance.level_weights.tolist()) == (7.0, [1.0, 1.0, 1.0])
    assert (extended.guidance.lexical_weight, len(extended.guidance.item_offsets), len(extended.guidance.token_idf)) == (2.5, 301, 50)
    extended.guidance.set_lexicon(lexicon_of(40))  # ten rows of the embedding are no token's
    assert text.extend_for_sids((5, 4, 6)).guidance is None
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(extended, ids)[..., :50], theirs(ids).logits, atol=1e-4, rtol=0)
    spread = extended.tokens.codes.detach().std() / text.tokens.text.detach().std()
    assert 0.8 < float(spread) < 1.3
    extended.save_pretrained(tmp_path / "extended")
    again = Decoder.from_pretrained(tmp_path / "extended")
    torch.testing.assert_close(logits_of(again, ids), logits_of(extended, ids))
    assert again.guidance.token_idf.tolist() == [*lexicon_of(40).token_idf.tolist(), *[0.0] * 10]
    with pytest.raises(ConfigError, match="has SID levels"):
        extended.extend_for_sids((5, 4, 6))


def test_bfloat16_folders_load_as_asked(tmp_path: Path) -> None:
    Decoder(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert Decoder.from_pretrained(tmp_path).norm.weight.dtype == torch.float32
    assert Decoder.from_pretrained(tmp_path, dtype=torch.bfloat16).tokens.text.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected 'qwen2'.*'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type: only 'default'.*'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window: only full attention"),
        ({"hidden_act": "gelu"}, "hidden_act: only 'silu'.*'gelu'"),
        ({"hidden_size": "wide"}, "hidden_size: expected int, got 'wide'"),
        ({"num_attention_heads": 3}, "num_heads: must be a multiple"),
        ({"intermediate_size": 40}, r"weights do not fit config.json: layers.0.gate_up_weight \[96, 32\] instead of \[80, 32\]"),
        ({"vocab_size": 60}, "embed_tokens.weight has 50 rows, config.json's vocab_size says 60"),
        ({"num_hidden_layers": 3}, "weights missing: model.layers.2"),
    ],
)
def test_a_folder_of_another_kind_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    hugging_face_folder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelFolderError, match=message):
        Decoder.from_pretrained(tmp_path)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no config\.json; expected a Hugging Face Qwen2 folder"):
        Decoder.from_pretrained(tmp_path)
    hugging_face_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"no model\.safetensors and no model\.safetensors\.index\.json$"):
        Decoder.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelFolderError, match=r"pytorch_model\.bin may hold pickled code and is not read"):
        Decoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"config\.json: not JSON"):
        Decoder.from_pretrained(tmp_path)


def test_a_torn_weight_file_and_a_shard_outside_the_folder_are_refused(tmp_path: Path) -> None:
    hugging_face_folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFolderError, match="not a whole safetensors file"):
        Decoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelFolderError, match="missing or lies outside the folder"):
        Decoder.from_pretrained(tmp_path)


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    Decoder(CONFIG).save_pretrained(tmp_path)
    Decoder(DecoderConfig(**{**CONFIG.__dict__, "level_sizes": (5, 4, 7)})).save_pretrained(tmp_path / "other")
    (tmp_path / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    with pytest.raises(ModelFolderError, match=r"not of the same model: text_vocab_size 49 in config\.json, 48 in genrecall\.json"):
        Decoder.from_pretrained(tmp_path)


def test_pairs_that_were_trained_apart_are_refused(tmp_path: Path) -> None:
    Decoder(CONFIG).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match="are not code plus group term"):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads: must be a multiple of num_kv_heads"),
        ({"hidden_size": 30}, "hidden_size: must be a multiple of num_heads"),
        ({"head_dim": 7}, "head_dim: must be even"),
        ({"num_layers": 0}, "num_layers: must be at least 1, got 0"),
        ({"level_sizes": (5, 0, 6)}, "level_sizes: must be three sizes of at least 1"),
        ({"groups": ((6, 1),)}, "groups: expected .code, group. with 0 <= code < 6"),
        ({"groups": ((1, 1), (1, 1))}, "pair is repeated"),
        ({"soft_prompt_dim": -1}, "soft_prompt_dim: must be 0"),
        ({"guide_sharpness": -1.0}, "guide_sharpness: must be 0 .no guidance. or more, got -1.0"),
        (
            {"soft_prompt_dim": 0, "guide_sharpness": 1.0},
            "guide_sharpness: guidance needs the query encoder's vector; set soft_prompt_dim, or guide_sharpness=0",
        ),
        ({**WORDS, "guide_feedback": -0.1}, "guide_feedback: must be 0, or positive with guide_sharpness, got -0.1"),
        ({"guide_feedback": 0.2}, "guide_feedback: must be 0, or positive with guide_sharpness, got 0.2"),
        ({**WORDS, "guide_lexical": -1.0}, "guide_lexical: must be 0, or positive with guide_sharpness and a lexicon .*, got -1.0"),
        ({**WORDS, "guide_sharpness": 0.0}, "guide_lexical: must be 0, or positive with guide_sharpness and a lexicon .*, got 2.5"),
        ({**WORDS, "guide_items": 0, "guide_entries": 0}, r"with guide_sharpness and a lexicon \(guide_items, guide_entries\), got 2.5"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoder(DecoderConfig(**{**CONFIG.__dict__, **change}))


def test_impossible_prompts_are_refused() -> None:
    model = Decoder(CONFIG)
    with pytest.raises(PromptError, match="soft vectors of size 5, the decoder takes 8"):
        model.prefill(Prompts.from_rows([[1]], torch.zeros(1, 5)))
    with pytest.raises(PromptError, match="63 tokens and an answer of three do not fit the decoder's 64 positions"):
        model.prefill(Prompts.from_rows([[1] * 63]))
    with pytest.raises(PromptError, match="the decoder has 64 positions"):
        model(torch.zeros(1, 65, 32))
    with pytest.raises(PromptError, match="row 1 is empty"):
        Prompts.from_rows([[1], []])
    with pytest.raises(PromptError, match="expected at least one row"):
        Prompts.from_rows([])
    with pytest.raises(PromptError, match=r"lengths \[B\]"):
        Prompts(torch.zeros(2, 3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    with pytest.raises(PromptError, match=r"expected soft \[2, soft_prompt_dim\]"):
        Prompts(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.int64), torch.zeros(1, 8))
