"""Stage 4 of the generator: EG-GRPO with a pool of rollout actors, a reward actor and a learner on Ray Train and DeepSpeed.

Source: EG-GRPO (arXiv:2605.14434, section 3.4). The
driver owns the actors; only their names enter the loop's configuration. Rank 0 hands out requests and shares rollouts and rewards with the
other ranks, so all of them see the same health and stop together.

With `max_staleness` 0 a step's groups come from the weights it updates. With s > 0 the groups of s more steps are under way meanwhile, made by
weights up to s steps older, for which the clipped ratio corrects. None is older, so none has to be dropped: a step's groups are asked for at most s steps
ahead, and a call that is made again, of an actor that died, carries the weights it had.

Update, rollouts and reference all compute in float32, on GPUs too, where supervised training uses bfloat16: log-probabilities of one policy
must not differ by who worked them out, and steps of 1e-6 are lost in bfloat16 weights.

Shapes: B requests of a step, G answers per request, T anchors.
"""

from __future__ import annotations

import genrecall.ray_environment  # noqa: F401 - before Ray

import dataclasses
import functools
import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from genrecall.config import from_dict, to_dict
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.device import default_device
from genrecall.encoders.text_encoder import load_encoder
from genrecall.generator.examples import PromptBuilder
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import pack
from genrecall.generator.prompts import Prompts
from genrecall.local_ray import ensure_ray
from genrecall.rl.align_config import AlignConfig, AlignError, check_cluster
from genrecall.rl.experience import Experience, Experiences, reward_actor, rollout_actors, shared
from genrecall.rl.experts import counter_uniforms, draw_weighted, tier_weights
from genrecall.rl.feedback import Feedback, build_feedback
from genrecall.rl.learner import RequestPrompts, alignment_loss, draw_requests, frequent_queries, rollout_health, valid_mass
from genrecall.rl.policy_loss import decayed_expert_weight
from genrecall.rl.rollout import START_STAGE, weights_of
from genrecall.rl.stop_rules import StopRules
from genrecall.sid.index import load_sid_table, load_trie
from genrecall.sid.trie import Trie
from genrecall.storage import Artifact, Stage, open_artifact
from genrecall.tracking import MetricLog
from genrecall.train_worker import TrainSettings, TrainWorker, cosine_schedule, fit

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 3
_SHOWN_FIRST = ("reward", "hit_rate", "valid_rate", "unique_sids", "kl", "entropy_1", "zero_spread", "clip_fraction")
_GOOD_WEIGHTS = "good_weights.safetensors"  # in a checkpoint: what a stop rule goes back to
_ANCHOR_STREAM = 0xA9C4_0125
_MASS_REQUESTS = 8  # of each rank, that `valid_mass` is estimated on
_CHECKPOINT_SHARE = 0.05  # of the time: a step costs far more than one of supervised training, so that a checkpoint follows most of them


def align_generator(
    config: AlignConfig,
    *,
    dataset: Artifact,
    encoder: Artifact,
    sid_index: Artifact,
    generator: Artifact,
    ranker: Artifact | None,
    uri: str,
    train: TrainSettings,
    force: bool = False,
) -> Artifact:
    """Align a generator with feedback and ranking and write the `aligned` artifact: `stage4/`, `health.parquet`, `training.json`.

    A run that breaks a stop rule ends early, keeps the weights of its last healthy step and says so in `training.json`. An
    interrupted run goes on from its last checkpoint.

    Args:
        ranker: needed where the reward's mode is "ranker" or "mixed" and names none of the registry, else left out of the artifact's parents.
        train: spread of the learner; it gets one CPU per worker, since rollouts and reward need the others.

    Raises:
        AlignError: no ranker where one is needed, no request with feedback, or a cluster that is too small.
        RankerError: the registry has no such ranker, or it needs more trust than was given.
        TrainingError: the learner failed more often than allowed.
        ActorPoolError: an actor cannot be kept alive.
    """
    if config.reward.ranker_uri is not None:
        config, ranker = _with_pinned_ranker(config, train), None
    elif config.reward.needs_ranker and ranker is None:
        raise AlignError(
            f"reward.mode={config.reward.mode!r} needs a ranker artifact; run jobs/train_ranker.py, name one of the registry with align.reward.ranker_uri "
            "or set align.reward.mode=feedback"
        )
    parents = {"dataset": dataset, "encoder": encoder, "sid_index": sid_index, "generator": generator}
    if config.reward.needs_ranker and ranker is not None:
        parents["ranker"] = ranker
    stage = Stage(kind="aligned", uri=uri, config=config, algorithm_version=ALGORITHM_VERSION, parents=parents, seed=config.seed, job="align_generator")
    if done := stage.current(force=force):
        return done
    train = dataclasses.replace(train, cpus_per_worker=1)
    ensure_ray()
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    check_cluster(config, train, cluster)
    prefix = f"genrecall-align-{uuid.uuid4().hex[:8]}"
    loop_config: dict[str, Any] = {
        "config": to_dict(config),
        **{name: parent.uri for name, parent in parents.items()},
        "namespace": ray.get_runtime_context().namespace,
        "rollout_names": [f"{prefix}-rollout-{number}" for number in range(config.rollout_actors)],
        "reward_name": f"{prefix}-reward",
        "tracking_uri": train.tracking_uri,
    }
    actors = [*rollout_actors(config, loop_config), reward_actor(config, loop_config)]
    try:
        for actor in actors:  # they start up while the learner does
            _ = actor.handle
        exported = fit(align_loop, loop_config, name="align_generator", stage=stage, train=train)
    finally:
        for actor in actors:
            actor.kill()
    with stage.write(num_workers=train.num_workers) as draft:
        shutil.copytree(exported, draft.path, dirs_exist_ok=True)
        facts = json.loads((draft.path / "training.json").read_text())
        draft.row_counts["steps"] = int(facts["steps_run"])
    MetricLog(train.tracking_uri, train.tracking_run_id).tag(tags_of(facts))
    return stage.open()


