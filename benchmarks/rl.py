"""What packed groups and shared prompts save in reinforcement learning, against Hugging Face `generate` and full sequences.

All sides run the same weights, prompts and thread count in one process, one after the other within each repeat. Ratios are what counts: each is the
median over repeats of the ratio within a repeat. A side whose numbers differ is not timed.

- sampling: `sample_group` (and the same on packed weights, see `packed_decoder.py`) against `generate(do_sample=True, num_return_sequences=G, prefix_allowed_tokens_fn=...)`.
  All draw from the softmax over a prefix's children, and the log-probabilities that `generate` reports are checked. Ours returns log-probabilities
  and SID rows as well; `generate` is asked for tokens only.
- update: forward and backward of `group_log_probs`, where a group shares its prompt, against one full sequence a sample through `transformers`. Both
  normalise over the level's columns; log-probabilities and gradients are checked. `transformers` computes the logits of the last positions only
  (`logits_to_keep`); what leaving that out costs stands beside.
- step: a whole EG-GRPO step (weights to the rollout worker, rollout with experts, rewards from a dictionary, advantages, clipped loss and KL to a reference,
  backward, clipping, AdamW) by the functions that the learner calls, against one in the style of TRL: `generate`, one sequence a sample,
  log-probabilities over the whole vocabulary (of the last positions only, as TRL asks for them; what leaving that out costs stands beside), the old ones
  those of the update itself. On the same answers and support both have the same loss and gradients, which is checked; in the timing ours scores the
  children of a prefix, its default. The parts of our step are timed by the same clock as the step.
- actors: rollouts per second against the number of rollout actors, see `rollout_actors.py`.

Run: python benchmarks/rl.py [--quick] [--parts sampling update step actors] [--threads 1 2] [--repeats 7] [--output benchmarks/results/rl.json]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from decode import Generate, sid_tokens
from decode import Task as DecodeTask
from measurement import clock, interleaved, ratios, run_recorded
from rollout_actors import compare_pools, pool_sizes
from torch import Tensor

from genrecall.generator.decoder_config import DecoderConfig
from genrecall.generator.group_sampling import GroupSamples, sample_group
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.generator.packed_decoder import pack
from genrecall.generator.prompts import Prompts
from genrecall.rl.advantage import group_advantages
from genrecall.rl.learner import ObjectiveConfig, alignment_loss
from genrecall.rl.policy_loss import clipped_objective, exact_kl, mean_over_samples
from genrecall.rl.rollout import RolloutConfig, RolloutTask, RolloutWorker, weights_of
from genrecall.sid.trie import Trie

TOLERANCE = 1e-4
LOGGED = 5  # SIDs with feedback a request: the first was clicked, the others were exposed
CLICKED, EXPOSED, VALID = 1.0, 0.5, 0.1
PARTS = ("sampling", "update", "step", "actors")
STEP_PARTS = ("weights", "rollout", "reference", "update", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Task:
    """The grid; the defaults are the full one, on the decoder of `decode.py`."""

    decoder: DecodeTask
    sample_groups: tuple[int, ...] = (16, 64)
    sample_batches: tuple[int, ...] = (1, 8)
    update_groups: tuple[int, ...] = (8, 16)
    update_batch: int = 4
    step_prompts: int = 16
    step_group: int = 8
    num_experts: int = 2
    actor_calls: int = 4  # tasks of `step_prompts` requests each that a pool of rollout actors shares


FULL = Task(decoder=DecodeTask())
QUICK = Task(
    decoder=DecodeTask(text_vocab_size=64, level_sizes=(16, 8, 8), hidden_size=32, num_layers=2, prompt_tokens=6, num_sids=200),
    sample_groups=(4,),
    sample_batches=(2,),
    update_groups=(4,),
    update_batch=2,
    step_prompts=3,
    step_group=4,
    actor_calls=2,
)


def decoder_config(task: DecodeTask) -> DecoderConfig:
    """The reference decoder's shape."""
    return DecoderConfig(
        text_vocab_size=task.text_vocab_size,
        level_sizes=task.level_sizes,
        hidden_size=task.hidden_size,
        num_layers=task.num_layers,
        intermediate_size=4 * task.hidden_size,
        max_positions=task.prompt_tokens + 8,
    )


