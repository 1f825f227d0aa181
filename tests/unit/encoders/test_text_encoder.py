from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from genrecall.encoders.ngram_hash import hash_ngrams
from genrecall.encoders.text_encoder import EncoderFileError, TowerEncoder, load_encoder, save_towers
from genrecall.encoders.towers import NgramTowers, document_frequency

TITLES = ["Simpson Strong-Tie 12-Gauge Angle", "BEHR Premium Textured DeckOver", "红色手机壳", "", "???"]


def small_towers(seed: int = 0) -> NgramTowers:
    torch.manual_seed(seed)
    towers = NgramTowers(dim=16, hidden=32, num_buckets=512)
    torch.nn.init.normal_(towers.narrow.weight, std=0.1)
    return towers


def test_vectors_are_float32_and_of_unit_length_even_without_words():
    vectors = TowerEncoder(small_towers()).encode_items(TITLES)
    assert vectors.shape == (5, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(vectors[3], vectors[4], atol=1e-6)


def test_n_grams_do_not_read_case_forms_and_spacing():
    encoder = TowerEncoder(small_towers())
    assert encoder.folds_text
    one, other = encoder.encode_queries(["  Angle\tBRACKET", "ａｎｇｌｅ bracket"])
    np.testing.assert_array_equal(one, other)


def test_same_text_gives_the_same_vector_whatever_else_is_in_the_call():
    encoder = TowerEncoder(small_towers(), batch_size=2)
    alone = encoder.encode_queries(["angle bracket"])
    beside = encoder.encode_queries(["lamp", "", "angle bracket", "a much longer query about deck paint"])
    np.testing.assert_allclose(beside[2], alone[0], atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=5))
def test_batches_equal_one_text_at_a_time(texts):
    encoder = TowerEncoder(small_towers(), batch_size=3)
    one_by_one = [encoder.encode_items([text])[0] for text in texts]
    np.testing.assert_allclose(encoder.encode_items(texts), np.array(one_by_one).reshape(-1, 16), atol=1e-5)


def test_embedding_by_hand():
    # With the network's last layer at zero the vector is the weighted sum of the n-grams' rows, divided by its length.
    torch.manual_seed(0)
    towers = NgramTowers(dim=8, hidden=4, num_buckets=300)
    towers.start_importance(TITLES)
    buckets = hash_ngrams(["angle bracket"], 300).buckets
    total = sum(towers.importance[bucket].item() * towers.table[bucket].detach().numpy() for bucket in buckets)
    np.testing.assert_allclose(TowerEncoder(towers).encode_queries(["angle bracket"])[0], total / np.linalg.norm(total), atol=1e-6)


def test_embedding_queries_and_items_at_once_equals_one_by_one():
    towers = small_towers()
    queries, items = towers.tokenize(["lamp", "", "red angle"], "query"), towers.tokenize(TITLES, "item")
    together = towers.embed_both(queries, items)
    torch.testing.assert_close(together[0], towers.embed(queries, "query"))
    torch.testing.assert_close(together[1], towers.embed(items, "item"))


def test_importance_starts_at_inverse_document_frequency():
    towers = NgramTowers(dim=4, hidden=4, num_buckets=1000)
    towers.start_importance(["red", "red lamp", "lamp lamp"])
    frequency = np.zeros(1000)
    for text in ("red", "red lamp", "lamp lamp"):
        frequency[list(set(hash_ngrams([text], 1000).buckets.tolist()))] += 1
    weight = np.log(4 / (frequency + 1)) + 1e-3
    np.testing.assert_allclose(towers.importance.detach().numpy(), weight / weight.mean(), rtol=1e-5)


def test_document_frequency_counts_a_text_once():
    word = hash_ngrams(["x"], 64).buckets[0]
    assert document_frequency(hash_ngrams(["x x x", "x", ""], 64), 64)[word] == 2


def test_category_paths_are_read_with_the_text():
    encoder = TowerEncoder(small_towers())
    np.testing.assert_array_equal(encoder.encode_items(["hinge"], [("Hardware", "Door Hinges")]), encoder.encode_items(["hinge Hardware Door Hinges"]))


def test_as_many_category_paths_as_texts_are_needed():
    with pytest.raises(ValueError, match="category_paths: expected one path for each of the 2 texts, got 1"):
        TowerEncoder(small_towers()).encode_items(["a", "b"], [("c",)])


def test_one_string_is_not_a_list_of_texts():
    with pytest.raises(TypeError, match="put it in a list"):
        TowerEncoder(small_towers()).encode_queries("angle bracket")


def test_no_texts_give_no_vectors():
    assert TowerEncoder(small_towers()).encode_queries([]).shape == (0, 16)


def test_saved_encoder_loads_to_the_same_vectors(tmp_path: Path):
    towers = small_towers()
    save_towers(towers, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.dim == 16
    np.testing.assert_array_equal(loaded.encode_items(TITLES), TowerEncoder(towers).encode_items(TITLES))


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path):
    save_towers(small_towers(), tmp_path)
    before = torch.get_rng_state()
    load_encoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def broken(folder: Path, **changes: object) -> Path:
    save_towers(small_towers(), folder)
    spec = json.loads((folder / "encoder.json").read_text()) | changes
    (folder / "encoder.json").write_text(json.dumps({name: value for name, value in spec.items() if value is not None}))
    return folder


def test_a_folder_without_an_encoder_is_named(tmp_path: Path):
    with pytest.raises(EncoderFileError, match=r"not an encoder folder \(no encoder.json\); rerun jobs/train_encoder.py"):
        load_encoder(tmp_path)


def test_a_spec_that_is_not_json_is_an_error(tmp_path: Path):
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(EncoderFileError, match="not JSON"):
        load_encoder(tmp_path)


def test_an_unknown_kind_is_an_error(tmp_path: Path):
    with pytest.raises(EncoderFileError, match="expected kind 'ngrams' or 'huggingface', got 'pickle'"):
        load_encoder(broken(tmp_path, kind="pickle"))


def test_another_hash_version_is_an_error(tmp_path: Path):
    with pytest.raises(EncoderFileError, match="made with n-gram hash 0, this version hashes as 1"):
        load_encoder(broken(tmp_path, hash_version=0))


def test_a_spec_without_a_size_is_an_error(tmp_path: Path):
    with pytest.raises(EncoderFileError, match="lacks 'hidden'"):
        load_encoder(broken(tmp_path, hidden=None))


def test_weights_of_another_size_are_an_error(tmp_path: Path):
    with pytest.raises(EncoderFileError, match=r"encoder.safetensors: does not fit encoder.json"):
        load_encoder(broken(tmp_path, dim=8))


def test_missing_weights_are_an_error(tmp_path: Path):
    (broken(tmp_path) / "encoder.safetensors").unlink()
    with pytest.raises(EncoderFileError, match=r"encoder.safetensors: cannot be read"):
        load_encoder(tmp_path)


def test_truncated_weights_are_an_error(tmp_path: Path):
    file = broken(tmp_path) / "encoder.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EncoderFileError, match=r"encoder.safetensors: cannot be read"):
        load_encoder(tmp_path)


def test_a_missing_tensor_is_an_error(tmp_path: Path):
    file = broken(tmp_path) / "encoder.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "wordless"}, file)
    with pytest.raises(EncoderFileError, match="expected the tensors"):
        load_encoder(tmp_path)


def test_reading_an_encoder_imports_nothing_that_trains():
    code = "import sys, genrecall.encoders.text_encoder; print([m for m in ('ray', 'deepspeed', 'mlflow', 'genrecall.train_worker', 'genrecall.encoders.contrastive') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
