"""Supervised training on a shop of fifty items: the examples, the loss, the schedule, and that it learns."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from genrecall.config import ConfigError, apply_overrides
from genrecall.data.interactions import known_at_split
from genrecall.encoders.embed import item_text
from genrecall.generator.calibration import weighted_decoder
from genrecall.generator.examples import Batches, ExampleSet
from genrecall.generator.generator_config import GeneratorConfig, StageConfig
from genrecall.generator.lexicon import Lexicon, build_lexicon
from genrecall.generator.model import Decoder
from genrecall.generator.retriever import Retriever
from genrecall.generator.sft import (
    _validate,
    build_decoder,
    learning_rate_schedule,
    learnt_lexicon,
    make_spelling,
    sft_loss,
    train_tokenizer,
)
from genrecall.generator.token_weights import learn_token_weights
from genrecall.generator.training_data import NothingToLearnError, Validation, build_training_data, make_prompt_builder
from genrecall.sid.index import SidIndex
from genrecall.sid.trie import Trie

CONFIG = GeneratorConfig(
    vocab_size=600,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
    max_history=2,
    stage3_query_fraction=0.2,
    stage1=StageConfig(steps=40, batch_size=32, learning_rate=5e-3, warmup_steps=5),
    stage2=StageConfig(steps=80, batch_size=32, learning_rate=5e-3, warmup_steps=5),
    stage3=StageConfig(steps=60, batch_size=32, learning_rate=4e-3, warmup_steps=5),
)


@pytest.fixture(scope="module", params=[False, True], ids=["paper", "guided"])
def config(request) -> GeneratorConfig:
    return dataclasses.replace(CONFIG, guided=request.param)


@pytest.fixture(scope="module")
def trie(catalog, table, encoder) -> Trie:
    """With one item a SID, in the SIDs' order."""
    return Trie.from_tokens(table.tokens, (5, 10, 2)).with_items(encoder.encode_items(catalog.titles), np.arange(51))


@pytest.fixture(scope="module")
def parts(catalog, requests, table, encoder):
    tokenizer = train_tokenizer(CONFIG, catalog, requests)
    model = build_decoder(CONFIG, tokenizer, table, encoder.dim)
    vectors, known = encoder.encode_items(catalog.titles), np.ones(50, dtype=bool)
    builder = make_prompt_builder(CONFIG, tokenizer, model.config.level_offsets, table, vectors, known)
    return builder, build_training_data(CONFIG, catalog, requests, table, builder, encoder)


@pytest.fixture(scope="module")
def lexicon(catalog, parts) -> Lexicon:
    """Of the trie's items."""
    return build_lexicon(catalog, np.arange(50), parts[0].tokenizer, np.ones(50, dtype=bool))


@pytest.fixture(scope="module")
def trained(config, parts, table, trie, lexicon) -> Decoder:
    """The three stages in a plain loop."""
    builder, data = parts
    model = build_decoder(config, builder.tokenizer, table, data.vectors.shape[1], lexicon if config.guided else None)
    optimizer = torch.optim.AdamW(model.parameters())
    rate = learning_rate_schedule(CONFIG.stages)
    done = 0
    for number, (stage, examples) in enumerate(zip(CONFIG.stages, data.stages, strict=True)):
        batches = Batches(examples, batch_size=stage.batch_size, targets=1 if number == 0 else 3, seed=(0, number))
        for step in range(stage.steps):
            prompts, sids = batches.batch(step, builder, data.vectors)
            targets = torch.from_numpy(data.sid_tokens[sids])
            loss, _ = sft_loss(model, prompts.token_ids, prompts.lengths, prompts.soft, targets, support=config.support, trie=trie)
            optimizer.param_groups[0]["lr"] = rate(done)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    return model