def as_hugging_face(model: Decoder) -> Any:
    """The same weights as a Qwen2ForCausalLM."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        return transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Sampler:
    """`generate` drawing samples, constrained to the trie."""

    def __init__(self, model: Any, tokens: np.ndarray, config: DecoderConfig, prompt_tokens: int) -> None:
        self.model, self.prompt_tokens, self.offsets = model, prompt_tokens, torch.tensor(config.level_offsets)
        self.children = Generate(model, tokens, config, prompt_tokens).children

    def __call__(self, ids: Tensor, group: int, **options: Any) -> Any:
        def allowed(_: int, sequence: Tensor) -> list[int]:
            return self.children[tuple(sequence[self.prompt_tokens :].tolist())]

        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            num_return_sequences=group,
            max_new_tokens=3,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            prefix_allowed_tokens_fn=allowed,
            **options,
        )

    def answers(self, sequences: Tensor, group: int) -> Tensor:
        """Level tokens [B, G, 3] of generated sequences [B * G, L + 3]."""
        return (sequences[:, self.prompt_tokens :] - self.offsets).view(-1, group, 3)

    def scored(self, ids: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Answers [B, G, 3] and the log-probabilities [B, G, 3] that `generate` reports for them."""
        found = self(ids, group, return_dict_in_generate=True, output_scores=True)
        reported = self.model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        return self.answers(found.sequences, group), reported.view(-1, group, 3)


def full_sequences(ids: Tensor, answers: Tensor, config: DecoderConfig) -> Tensor:
    """One sequence [B * G, L + 3] per answer."""
    batch, group, _ = answers.shape
    return torch.cat((ids[:, None].expand(batch, group, -1), answers + torch.tensor(config.level_offsets)), dim=-1).flatten(0, 1)


def full_sequence_levels(model: Any, ids: Tensor, answers: Tensor, config: DecoderConfig, *, whole_vocabulary: bool, all_logits: bool = False) -> list[Tensor]:
    """Log-probabilities [B, G, A_level] of every level, from B * G full sequences, normalised over the level's columns or the whole vocabulary."""
    batch, group, _ = answers.shape
    logits = model(full_sequences(ids, answers, config), use_cache=False, logits_to_keep=0 if all_logits else 4).logits[:, -4:-1]
    if whole_vocabulary:
        logits = logits.log_softmax(-1)
    levels = [logits[:, level, first : first + size] for level, (first, size) in enumerate(zip(config.level_offsets, config.alphabet_sizes, strict=True))]
    return [(level if whole_vocabulary else level.log_softmax(-1)).view(batch, group, -1) for level in levels]


def of_answers(levels: Sequence[Tensor], answers: Tensor) -> Tensor:
    """Log-probabilities [B, G, 3] of answers."""
    return torch.stack([level.gather(-1, answers[..., number, None])[..., 0] for number, level in enumerate(levels)], dim=-1)


def gradients_by_their_names(model: Decoder) -> dict[str, Tensor]:
    """Our gradients under the names that `transformers` has for the same weights."""
    config, table = model.config, model.tokens
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {"model.embed_tokens.weight": torch.cat((table.text.grad, table.codes.grad)), "model.norm.weight": grads["norm.weight"]}
    sizes = [config.num_heads * config.head_size, config.num_kv_heads * config.head_size, config.num_kv_heads * config.head_size]
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"model.layers.{index}."
        found[f"{theirs}input_layernorm.weight"] = grads[f"{ours}attention_norm"]
        found[f"{theirs}post_attention_layernorm.weight"] = grads[f"{ours}mlp_norm"]
        found[f"{theirs}self_attn.o_proj.weight"] = grads[f"{ours}output_weight"]
        found[f"{theirs}mlp.down_proj.weight"] = grads[f"{ours}down_weight"]
        for part in ("weight", "bias"):
            found |= {f"{theirs}self_attn.{name}_proj.{part}": rows for name, rows in zip("qkv", grads[f"{ours}qkv_{part}"].split(sizes), strict=True)}
        found |= {f"{theirs}mlp.{name}_proj.weight": rows for name, rows in zip(("gate", "up"), grads[f"{ours}gate_up_weight"].chunk(2), strict=True)}
    return found