def tags_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """What MLflow's run is told of how an alignment ended, given its `training.json`."""
    words = {"least": "at least", "most": "at most"}
    return {
        "alignment.stopped": facts["stopped"] or "no",
        "alignment.broken_rules": ", ".join(facts["broken_rules"]) or "none",
        "alignment.steps_run": str(facts["steps_run"]),
        "alignment.kept_step": str(facts["kept_step"]),
        **{f"alignment.limit.{metric}": f"{words[one['at']]} {one['limit']:.6g}" for metric, one in facts["stop_limits"].items()},
    }


def _with_pinned_ranker(config: AlignConfig, train: TrainSettings) -> AlignConfig:
    """The config with its registry ranker as a version in place of an alias, so that the artifact's identity says which one it was."""
    from genrecall.ranking.registered_ranker import pinned_ranker  # MLflow's models are slow to import, and most runs name none

    reward = config.reward
    assert reward.ranker_uri is not None
    pinned = pinned_ranker(reward.ranker_uri, tracking_uri=train.tracking_uri, trust_pyfunc=reward.trust_pyfunc, trust_pickles=reward.trust_pickles)
    return dataclasses.replace(config, reward=dataclasses.replace(reward, ranker_uri=pinned))


def align_loop(loop_config: dict[str, Any]) -> None:
    """The learner's worker: experience, update, health, stop rules, checkpoints."""
    config = from_dict(AlignConfig, loop_config["config"])
    dataset, encoder_artifact, sid_index, generator = (open_artifact(loop_config[name]) for name in ("dataset", "encoder", "sid_index", "generator"))
    catalog = load_catalog(dataset)
    requests = load_requests(dataset, "train", catalog)
    table = load_sid_table(sid_index.path)
    feedback = build_feedback(requests, table.item_sid, len(table))
    eligible = feedback.with_feedback()
    if not len(eligible):
        raise AlignError(f"{dataset.uri}: no training request has an exposed or clicked item with a SID, so there is no feedback to learn from")
    encoder = load_encoder(encoder_artifact.path)
    prompts = RequestPrompts(PromptBuilder.load(generator.path), table, encoder, requests, vector_drop=config.query_vector_drop, seed=config.seed)
    head = frequent_queries(requests.queries)
    stage_folder = generator.file(START_STAGE)
    model, reference = Decoder.from_pretrained(stage_folder), Decoder.from_pretrained(stage_folder).eval()
    trie = load_trie(sid_index.path, default_device()) if config.support == "trie" else None
    updates = config.steps * config.updates_per_rollout
    worker = TrainWorker(
        model.eval(),
        functools.partial(alignment_loss, objective=config.objective, support=config.support, trie=trie),
        learning_rate=cosine_schedule(config.learning_rate, warmup_steps=config.warmup_steps, total_steps=updates),
        weight_decay=config.weight_decay,
        gradient_clipping=config.gradient_clipping,
        total_steps=updates,
        loop_config=loop_config,
        dtype=torch.float32,  # as rollouts and reference compute: in bfloat16 the ratio of the same weights would not be 1
    )
    reference = pack(reference.to(worker.device))
    batch = _batch_size(config, len(eligible), worker.world_size, quiet=worker.rank > 0)
    kept: dict[str, NDArray[np.float32]] = {}
    state = worker.resume(lambda folder: kept.update(load_file(folder / _GOOD_WEIGHTS)))
    first, finished = int(state.get("rollout_step", 0)), bool(state.get("finished"))
    rules = StopRules(config.stop, **state.get("rules", {}))
    health: list[dict[str, float]] = list(state.get("health", []))
    good_step, good_weights = int(state.get("good_step", first)), kept or weights_of(model)  # of the last version whose own samples were healthy
    replaced_before = int(health[-1]["replaced_actors"]) if health else 0
    restarts = int(state.get("restarts", -1)) + 1
    experiences = Experiences(config, loop_config, prompts, feedback) if worker.rank == 0 else None
    update = functools.partial(_update, config, worker, reference, trie, prompts, feedback, table.tokens)
    reason: str | None = state.get("stopped")
    started, step = time.monotonic(), first - 1

    def progress() -> dict[str, Any]:
        return {"rollout_step": step + 1, "good_step": good_step, "restarts": restarts, "rules": rules.state(), "health": health}

    for step in range(first, first if finished else config.steps):
        experience, weights = None, weights_of(model)
        if experiences is not None:
            experiences.publish(step, weights)
            while experiences.submitted <= min(config.max_staleness, config.steps - 1 - step):
                ahead = step + experiences.submitted
                experiences.submit(ahead, draw_requests(eligible, seed=config.seed, step=ahead, count=batch))
            experience = experiences.collect()
        if worker.world_size > 1:
            experience = shared(experience, batch=batch, group=config.group_size, device=worker.device)
        assert experience is not None
        updating = time.monotonic()
        parts = update(step, experience)
        sampled = rollout_health(experience.rollout, experience.rewards, head[experience.rollout.request_rows])
        if config.support == "level":  # sampled without the trie
            parts["valid_mass"] = sampled["valid_rate"]
        row = {
            "step": float(step),
            **sampled,
            **parts,
            "staleness": float(step - experience.rollout.version),
            "replaced_actors": float(replaced_before + experience.replaced),
            "seconds_experience": experience.seconds,
            "seconds_update": time.monotonic() - updating,
        }
        health.append(row)
        worker.log((step + 1) * config.updates_per_rollout - 1, {name: row[name] for name in sorted(row, key=_by_interest) if name != "step"})
        reason = rules.observe(row)
        if reason:
            if worker.rank == 0:
                logger.warning("align_generator: stopped at step %d: %s; keeping the weights after %d steps", step + 1, reason, good_step)
            break
        if rules.healthy:
            good_step, good_weights = step, weights
            if worker.checkpoint_due(step, max_share=_CHECKPOINT_SHARE):
                worker.save({"step": (step + 1) * config.updates_per_rollout, **progress()}, functools.partial(_write_good_weights, good_weights))
    if reason is None and rules.healthy:
        good_step, good_weights = config.steps, weights_of(model)
    elif reason is None:
        reason = "the last steps broke a stop rule: " + ", ".join(rules.broken)

    def export(folder: Path) -> None:
        _load(model, good_weights)
        model.save_pretrained(folder / "stage4")
        pq.write_table(pa.Table.from_pylist(health), folder / "health.parquet")
        facts = {
            "support": config.support,
            "steps_run": step + 1,
            "kept_step": good_step,
            "stopped": reason,
            "broken_rules": rules.broken,
            "stop_limits": {metric: {"limit": limit, "at": bound} for metric, (bound, limit) in rules.limits().items()},
            "seconds": round(time.monotonic() - started, 1),
            "replaced_actors": int(health[-1]["replaced_actors"]),
            "restarts": restarts,  # from a checkpoint
            "first": _mean_of(health[:5]),
            "last": _mean_of(health[-5:]),
        }
        (folder / "training.json").write_text(json.dumps(facts, indent=2))

    worker.finish(
        export,
        {f"final_{name}": value for name, value in _mean_of(health[-5:]).items() if np.isfinite(value)},
        state={**progress(), "finished": True, "stopped": reason},
        write=functools.partial(_write_good_weights, good_weights),
    )


