"""Supervised training of the generator: item -> SID, query -> SID, shopper + query -> SID, in one worker group.

Source: CQ-SID (arXiv:2605.14434), stages 1 to 3 of the generator. Deviations: the softmax is over one level's codes, not the
vocabulary, and with guidance over the children of a prefix, see `guidance.py`; stage 1 also sees cheap texts of an item (corrupted titles, a few title words, brand and type) and stage 2 goes on
seeing them, because real query logs cover few items; the frozen encoder's query vector stands in front as a soft prompt; a
query's or request's several SIDs are scored in one pass that shares the prompt. The loss of an example is the mean over its
sampled SIDs of -log p(SID | prompt); SIDs are sampled in proportion to graded feedback (a purchase weighs twice a click).

Shapes: B batch rows, T targets, N items, S SIDs, R requests, U distinct texts, d encoder dimensions.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from torch import Tensor

from genrecall.config import from_dict, to_dict
from genrecall.data.catalog import Catalog, load_catalog
from genrecall.data.interactions import Requests, known_at_split, load_requests, query_item_pairs
from genrecall.device import default_device
from genrecall.encoders.embed import item_text
from genrecall.encoders.text_encoder import load_encoder
from genrecall.generator.calibration import choose_decoder_weight, weighted_decoder
from genrecall.generator.examples import Batches, PromptBuilder
from genrecall.generator.generator_config import GeneratorConfig, StageConfig
from genrecall.generator.lexicon import Lexicon, build_lexicon
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.prompts import Prompts
from genrecall.generator.retriever import Retriever
from genrecall.generator.spelling import SpellingCorrector
from genrecall.generator.token_weights import learn_token_weights
from genrecall.generator.tokenizer import QueryTokenizer
from genrecall.generator.training_data import Validation, build_training_data, make_prompt_builder
from genrecall.sid.index import SidIndex, load_index, load_sid_table, load_trie
from genrecall.sid.semantic_id import SidTable
from genrecall.sid.trie import Trie
from genrecall.storage import Artifact, Stage, open_artifact
from genrecall.train_worker import TrainSettings, TrainWorker, cosine_schedule, fit

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 4
STAGES = ("stage1", "stage2", "stage3")


def train_tokenizer(config: GeneratorConfig, catalog: Catalog, requests: Requests) -> QueryTokenizer:
    """The text vocabulary, from the catalogue and the training requests (or `base_model`'s with our markers)."""
    if config.base_model is not None:
        return QueryTokenizer.from_pretrained(Path(config.base_model), genders=requests.genders, age_bands=requests.age_bands)
    rows = np.flatnonzero(known_at_split(catalog, requests))
    names = {name for row in rows for name in (catalog.brands[row], *catalog.category_paths[row])}
    texts = [*(catalog.titles[row] for row in rows), *names, *requests.queries]
    return QueryTokenizer.train(texts, config.vocab_size, genders=requests.genders, age_bands=requests.age_bands)


def build_decoder(config: GeneratorConfig, tokenizer: QueryTokenizer, table: SidTable, soft_prompt_dim: int, lexicon: Lexicon | None = None) -> Decoder:
    """A fresh decoder, or the base model with rows for the SIDs.

    Raises:
        ValueError: the base model's embedding has no room for the markers.
    """
    if config.base_model is None:
        return _with_lexicon(Decoder(config.decoder_config(tokenizer.vocab_size, table, soft_prompt_dim, lexicon), seed=config.seed), lexicon)
    text_model = Decoder.from_pretrained(Path(config.base_model))
    if text_model.config.text_vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"base_model={config.base_model!r}: its embedding has {text_model.config.text_vocab_size} rows, tokenizer and markers need {tokenizer.vocab_size}; "
            "resize its embedding first"
        )
    extended = text_model.extend_for_sids(
        table.space.level_sizes,
        table.space.groups,
        soft_prompt_dim=soft_prompt_dim if config.soft_prompt else 0,
        soft_prompt_tokens=config.soft_prompt_tokens,
        guide=config.guide_config(lexicon),
        seed=config.seed,
    )
    return _with_lexicon(extended, lexicon)


def _with_lexicon(model: Decoder, lexicon: Lexicon | None) -> Decoder:
    if lexicon is not None and model.guidance is not None and model.config.guide_lexical:
        model.guidance.set_lexicon(lexicon)
    return model


def make_spelling(config: GeneratorConfig, catalog: Catalog, requests: Requests, known: np.ndarray) -> SpellingCorrector | None:
    """The corrector of a config, or None; nothing is corrected to words of items not in `known` bool [N], which are right all the same."""
    return SpellingCorrector.of_texts(item_text(catalog), known.tolist(), requests.queries) if config.correct_spelling else None


def learnt_lexicon(config: GeneratorConfig, lexicon: Lexicon, builder: PromptBuilder, requests: Requests, index: SidIndex) -> Lexicon:
    """The lexicon with weights learnt from the training requests' clicks on items that `index` publishes, in whose order the lexicon is."""
    place = np.full(index.num_items, -1, dtype=np.int64)
    place[index.item_rows] = np.arange(index.num_published)
    owners, rows, weights = query_item_pairs(requests)
    kept = place[rows] >= 0
    queries = builder.query_bank(requests.queries)
    return learn_token_weights(lexicon, queries, owners[kept], place[rows[kept]], weights[kept], steps=config.guide_weight_steps, seed=config.seed)