def require_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Exit unless two tensors agree to 1e-4."""
    if not torch.allclose(ours, theirs, atol=TOLERANCE, rtol=0):
        raise SystemExit(f"{name} differ by {float((ours - theirs).abs().max()):.2e}; not comparing the speed of unequal work")


def require_same_gradients(name: str, ours: Decoder, theirs: Any) -> None:
    """Exit unless the gradients of all weights agree to 1e-4 of the largest one."""
    mine = gradients_by_their_names(ours)
    others = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    if set(mine) != set(others):
        raise SystemExit(f"{name}: weights differ in name: {sorted(set(mine) ^ set(others))[:4]}")
    largest = max(float(gradient.abs().max()) for gradient in others.values())
    for key, gradient in others.items():
        require_close(f"{name}: gradients of {key} (over the largest)", mine[key] / largest, gradient / largest)


def compare_sampling(
    model: Decoder, sampler: Sampler, trie: Trie, ids: Tensor, group: int, repeats: int, record: Callable[..., None], *, kind: str, check: bool
) -> None:
    """Draw groups by both sides."""
    prompts, generator = prompts_of(ids), torch.Generator().manual_seed(0)
    ours, packed = (partial(sample_group, one, prompts, trie, group_size=group, support="trie", generator=generator) for one in (model, pack(model)))
    if check:
        require_sampled_alike(model, sampler, trie, ids, group, (ours(), packed()))
    if not bool((trie.find(sampler.answers(sampler(ids, group), group)) >= 0).all()):
        raise SystemExit(f"{kind} trie: generate left the trie")
    for side in (ours, packed):
        side()
    times = interleaved({"ours": ours, "ours_packed": packed, "generate": lambda: sampler(ids, group)}, repeats)
    row = f"{kind}, group {group}"
    for name, values in times.items():
        record(row, f"{name}_sampling_ms", [1e3 * value for value in values], batch=len(ids))
    record(row, "speedup_group_sampling", ratios(times["generate"], times["ours"]), batch=len(ids))
    record(row, "speedup_group_sampling_packed", ratios(times["generate"], times["ours_packed"]), batch=len(ids))


def require_sampled_alike(model: Decoder, sampler: Sampler, trie: Trie, ids: Tensor, group: int, own: Sequence[GroupSamples]) -> None:
    """Exit unless the log-probabilities that each side reports for its samples are those of `group_log_probs` over the children."""
    prompts = prompts_of(ids)
    answers, reported = sampler.scored(ids, group)
    with torch.no_grad():
        require_close("log-probabilities of generate's samples", group_log_probs(model, prompts, answers, support="trie", trie=trie), reported)
        for drawn in own:
            require_close("log-probabilities of our samples", group_log_probs(model, prompts, drawn.tokens, support="trie", trie=trie), drawn.log_probs)


def compare_update(model: Decoder, theirs: Any, ids: Tensor, answers: Tensor, repeats: int, record: Callable[..., None]) -> None:
    """Forward and backward of a group's log-probabilities by both sides."""
    config, prompts = model.config, prompts_of(ids)
    weights = torch.randn(answers.shape, generator=torch.Generator().manual_seed(0)) / answers.numel()

    def ours() -> Tensor:
        model.zero_grad()
        log_probs = group_log_probs(model, prompts, answers)
        (weights * log_probs).sum().backward()
        return log_probs.detach()

    def full(*, all_logits: bool = False) -> Tensor:
        theirs.zero_grad()
        log_probs = of_answers(full_sequence_levels(theirs, ids, answers, config, whole_vocabulary=False, all_logits=all_logits), answers)
        (weights * log_probs).sum().backward()
        return log_probs.detach()

    for all_logits in (False, True):
        require_close("update: log-probabilities", ours(), full(all_logits=all_logits))
        require_same_gradients("update", model, theirs)
    times = interleaved({"ours": ours, "full_sequences": full, "all_logits": partial(full, all_logits=True)}, repeats)
    row = f"group {answers.shape[1]}"
    for name, values in times.items():
        record(row, f"{name}_update_ms", [1e3 * value for value in values], batch=len(ids))
    record(row, "speedup_packed_update", ratios(times["full_sequences"], times["ours"]), batch=len(ids))
    record(row, "speedup_packed_update_vs_all_logits", ratios(times["all_logits"], times["ours"]), batch=len(ids))