def _update(
    config: AlignConfig,
    worker: TrainWorker,
    reference: Decoder,
    trie: Trie | None,
    prompts: RequestPrompts,
    feedback: Feedback,
    sid_tokens: NDArray[np.int32],
    step: int,
    experience: Experience,
) -> dict[str, float]:
    """Optimizer steps on this rank's share of a step's groups; the loss's parts, averaged over the ranks."""
    rollout, device = experience.rollout, worker.device
    mine = np.arange(worker.rank, len(rollout.request_rows), worker.world_size)
    rows = rollout.request_rows[mine]
    asked = prompts.of(rows).to(device)
    answers = torch.tensor(rollout.tokens[mine], dtype=torch.int64, device=device)
    experts = torch.tensor(rollout.experts[mine], device=device)
    levels = _reference_levels(reference, asked, answers, config, trie)
    anchors: tuple[Tensor, ...] = ()
    if config.objective.sft_anchor_weight:
        anchor_tokens, present = _anchors(config, feedback, sid_tokens, step, rows)
        answers = torch.cat((answers, anchor_tokens.to(device)), dim=1)
        anchors = (present.to(device),)
    weight = decayed_expert_weight(step, start=config.objective.expert_weight, decay_steps=config.objective.expert_decay_steps)
    batch = (
        asked.token_ids,
        asked.lengths,
        asked.soft,
        answers,
        torch.tensor(rollout.log_probs[mine], device=device),
        torch.tensor(experience.rewards.values[mine], device=device),
        experts,
        levels,
        torch.tensor(weight, device=device),
        *anchors,
    )
    means: dict[str, Tensor] = {}
    if config.support == "trie" and reference.guidance is None:
        few = slice(_MASS_REQUESTS)
        group = answers[few, : config.group_size]
        foreign = experts[few] | (group[..., 0] < 0)
        assert isinstance(worker.model, Decoder)
        means["valid_mass"] = valid_mass(worker.model, asked.take(few), group, foreign, [level[few] for level in levels])
    for _ in range(config.updates_per_rollout):
        loss, parts = worker.loss(*batch)
        worker.step(loss)
        means |= {name: means.get(name, torch.zeros((), device=device)) + value.float() / config.updates_per_rollout for name, value in parts.items()}
    values = torch.stack(list(means.values()))
    if worker.world_size > 1:
        torch.distributed.all_reduce(values)
        values /= worker.world_size
    return {**dict(zip(means, values.tolist(), strict=True)), "expert_weight": weight}