def test_fifty_items_are_learned(config, trained, parts, requests, table, trie, encoder):
    builder, _ = parts
    validation = Validation.build(builder, requests.take(range(50)), 50, table, encoder)
    measured = validation.measure(trained, builder, trie, personalised=False, support=config.support)
    assert measured["hit@1"] > 0.9
    assert measured["hit@10"] >= measured["hit@1"]
    assert measured["hit@100"] == 1.0  # more beams than SIDs
    assert measured["loss"] < 1.0


def test_validation_loss_is_the_mean_over_the_clicked_sids_of_a_request(config, trained, parts, table, trie, encoder, make_requests):
    builder, _ = parts

    def loss_of(*clicked: list[int]) -> float:
        validation = Validation.build(builder, make_requests(["red bracket"] * len(clicked), clicked), 50, table, encoder)
        return validation.measure(trained, builder, trie, personalised=False, support=config.support)["loss"]

    red, brass, lamp = (loss_of([item]) for item in (0, 5, 31))
    assert red < brass  # so that it matters which of them count
    assert loss_of([0, 5, 31], [5]) == pytest.approx(((red + brass + lamp) / 3 + brass) / 2, rel=1e-4)


def test_the_shopper_decides_where_the_query_does_not(config, trained, parts, requests, table, trie, encoder):
    builder, _ = parts
    validation = Validation.build(builder, requests.take(range(50, 60)), 50, table, encoder)
    assert validation.measure(trained, builder, trie, personalised=True, support=config.support)["hit@1"] > 0.9
    assert validation.measure(trained, builder, trie, personalised=False, support=config.support)["hit@1"] < 0.7


def test_loss_is_the_sum_of_its_levels_and_starts_near_uniform(parts, table, trie, encoder):
    builder, data = parts
    fresh = build_decoder(dataclasses.replace(CONFIG, guided=False), builder.tokenizer, table, encoder.dim)
    prompts, sids = Batches(data.stages[1], batch_size=8, targets=3, seed=0).batch(0, builder, data.vectors)
    targets = torch.from_numpy(data.sid_tokens[sids])
    loss, levels = sft_loss(fresh, prompts.token_ids, prompts.lengths, prompts.soft, targets, support="level", trie=trie)
    assert loss.item() == pytest.approx(sum(value.item() for value in levels.values()), abs=1e-5)
    assert loss.item() == pytest.approx(np.log(5) + np.log(10) + np.log(2), abs=1.5)


@pytest.mark.parametrize("words", [False, True])
def test_guided_loss_starts_at_that_of_encoder_and_words_alone(parts, table, trie, encoder, catalog, lexicon, words):
    builder, data = parts
    fresh = build_decoder(CONFIG, builder.tokenizer, table, encoder.dim, lexicon if words else None)
    with torch.no_grad():
        fresh.tokens.codes.zero_()  # small already
    prompts, sids = Batches(data.stages[1], batch_size=64, targets=3, seed=0).batch(0, builder, data.vectors)
    targets = torch.from_numpy(data.sid_tokens[sids])
    loss, _ = sft_loss(fresh, prompts.token_ids, prompts.lengths, prompts.soft, targets, support="trie", trie=trie)
    # One item a SID: p(SID) is the softmax over the 50 items of 20 * cosine, and with words of 4 * the share of their idf too.
    logits = 20 * prompts.soft @ trie.item_vectors.float().T
    if words:
        held = [set(builder.tokenizer.encode_batch([text], 128)[0].tolist()) for text in item_text(catalog)]
        for row, ids in enumerate(prompts.token_ids.tolist()):
            idf = {token: float(lexicon.token_idf[token]) for token in set(ids[: prompts.lengths[row]]) if token < len(lexicon.token_idf)}
            worth = sum(idf.values()) or 1.0  # a corrupted query may hold no item's words
            logits[row] += 4 * torch.tensor([sum(idf[token] for token in idf if token in tokens) / worth for tokens in held])
    expected = -logits.log_softmax(-1).gather(1, torch.from_numpy(sids).long()).mean()
    assert loss.item() == pytest.approx(float(expected), abs=1e-3)