@dataclass(frozen=True)
class Requests:
    """Prompts with logged SIDs: ids [B, L], SID rows int32 [B, LOGGED], their tokens [B, LOGGED, 3], and the reward of (request, tokens)."""

    ids: Tensor
    sid_rows: np.ndarray
    logged: Tensor
    rewards: Mapping[tuple[int, ...], float]

    @classmethod
    def drawn(cls, task: Task, tokens: np.ndarray, rng: np.random.Generator) -> Requests:
        """Random ones."""
        ids = torch.from_numpy(rng.integers(0, task.decoder.text_vocab_size, (task.step_prompts, task.decoder.prompt_tokens)))
        rows = np.stack([rng.choice(len(tokens), LOGGED, replace=False) for _ in range(task.step_prompts)]).astype(np.int32)
        rewards = {
            (request, *tokens[row].tolist()): CLICKED if place == 0 else EXPOSED for request, logged in enumerate(rows) for place, row in enumerate(logged)
        }
        return cls(ids, rows, torch.from_numpy(tokens[rows].astype(np.int64)), rewards)

    def rewarded(self, answers: Tensor) -> Tensor:
        """Rewards [B, G] of answers [B, G, 3], all of them SIDs."""
        return torch.tensor([[self.rewards.get((request, *answer), VALID) for answer in group] for request, group in enumerate(answers.tolist())])

    def task(self, step: int) -> RolloutTask:
        """What a rollout worker is asked."""
        count = len(self.ids)
        return RolloutTask(
            step=step,
            request_rows=np.arange(count),
            token_ids=self.ids.numpy(),
            lengths=np.full(count, self.ids.shape[1]),
            soft=None,
            expert_offsets=np.arange(count + 1) * LOGGED,
            expert_sids=self.sid_rows.reshape(-1),
            expert_weights=np.tile([4.0, *[0.1] * (LOGGED - 1)], count),
        )


class OurStep:
    """An EG-GRPO step as `eg_grpo` takes it, rollout worker and learner in one process."""

    def __init__(self, model: Decoder, reference: Decoder, trie: Trie, requests: Requests, task: Task) -> None:
        self.model, self.reference, self.trie, self.requests = model, pack(reference), trie, requests
        self.worker = RolloutWorker(Decoder(model.config, seed=None), trie, rollout_config(task))
        self.optimizer = adam(model)
        self.steps = 0
        self.seconds: dict[str, list[float]] = {part: [] for part in STEP_PARTS}

    def __call__(self) -> None:
        prompts = prompts_of(self.requests.ids)
        state: dict[str, Any] = {}

        def sample() -> None:
            state["rollout"] = self.worker.sample(self.requests.task(self.steps))
            state["answers"] = torch.from_numpy(state["rollout"].tokens).long()
            state["rewards"] = self.requests.rewarded(state["answers"])

        def refer() -> None:
            with torch.no_grad():
                scored = group_log_probs(self.reference, prompts, state["answers"], support="trie", trie=self.trie, return_level_log_probs=True)
            state["levels"] = scored.levels

        def update() -> None:
            rollout = state["rollout"]
            old, experts = torch.from_numpy(rollout.log_probs), torch.from_numpy(rollout.experts)
            loss = our_loss(self.model, prompts, state["answers"], old, state["rewards"], experts, state["levels"], support="trie", trie=self.trie)
            self.optimizer.zero_grad()
            loss.backward()

        parts = (lambda: self.worker.load(self.steps, weights_of(self.model)), sample, refer, update, lambda: advance(self.model, self.optimizer))
        timed = clock()
        for name, part in zip(STEP_PARTS, parts, strict=True):
            self.seconds[name].append(timed(part))
        self.steps += 1