@torch.no_grad()
def _reference_levels(reference: Decoder, prompts: Prompts, answers: Tensor, config: AlignConfig, trie: Any) -> tuple[Tensor, Tensor, Tensor]:
    return group_log_probs(reference, prompts, answers, support=config.support, trie=trie, return_level_log_probs=True).levels


def _anchors(config: AlignConfig, feedback: Feedback, sid_tokens: NDArray[np.int32], step: int, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Different logged SIDs of each request for the anchor: tokens int64 [B, T, 3] and which are there, bool [B, T]."""
    chosen = np.full((len(rows), config.objective.sft_anchors), -1, dtype=np.int64)
    for place, row in enumerate(rows):
        sids, tiers = feedback.of(int(row))
        luck = counter_uniforms(config.seed ^ _ANCHOR_STREAM, step, np.array([row]), max(1, len(sids)))[0, : len(sids)]
        drawn = draw_weighted(sids, tier_weights(tiers, config.expert_draw), luck, count=chosen.shape[1])
        chosen[place, : len(drawn)] = drawn
    return torch.from_numpy(sid_tokens[np.maximum(chosen, 0)].astype(np.int64)), torch.from_numpy(chosen >= 0)


def _batch_size(config: AlignConfig, eligible: int, world_size: int, *, quiet: bool) -> int:
    """Requests of a step: as configured, or as many as there are; a multiple of the number of workers."""
    batch = min(config.requests_per_step, eligible) // world_size * world_size
    if batch == 0:
        raise AlignError(f"requests_per_step: {config.requests_per_step} of {eligible} requests with feedback cannot be split over {world_size} workers")
    if batch < config.requests_per_step and not quiet:
        logger.warning(
            "align_generator: %d requests a step in place of %d (%d requests with feedback, %d workers)", batch, config.requests_per_step, eligible, world_size
        )
    return batch


def _write_good_weights(weights: Mapping[str, NDArray[np.float32]], folder: Path) -> None:
    save_file(dict(weights), folder / _GOOD_WEIGHTS)


def _load(model: Decoder, weights: Mapping[str, NDArray[np.float32]]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))


def _by_interest(name: str) -> int:
    """Sort key that puts what a progress line shows first."""
    return _SHOWN_FIRST.index(name) if name in _SHOWN_FIRST else len(_SHOWN_FIRST)


def _mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each column of some steps' health; a column without any finite value is left out."""
    means = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if np.isfinite(row[name])]
        if values and name != "step":
            means[name] = float(np.mean(values))
    return means