def test_a_lexicon_has_the_items_in_the_indexs_order_and_their_whole_text(parts, catalog):
    tokenizer = parts[0].tokenizer
    texts = ["drill " * 200 if row == 7 else f"text {row}" if row % 2 else "" for row in range(50)]
    described = dataclasses.replace(catalog, brands=["Acme"] * 50, texts=texts)
    order = np.random.default_rng(0).permutation(50)[:40]  # whatever the index holds
    counted = np.arange(50) < 30
    lexicon = build_lexicon(described, order, tokenizer, counted)
    held = [set(tokenizer.encode_batch([text], 128)[0].tolist()) for text in item_text(described)]
    ends = lexicon.item_offsets.tolist()
    assert [set(lexicon.item_tokens[start:end].tolist()) for start, end in itertools.pairwise(ends)] == [held[row] for row in order]
    for word in ("Acme", "shop", "text", "red"):  # brand, category, description, title
        tokens = tokenizer.encode_batch([word], 8)[0].tolist()
        assert any(set(tokens) <= held[row] for row in order)
    assert len(lexicon.token_idf) == tokenizer.vocab_size
    known = [row for row in order if counted[row]]
    for token in range(tokenizer.vocab_size):
        frequency = sum(token in held[row] for row in known)
        expected = np.log(1 + (len(known) - frequency + 0.5) / (frequency + 0.5)) if frequency else 0.0
        assert float(lexicon.token_idf[token]) == pytest.approx(expected, abs=1e-6)


def test_a_lexicon_reads_no_more_of_a_text_than_its_first_tokens(parts, catalog):
    tokenizer = parts[0].tokenizer
    (last,) = tokenizer.encode_batch(["faucet"], 8)[0].tolist()
    for filler, kept in ((10, True), (200, False)):
        described = dataclasses.replace(catalog, texts=["a " * filler + "faucet"] + [""] * 49)
        first = build_lexicon(described, np.array([0]), tokenizer, np.ones(50, dtype=bool))
        assert (last in first.item_tokens.tolist()) == kept


def test_a_decoder_is_built_with_the_lexicon_that_it_is_given(parts, table, encoder, lexicon):
    tokenizer = parts[0].tokenizer
    model = build_decoder(CONFIG, tokenizer, table, encoder.dim, lexicon)
    assert (model.config.guide_lexical, model.config.guide_items, model.config.guide_entries) == (4.0, 50, len(lexicon.item_tokens))
    assert all(torch.equal(getattr(model.guidance, name), part) for name, part in zip(Lexicon._fields, lexicon, strict=True))
    for change in ({"guide_lexical": 0.0}, {"guided": False}, {"guided": False, "soft_prompt": False}):
        without = build_decoder(dataclasses.replace(CONFIG, **change), tokenizer, table, encoder.dim, lexicon)
        assert (without.config.guide_lexical, without.config.guide_items, without.config.guide_entries) == (0.0, 0, 0)
        assert (without.guidance is None) == ("guided" in change)
    assert build_decoder(CONFIG, tokenizer, table, encoder.dim).config.guide_lexical == 0.0