class TrlStyleStep:
    """The same step as it is written round `transformers`: one sequence a sample, and the whole vocabulary's log-probabilities."""

    def __init__(
        self, model: Any, reference: Any, sampler: Sampler, requests: Requests, config: DecoderConfig, task: Task, *, all_logits: bool = False
    ) -> None:
        self.model, self.reference, self.sampler, self.requests, self.task = model, reference, sampler, requests, task
        self.levels_of = partial(full_sequence_levels, ids=requests.ids, config=config, whole_vocabulary=True, all_logits=all_logits)
        self.optimizer = adam(model)

    def __call__(self) -> None:
        group, experts = self.task.step_group, self.task.num_experts
        answers = self.sampler.answers(self.sampler(self.requests.ids, group), group)
        answers = torch.cat((answers[:, : group - experts], self.requests.logged[:, :experts]), dim=1)
        seats = (torch.arange(group) >= group - experts).expand(len(answers), -1)
        loss = self.loss(answers, self.requests.rewarded(answers), seats)
        self.optimizer.zero_grad()
        loss.backward()
        advance(self.model, self.optimizer)

    def loss(self, answers: Tensor, rewards: Tensor, experts: Tensor) -> Tensor:
        """Clipped objective and KL; the rollout's weights are the update's, so the old log-probabilities are its own."""
        with torch.no_grad():
            reference = self.levels_of(self.reference, answers=answers)
        levels = self.levels_of(self.model, answers=answers)
        log_probs = of_answers(levels, answers)
        settings = ObjectiveConfig()
        advantages = group_advantages(rewards, epsilon=settings.advantage_epsilon)
        clipped = clipped_objective(log_probs, log_probs.detach(), advantages, clip_low=settings.clip_low, clip_high=settings.clip_high)
        by_level = [exact_kl(level, other) for level, other in zip(levels, reference, strict=True)]
        return clipped.loss + settings.kl_weight * mean_over_samples(torch.stack(by_level, dim=-1), experts)


def our_loss(
    model: Decoder,
    prompts: Prompts,
    answers: Tensor,
    old: Tensor,
    rewards: Tensor,
    experts: Tensor,
    reference_levels: tuple[Tensor, Tensor, Tensor],
    *,
    support: Any,
    trie: Trie | None,
) -> Tensor:
    """`alignment_loss` with its default weights."""
    batch = (prompts.token_ids, prompts.lengths, prompts.soft, answers, old, rewards, experts, reference_levels, torch.tensor(1.0))
    return alignment_loss(model, *batch, objective=ObjectiveConfig(), support=support, trie=trie)[0]


def compare_step(task: Task, trie: Trie, tokens: np.ndarray, repeats: int, record: Callable[..., None], rng: np.random.Generator) -> None:
    """Whole steps by both sides, each on weights of its own that start alike."""
    config = decoder_config(task.decoder)
    model, reference = Decoder(config, seed=0), Decoder(config, seed=1)
    requests = Requests.drawn(task, tokens, rng)
    policy, their_reference = as_hugging_face(model), as_hugging_face(reference)
    sampler = Sampler(policy, tokens, config, task.decoder.prompt_tokens)
    theirs = TrlStyleStep(policy, their_reference, sampler, requests, config, task)
    all_logits = TrlStyleStep(policy, their_reference, sampler, requests, config, task, all_logits=True)
    for other in (theirs, all_logits):
        require_same_loss(model, reference, other, requests, task)
    ours = OurStep(model.eval(), reference.eval(), trie, requests, task)
    ours()
    theirs()
    for values in ours.seconds.values():
        values.clear()
    times = interleaved({"ours": ours, "trl_style": theirs, "trl_style_all_logits": all_logits}, repeats)
    row = f"{task.step_prompts} prompts, group {task.step_group}, {task.num_experts} experts"
    for name, values in times.items():
        record(row, f"{name}_step_ms", [1e3 * value for value in values], batch=task.step_prompts, table="throughput")
    for part, values in ours.seconds.items():
        record(row, f"ours_{part}_ms", [1e3 * value for value in values], batch=task.step_prompts, table="throughput")
    for name in ("trl_style", "trl_style_all_logits"):
        record(row, f"step_speedup_vs_{name}", ratios(times[name], times["ours"]), batch=task.step_prompts, table="throughput")


