from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, Qwen2Config, Qwen2Model, Qwen2Tokenizer

from genrecall.encoders.hugging_face import HuggingFaceError, HuggingFaceTowers
from genrecall.encoders.text_encoder import TowerEncoder, load_encoder, save_towers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", ":", "angle", "bracket", "lamp", "red", "door"]
TEXTS = ["red lamp", "angle bracket door red lamp", "door", ""]


@pytest.fixture(params=["bert", "qwen2"])
def model_folder(request, tmp_path: Path) -> Path:
    folder = tmp_path / request.param
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    if request.param == "bert":
        BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
        BertTokenizer(vocab={word: row for row, word in enumerate(WORDS)}).save_pretrained(folder)
    else:
        letters = {letter: row for row, letter in enumerate(["<|endoftext|>", "Ġ", ":", *"abcdefghijklmnopqrstuvwxyz"])}
        Qwen2Model(Qwen2Config(vocab_size=len(letters), num_key_value_heads=1, **sizes)).save_pretrained(folder)
        Qwen2Tokenizer(vocab=letters, merges=[]).save_pretrained(folder)
    return folder


def test_a_vector_is_the_mean_of_the_last_layer_over_the_text_alone(model_folder: Path):
    towers = HuggingFaceTowers(model_folder)
    with torch.no_grad():
        ids = towers.tokenizer(["angle bracket"], return_tensors="pt")["input_ids"]
        hidden = towers.backbone.eval()(input_ids=ids).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
    # Padding beside a longer text must not show.
    np.testing.assert_allclose(TowerEncoder(towers).encode_items(["angle bracket", "red lamp door door door"])[0], expected, atol=1e-5)


def test_vectors_have_unit_length_and_the_size_asked_for(model_folder: Path):
    vectors = TowerEncoder(HuggingFaceTowers(model_folder, dim=6)).encode_items(TEXTS)
    assert vectors.shape == (4, 6)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_prefixes_belong_to_their_side(model_folder: Path):
    prefixed = TowerEncoder(HuggingFaceTowers(model_folder, query_prefix="query: "))
    plain = TowerEncoder(HuggingFaceTowers(model_folder))
    np.testing.assert_allclose(prefixed.encode_queries(["red lamp"]), plain.encode_queries(["query: red lamp"]), atol=1e-6)
    np.testing.assert_allclose(prefixed.encode_items(["red lamp"]), plain.encode_items(["red lamp"]), atol=1e-6)


@pytest.mark.parametrize("dim", [0, 6])
def test_saved_encoder_loads_to_the_same_vectors(model_folder: Path, tmp_path: Path, dim: int):
    towers = HuggingFaceTowers(model_folder, dim=dim, max_tokens=16, query_prefix="query: ")
    save_towers(towers, tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.bin"))
    loaded = load_encoder(tmp_path / "saved")
    assert loaded.dim == (dim or 16)
    assert not loaded.folds_text
    np.testing.assert_allclose(loaded.encode_queries(TEXTS), TowerEncoder(towers).encode_queries(TEXTS), atol=1e-6)


def test_long_texts_are_cut(model_folder: Path):
    encoder = TowerEncoder(HuggingFaceTowers(model_folder, max_tokens=4))
    np.testing.assert_allclose(encoder.encode_items(["red red red red"]), encoder.encode_items(["red " * 500]), atol=1e-6)


def test_weights_in_a_pickle_are_refused(model_folder: Path):
    weights = model_folder / "model.safetensors"
    torch.save({}, model_folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(HuggingFaceError, match=r"cannot be loaded as a Hugging Face encoder .*model.safetensors"):
        HuggingFaceTowers(model_folder)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(HuggingFaceError, match=f"{tmp_path}: cannot be loaded"):
        HuggingFaceTowers(tmp_path)