def test_guidance_is_part_of_the_settings(table):
    assert (GeneratorConfig().support, dataclasses.replace(CONFIG, guided=False).support) == ("trie", "level")
    assert CONFIG.decoder_config(600, table, 16).guide_sharpness == 20.0
    assert dataclasses.replace(CONFIG, guided=False).decoder_config(600, table, 16).guide_sharpness == 0.0
    with pytest.raises(ConfigError, match="guided: needs the query vectors that soft_prompt=true brings; set guided=false too"):
        apply_overrides(GeneratorConfig(), ["soft_prompt=false"])
    assert not apply_overrides(GeneratorConfig(), ["soft_prompt=false", "guided=false"]).guided
    with pytest.raises(ConfigError, match=r"guide_sharpness: must be positive, got 0\.0; guided=false switches guidance off"):
        apply_overrides(GeneratorConfig(), ["guide_sharpness=0.0"])
    with pytest.raises(ConfigError, match="guide_sharpness: has no effect with guided=false; leave it out"):
        apply_overrides(GeneratorConfig(), ["guide_sharpness=10.0", "guided=false"])
    assert apply_overrides(GeneratorConfig(), ["guide_sharpness=10.0"]).guide_sharpness == 10.0
    with pytest.raises(ConfigError, match=r"2 \* guide_sharpness \+ guide_lexical must be at most 69, by which .* got 33\.0 and 4\.0"):
        apply_overrides(GeneratorConfig(), ["guide_sharpness=33.0"])
    assert apply_overrides(GeneratorConfig(), ["guide_sharpness=32.5"]).guide_sharpness == 32.5
    for setting in ("query_vector_drop=0.2", "soft_prompt_tokens=2"):
        with pytest.raises(ConfigError, match=f"{setting.split('=')[0]}: has no effect with soft_prompt=false; leave it out"):
            apply_overrides(GeneratorConfig(), ["guided=false", "soft_prompt=false", setting])
        assert apply_overrides(GeneratorConfig(), ["guided=false", setting]) != GeneratorConfig(guided=False)
    assert dataclasses.replace(CONFIG, guide_feedback=0.2).decoder_config(600, table, 16).guide_feedback == 0.2
    with pytest.raises(ConfigError, match=r"guide_stemmer: expected one of .*english.*, or none, got 'klingon'"):
        apply_overrides(GeneratorConfig(), ["guide_stemmer=klingon"])
    for switch in ("guided=false", "guide_lexical=0.0"):
        for setting in ("guide_stemmer=english", "guide_weight_steps=5"):
            with pytest.raises(ConfigError, match=f"{setting.split('=')[0]}: has no effect with guide"):
                apply_overrides(GeneratorConfig(), [setting, switch])
    with pytest.raises(ConfigError, match="guide_weight_steps: must not be negative, got -1"):
        apply_overrides(GeneratorConfig(), ["guide_weight_steps=-1"])
    with pytest.raises(ConfigError, match=r"guide_feedback: must not be negative, got -0\.1"):
        apply_overrides(GeneratorConfig(), ["guide_feedback=-0.1"])
    with pytest.raises(ConfigError, match="guide_feedback: has no effect with guided=false; leave it out"):
        apply_overrides(GeneratorConfig(), ["guide_feedback=0.2", "guided=false"])
    with pytest.raises(ConfigError, match=r"guide_lexical: must not be negative, got -1\.0"):
        apply_overrides(GeneratorConfig(), ["guide_lexical=-1.0"])
    with pytest.raises(ConfigError, match="guide_lexical: has no effect with guided=false; leave it out"):
        apply_overrides(GeneratorConfig(), ["guide_lexical=0.0", "guided=false"])
    assert apply_overrides(GeneratorConfig(), ["guide_lexical=0.0"]).guide_lexical == 0.0
    assert (GeneratorConfig().guide_lexical, apply_overrides(GeneratorConfig(), ["guided=false"]).guided) == (4.0, False)


def test_a_stage_chooses_a_weight_for_a_guided_decoder_alone(config, trained, parts, requests, table, trie, encoder):
    builder, _ = parts
    retriever = Retriever(trained, builder, trie, SidIndex.build(table.item_sid, 50, np.zeros(50)), table, encoder, support=config.support)
    validation = Validation.build(builder, requests.take(range(40, 60)), 20, table, encoder)
    for stage in ("stage1", "stage2", "stage3"):
        entry = _validate(trained, retriever, validation, stage=stage)
        assert json.loads(json.dumps(entry)) == entry  # it goes into training.json
        weight = entry.get("decoder_weight", 1.0)
        with weighted_decoder(trained, weight):
            measured = validation.measure(trained, builder, trie, personalised=stage == "stage3", support=config.support)
        assert entry["validation"] == measured
        if not config.guided or stage == "stage1":  # stage 1 is never served
            assert set(entry) == {"validation"}
        else:
            assert set(entry) == {"decoder_weight", "validation_recall_by_weight", "validation"}
            recalls = entry["validation_recall_by_weight"]
            assert list(recalls) == ["1", "0.75", "0.5", "0.25"]
            assert recalls[f"{weight:g}"] == max(recalls.values())