def compare_actors(
    task: Task, trie: Trie, tokens: np.ndarray, sizes: Sequence[int], repeats: int, record: Callable[..., None], rng: np.random.Generator
) -> None:
    """Groups of `actor_calls` tasks by pools of each size."""
    tasks = [Requests.drawn(task, tokens, rng).task(call) for call in range(task.actor_calls)]
    compare_pools(Decoder(decoder_config(task.decoder), seed=0), trie, tasks, rollout_config(task), sizes, repeats, record)


def require_same_loss(model: Decoder, reference: Decoder, theirs: TrlStyleStep, requests: Requests, task: Task) -> None:
    """Exit unless both sides have the same loss and gradients on one group of random answers and the logged ones."""
    prompts = prompts_of(requests.ids)
    generator = torch.Generator().manual_seed(1)
    sampled = [torch.randint(0, size, (len(requests.ids), task.step_group - task.num_experts), generator=generator) for size in model.config.alphabet_sizes]
    answers = torch.cat((torch.stack(sampled, dim=-1), requests.logged[:, : task.num_experts]), dim=1)
    experts = (torch.arange(task.step_group) >= task.step_group - task.num_experts).expand(len(answers), -1)
    rewards = requests.rewarded(answers)
    with torch.no_grad():
        levels = group_log_probs(reference, prompts, answers, support="full", return_level_log_probs=True).levels
        old = group_log_probs(model, prompts, answers, support="full")
    model.zero_grad()
    theirs.model.zero_grad()
    mine = our_loss(model, prompts, answers, old, rewards, experts, levels, support="full", trie=None)
    other = theirs.loss(answers, rewards, experts)
    require_close("step: losses", mine.detach(), other.detach())
    mine.backward()
    other.backward()
    require_same_gradients("step", model, theirs.model)


def rollout_config(task: Task) -> RolloutConfig:
    """How the groups of a step are made."""
    return RolloutConfig(seed=0, group_size=task.step_group, num_experts=task.num_experts, support="trie")


def prompts_of(ids: Tensor) -> Prompts:
    """Prompts of equal length."""
    return Prompts(ids, torch.full((len(ids),), ids.shape[1]))


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `TrainWorker`."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def advance(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradients and take an optimizer step."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def measure(task: Task, parts: Sequence[str], repeats: int, record: Callable[..., None]) -> None:
    """Check and time the parts asked for."""
    rng = np.random.default_rng(0)
    config = decoder_config(task.decoder)
    model = Decoder(config, seed=0).eval()
    theirs = as_hugging_face(model)
    for kind in task.decoder.tries:
        tokens = sid_tokens(kind, task.decoder, rng)
        trie = Trie.from_tokens(tokens, config.alphabet_sizes)
        sampler = Sampler(theirs, tokens, config, task.decoder.prompt_tokens)
        for batch in task.sample_batches if "sampling" in parts else ():
            ids = torch.from_numpy(rng.integers(0, task.decoder.text_vocab_size, (batch, task.decoder.prompt_tokens)))
            for group in task.sample_groups:
                check = (batch, group) == (task.sample_batches[0], task.sample_groups[0])
                compare_sampling(model, sampler, trie, ids, group, repeats, record, kind=kind, check=check)
    for group in task.update_groups if "update" in parts else ():
        ids = torch.from_numpy(rng.integers(0, task.decoder.text_vocab_size, (task.update_batch, task.decoder.prompt_tokens)))
        answers = torch.from_numpy(tokens[rng.integers(0, len(tokens), (task.update_batch, group))].astype(np.int64))
        compare_update(model, theirs, ids, answers, repeats, record)
    if "step" in parts:
        compare_step(task, trie, tokens, repeats, record, rng)
    if "actors" in parts:
        compare_actors(task, trie, tokens, pool_sizes(), repeats, record, rng)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def of(options: argparse.Namespace, repeats: int) -> Callable[[Callable[..., None]], None]:
        again = torch.get_num_threads() != options.threads[0]  # the number of threads here changes nothing for the actors
        parts = [part for part in options.parts if part != "actors" or not again]
        return lambda record: measure(QUICK if options.quick else FULL, parts, repeats, record)

    return run_recorded(parser, "rl", arguments, of, transformers, repeats=7, parts=PARTS)


if __name__ == "__main__":
    main()