def sft_loss(
    model: Decoder, token_ids: Tensor, lengths: Tensor, soft: Tensor | None, targets: Tensor, *, support: Literal["level", "trie"], trie: Trie
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over examples and their targets of -log p(SID | prompt), natural log.

    Args:
        token_ids: int64 [B, L], lengths: int64 [B], soft: float32 [B, d] or None: see `Prompts`.
        targets: int64 [B, T, 3], SID tokens.
        support, trie: see `support.py`.

    Returns:
        The loss, a scalar, and its three parts by level.
    """
    log_probs = group_log_probs(model, Prompts(token_ids, lengths, soft), targets, support=support, trie=trie)
    by_level = -log_probs.mean(dim=(0, 1))
    return by_level.sum(), {f"loss_level{level + 1}": by_level[level] for level in range(3)}


def learning_rate_schedule(stages: Sequence[StageConfig]) -> Callable[[int], float]:
    """Each stage's own warm-up and cosine, one after the other."""
    ends = np.cumsum([stage.steps for stage in stages]).tolist()
    schedules = [cosine_schedule(stage.learning_rate, warmup_steps=min(stage.warmup_steps, stage.steps), total_steps=stage.steps) for stage in stages]

    def rate(step: int) -> float:
        at = min(int(np.searchsorted(ends, step, side="right")), len(stages) - 1)
        return schedules[at](step - (ends[at] - stages[at].steps))

    return rate


def _loop(loop_config: dict[str, Any]) -> None:
    """The worker: three stages, a folder of weights at the end of each."""
    config = from_dict(GeneratorConfig, loop_config["config"])
    dataset, encoder_artifact, sid_index = (open_artifact(loop_config[name]) for name in ("dataset", "encoder", "sid_index"))
    catalog = load_catalog(dataset)
    table = load_sid_table(sid_index.path)
    encoder = load_encoder(encoder_artifact.path)
    tokenizer = QueryTokenizer.from_json(loop_config["tokenizer"])
    index, requests = load_index(sid_index.path), load_requests(dataset, "train", catalog)
    known = known_at_split(catalog, requests)
    lexicon = build_lexicon(catalog, index.item_rows, tokenizer, known, config.guide_stemmer) if config.guided and config.guide_lexical else None
    model = build_decoder(config, tokenizer, table, encoder.dim, lexicon)
    item_vectors = np.load(encoder_artifact.file("item_embeddings.npy"), mmap_mode="r", allow_pickle=False)
    builder = make_prompt_builder(config, tokenizer, model.config.level_offsets, table, item_vectors, known, make_spelling(config, catalog, requests, known))
    if lexicon is not None and config.guide_weight_steps:
        assert model.guidance is not None, "there is a lexicon"
        model.guidance.set_lexicon(learnt_lexicon(config, lexicon, builder, requests, index))
    data = build_training_data(config, catalog, requests, table, builder, encoder)
    vectors = data.vectors if config.soft_prompt else None
    runs = [(name, stage, examples) for name, stage, examples in zip(STAGES, config.stages, data.stages, strict=True) if examples is not None]
    trie = load_trie(sid_index.path, default_device())
    worker = TrainWorker(
        model,
        functools.partial(sft_loss, support=config.support, trie=trie),
        learning_rate=learning_rate_schedule([stage for _, stage, _ in runs]),
        weight_decay=config.weight_decay,
        gradient_clipping=config.gradient_clipping,
        total_steps=sum(stage.steps for _, stage, _ in runs),
        loop_config=loop_config,
    )
    validation = (
        Validation.build(builder, load_requests(dataset, "validation", catalog), config.validation_requests, table, encoder) if worker.rank == 0 else None
    )
    retriever = Retriever(model, builder, trie, index, table, encoder, support=config.support)
    state = worker.resume()
    step, record = int(state.get("step", 0)), list(state.get("stages", []))
    begin = 0
    for name, stage, examples in runs:
        end = begin + stage.steps
        if step < end:
            batches = Batches(
                examples,
                batch_size=stage.batch_size,
                targets=1 if name == "stage1" else config.targets_per_query,
                seed=(config.seed, STAGES.index(name)),
                rank=worker.rank,
                world_size=worker.world_size,
            )
            started = time.monotonic()
            for at in range(max(step, begin), end):
                prompts, sids = batches.batch(at - begin, builder, vectors)
                prompts = prompts.to(worker.device)
                loss, parts = worker.loss(prompts.token_ids, prompts.lengths, prompts.soft, torch.from_numpy(data.sid_tokens[sids]).to(worker.device))
                worker.step(loss)
                worker.log(at, {f"{name}/loss": loss, **{f"{name}/{part}": value for part, value in parts.items()}})
                if worker.checkpoint_due(at) and at + 1 < end:
                    worker.save({"step": at + 1, "stages": record})
            step = end
            entry: dict[str, Any] = {"stage": name, "steps": stage.steps, "examples": len(examples), "seconds": round(time.monotonic() - started, 1)}
            entry |= {} if validation is None else _validate(model, retriever, validation, stage=name)
            measured = entry.get("validation", {})
            record.append(entry)
            worker.log(end - 1, {f"{name}/validation_{metric}": value for metric, value in measured.items()})
            if end < worker.total_steps:
                if worker.rank == 0:
                    with weighted_decoder(model, entry.get("decoder_weight", 1.0)):
                        _upload_stage(model, f"{loop_config['stages_uri']}/{name}")
                worker.save({"step": end, "stages": record})
        begin = end

    def export(folder: Path) -> None:
        for name, _, _ in runs[:-1]:
            _download_stage(f"{loop_config['stages_uri']}/{name}", folder / name)
        with weighted_decoder(model, record[-1].get("decoder_weight", 1.0)):
            model.save_pretrained(folder / runs[-1][0])
        builder.save(folder)
        (folder / "training.json").write_text(json.dumps({"support": config.support, "stages": record}, indent=2))

    final = record[-1].get("validation", {}) if record else {}
    worker.finish(export, {f"validation_{metric}": value for metric, value in final.items()}, state={"stages": record})


def _validate(model: Decoder, retriever: Retriever, validation: Validation, *, stage: str) -> dict[str, Any]:
    """What validation requests say of a finished stage: the weight of a guided decoder that may be served, and the metrics under it."""
    found: dict[str, Any] = {}
    personalised = stage == "stage3"
    if model.guidance is not None and stage != "stage1":
        weight, recalls = choose_decoder_weight(retriever, validation.requests, personalised=personalised)
        found = {"decoder_weight": weight, "validation_recall_by_weight": recalls}
    with weighted_decoder(model, found.get("decoder_weight", 1.0)):
        measured = validation.measure(model, retriever.prompt_builder, retriever.trie, personalised=personalised, support=retriever.support)
    return {**found, "validation": measured}


def train_generator(
    config: GeneratorConfig, *, dataset: Artifact, encoder: Artifact, sid_index: Artifact, uri: str, train: TrainSettings, force: bool = False
) -> Artifact:
    """Train the generator's stages 1 to 3 and write the `generator` artifact.

    Stage 3 is a copy of stage 2 where no training request has a gender, an age band or a history; `training.json` says so.

    Args:
        dataset, encoder, sid_index: artifacts made from one another.
        uri: where the artifact goes. train: workers and resources. force: train even if it is there.

    Raises:
        ConfigError: impossible settings. TrainingError: the workers failed. ValueError: nothing to learn from.
    """
    stage = Stage(
        kind="generator",
        uri=uri,
        config=config,
        algorithm_version=ALGORITHM_VERSION,
        parents={"dataset": dataset, "encoder": encoder, "sid_index": sid_index},
        seed=config.seed,
        job="train_generator",
    )
    if done := stage.current(force=force):
        return done
    catalog = load_catalog(dataset)
    tokenizer = train_tokenizer(config, catalog, load_requests(dataset, "train", catalog))
    loop_config = {
        "config": to_dict(config),
        "dataset": dataset.uri,
        "encoder": encoder.uri,
        "sid_index": sid_index.uri,
        "tokenizer": tokenizer.to_json(),
        "stages_uri": f"{stage.work_uri}/stages",
    }
    exported = fit(_loop, loop_config, name="train_generator", stage=stage, train=train)
    with stage.write(num_workers=train.num_workers) as draft:
        shutil.copytree(exported, draft.path, dirs_exist_ok=True)
        training = json.loads((draft.path / "training.json").read_text())
        if not (draft.path / "stage3").exists():
            reason = "no training request has a gender, an age band or a history: stage3 is a copy of stage2"
            logger.warning("train_generator: %s; the stage3 and max_history settings have no effect", reason)
            shutil.copytree(draft.path / "stage2", draft.path / "stage3")
            training["stages"].append(
                {"stage": "stage3", "steps": 0, "copy_of": "stage2", "reason": reason, "validation": training["stages"][-1].get("validation", {})}
            )
            (draft.path / "training.json").write_text(json.dumps(training, indent=2))
        draft.row_counts.update({f"{entry['stage']}_examples": int(entry.get("examples", 0)) for entry in training["stages"]})
    return stage.open()


def _upload_stage(model: Decoder, uri: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(Path(name))
        filesystem, root = fsspec.core.url_to_fs(uri)
        filesystem.makedirs(root, exist_ok=True)
        for file in sorted(path for path in Path(name).rglob("*") if path.is_file()):
            filesystem.put_file(str(file), f"{root}/{file.relative_to(name).as_posix()}")


def _download_stage(uri: str, folder: Path) -> None:
    filesystem, root = fsspec.core.url_to_fs(uri)
    folder.mkdir(parents=True)
    for file in filesystem.find(root):
        target = folder / str(file)[len(root.rstrip("/")) :].lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(file, str(target))