def prompts_of(examples: ExampleSet) -> list[list[int]]:
    return [examples.bank.ids[start:end].tolist() for start, end in itertools.pairwise(examples.bank.offsets)]


def test_query_targets_are_all_clicked_sids_weighted_by_feedback(catalog, table, encoder, parts, make_requests):
    # "bracket": item 3 clicked twice, item 4 bought once (weight 2). "Bracket " is the same query.
    requests = make_requests(["bracket", "Bracket "], [[3], [3, 4]], purchased=[[], [4]])
    config = dataclasses.replace(CONFIG, stage2_item_fraction=0.0, corrupted_query_fraction=0.0)
    _, stage2, stage3 = build_training_data(config, catalog, requests, table, parts[0], encoder).stages
    assert len({tuple(prompt) for prompt in prompts_of(stage2)}) == 1
    for start, end in itertools.pairwise(stage2.target_offsets):
        assert dict(zip(stage2.target_sids[start:end].tolist(), stage2.target_weights[start:end].tolist(), strict=True)) == {3: 2.0, 4: 2.0}
    assert stage3 is None  # no gender, age or history anywhere


def test_a_training_query_stands_beside_the_vector_of_a_half_seen_copy(catalog, table, encoder, parts, make_requests):
    query = "red bracket with two holes"
    whole = encoder.encode_queries([query]).astype(np.float16)

    def stage2(drop: float) -> tuple[ExampleSet, np.ndarray]:
        config = dataclasses.replace(CONFIG, stage2_item_fraction=0.0, corrupted_query_fraction=0.0, query_vector_drop=drop)
        data = build_training_data(config, catalog, make_requests([query], [[0]]), table, parts[0], encoder)
        return data.stages[1], data.vectors[data.stages[1].vector_rows]

    plain, vectors = stage2(0.0)
    assert (vectors == whole).all()
    half, seen = stage2(0.6)
    assert not (seen == whole).all()
    assert {tuple(prompt) for prompt in prompts_of(half)} == {tuple(prompt) for prompt in prompts_of(plain)}  # the text itself is whole
    assert set(half.target_sids.tolist()) == {0}


def test_stage_one_knows_titles_corruptions_and_short_texts(parts, catalog, table):
    builder, data = parts
    stage1 = data.stages[0]
    first = stage1.bank.ids[stage1.bank.offsets[:-1]]
    shares = [stage1.weights[first == marker].sum() for marker in (builder.tokenizer.item_id, builder.tokenizer.query_id)]
    assert shares == pytest.approx([0.6, 0.4])
    assert set(stage1.target_sids.tolist()) == set(range(50))


def test_stage_three_copies_forget_clicks_but_keep_the_order(parts, catalog, table, encoder, make_requests):
    builder, _ = parts
    asked = make_requests(["lamp"], [[7]], history=[[1, 2]], genders=["f"])
    config = dataclasses.replace(CONFIG, stage3_query_fraction=0.0, corrupted_query_fraction=0.0)
    _, _, stage3 = build_training_data(config, catalog, asked, table, builder, encoder).stages
    kept = []
    for prompt in prompts_of(stage3):
        start = prompt.index(builder.tokenizer.history_id) + 1 if builder.tokenizer.history_id in prompt else 0
        kept.append([token - builder.level_offsets[1] for token in prompt[start + 1 : prompt.index(builder.tokenizer.query_id) : 3]] if start else [])
    assert kept[0] == [1, 2]
    assert all(one in ([1, 2], [1], [2], []) for one in kept)
    assert set(stage3.target_sids.tolist()) == {7}


def test_items_first_seen_after_the_split_teach_nothing(catalog, requests, table, encoder, parts):
    seen = np.full(50, np.datetime64(0, "us"))
    seen[49] = np.datetime64(10_000, "us")
    later = dataclasses.replace(catalog, first_seen=seen)
    assert known_at_split(later, requests).tolist() == [True] * 49 + [False]
    stage1 = build_training_data(CONFIG, later, requests, table, parts[0], encoder).stages[0]
    assert set(stage1.target_sids.tolist()) == set(range(49))
    assert known_at_split(catalog, requests).all()
    vectors = encoder.encode_items(catalog.titles)
    builder = make_prompt_builder(CONFIG, parts[0].tokenizer, (0, 5, 15), table, vectors, known_at_split(later, requests))
    for code, rows in ((3, slice(30, 40)), (4, slice(40, 49))):  # item 49 is of kind 4
        mean = vectors[rows].mean(axis=0)
        np.testing.assert_allclose(builder.level1_centroids[code], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-6)


def test_queries_are_corrected_by_known_items_words_alone_but_all_items_words_are_right(catalog, requests):
    titles = [*catalog.titles[:47], "lantern", "lantern", "lantern"]
    renamed = dataclasses.replace(catalog, titles=titles)
    correcting = dataclasses.replace(CONFIG, correct_spelling=True)
    everything = make_spelling(correcting, renamed, requests, np.ones(50, dtype=bool))
    assert everything.corrected("fauset lanterm lantern") == "faucet lantern lantern"
    split = make_spelling(correcting, renamed, requests, np.arange(50) < 47)
    assert split.corrected("fauset lanterm lantern") == "faucet lanterm lantern"
    assert make_spelling(CONFIG, catalog, requests, np.ones(50, dtype=bool)) is None
    said = dataclasses.replace(requests, queries=[f"fauset {row % 5}" for row in range(len(requests.queries))])
    assert make_spelling(correcting, catalog, said, np.ones(50, dtype=bool)).corrected("fauset drlil") == "fauset drill"


def test_token_weights_are_learnt_from_clicks_on_what_the_index_publishes(catalog, requests, parts):
    builder = parts[0]
    order = np.r_[49:24:-1, 0:24]  # not in the catalogue's order, and without item 24
    index = SidIndex.build(np.argsort(np.r_[order, 24]), 50, np.zeros(50))
    index = dataclasses.replace(index, offsets=np.minimum(index.offsets, 49), item_rows=index.item_rows[:49])
    assert index.item_rows.tolist() == order.tolist()
    lexicon = build_lexicon(catalog, index.item_rows, builder.tokenizer, np.ones(50, dtype=bool))
    config = dataclasses.replace(CONFIG, guide_weight_steps=3)
    found = learnt_lexicon(config, lexicon, builder, requests, index)
    pairs = [
        (owner, order.tolist().index(row), 2.0 if row in bought else 1.0)
        for owner, (clicked, bought) in enumerate(zip(requests.clicked, requests.purchased, strict=True))
        for row in clicked.tolist()
        if row != 24
    ]
    owners, places, weights = (np.array(column) for column in zip(*pairs, strict=True))
    wanted = learn_token_weights(lexicon, builder.query_bank(requests.queries), owners, places, weights, steps=3, seed=CONFIG.seed)
    assert torch.equal(found.token_idf, wanted.token_idf)
    assert not torch.equal(found.token_idf, lexicon.token_idf)
    assert torch.equal(found.item_tokens, lexicon.item_tokens)


def test_no_text_is_encoded_that_no_example_reads(parts):
    _, data = parts
    read = np.unique(np.concatenate([stage.vector_rows for stage in data.stages]))
    assert read.tolist() == list(range(len(data.vectors)))


def test_the_same_inputs_give_the_same_examples(parts, catalog, requests, table, encoder):
    builder, data = parts
    again = build_training_data(CONFIG, catalog, requests, table, builder, encoder)
    for one, other in zip(data.stages, again.stages, strict=True):
        assert np.array_equal(one.bank.ids, other.bank.ids)
        assert np.array_equal(one.vector_rows, other.vector_rows)


def test_a_log_without_clicks_is_refused(catalog, table, encoder, parts, make_requests):
    with pytest.raises(NothingToLearnError, match="none has a clicked or purchased item"):
        build_training_data(CONFIG, catalog, make_requests(["bracket"], [[]]), table, parts[0], encoder)


def test_each_stage_has_its_own_warm_up_and_cosine():
    stages = [StageConfig(steps=10, batch_size=1, learning_rate=1.0, warmup_steps=2), StageConfig(steps=5, batch_size=1, learning_rate=0.5, warmup_steps=1)]
    rate = learning_rate_schedule(stages)
    assert [rate(0), rate(1), rate(2)] == pytest.approx([0.5, 1.0, 1.0])
    assert rate(9) < 0.2
    assert rate(10) == pytest.approx(0.5)
    assert rate(14) < 0.2


def test_impossible_settings_are_named():
    with pytest.raises(ConfigError, match="stage2_item_fraction: must be below 1") as caught:
        apply_overrides(GeneratorConfig(), ["stage2_item_fraction=1.0", "stage1.steps=0", "num_heads=3", "targets_per_query=0"])
    message = str(caught.value)
    for part in ("stage1.steps: must be at least 1", "num_heads: must be a multiple", "targets_per_query: must be at least 1"):
        assert part in message
    with pytest.raises(ConfigError, match=r"(?s)weight_decay: must not be negative, got -0\.1.*gradient_clipping: must be positive, got 0\.0") as caught:
        apply_overrides(GeneratorConfig(), ["weight_decay=-0.1", "gradient_clipping=0", "stage2.learning_rate=0", "stage3.warmup_steps=-1"])
    for part in ("stage2.learning_rate: must be positive, got 0.0", "stage3.warmup_steps: must not be negative, got -1"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="hidden_size: has no effect with base_model"):
        apply_overrides(GeneratorConfig(), ["base_model=/models/qwen", "hidden_size=64"])


def test_training_can_start_from_a_text_model(tmp_path, catalog, requests, table, encoder, parts):
    text_model = Decoder(dataclasses.replace(CONFIG.decoder_config(700, None, 0), max_positions=128), seed=1)
    text_model.save_pretrained(tmp_path)
    parts[0].tokenizer.save(tmp_path / "tokenizer.json")
    config = GeneratorConfig(base_model=str(tmp_path))
    tokenizer = train_tokenizer(config, catalog, requests)
    lexicon = build_lexicon(catalog, np.arange(50), tokenizer, np.ones(50, dtype=bool))
    model = build_decoder(config, tokenizer, table, encoder.dim, lexicon)
    assert model.config.alphabet_sizes == (5, 10, 2)
    assert model.config.text_vocab_size == 700
    assert model.config.soft_prompt_dim == encoder.dim
    assert (model.config.guide_sharpness, model.config.guide_lexical, model.config.guide_items) == (20.0, 4.0, 50)
    assert model.guidance.token_idf.tolist() == lexicon.token_idf.tolist() + [0.0] * (700 - tokenizer.vocab_size)
    assert torch.equal(model.guidance.item_tokens, lexicon.item_tokens)
    assert build_decoder(dataclasses.replace(config, guided=False), tokenizer, table, encoder.dim).guidance is None
    assert torch.equal(model.tokens.text, text_model.tokens.text)
