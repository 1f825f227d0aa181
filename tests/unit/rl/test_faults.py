"""Faults in the learner's loop, in one process: a driver that dies and is run again, rewards that are missing, equal or late, experts that are stale.

The loop is the real one; what stands in for Ray and DeepSpeed is a plain optimizer whose checkpoints are kept in memory, and actors that are called directly.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from genrecall.config import to_dict
from genrecall.rl import actors, eg_grpo, experience
from genrecall.rl.align_config import AlignConfig
from genrecall.rl.bounded_scorer import RankerFailedError
from genrecall.rl.learner import ObjectiveConfig
from genrecall.rl.reward import RewardActor, RewardConfig, Rewards
from genrecall.rl.rollout import RolloutActor
from genrecall.rl.stop_rules import StopConfig

TIMES = ("seconds_experience", "seconds_update")
STEADY = StopConfig(enabled=False)


class Killed(BaseException):
    """What the death of a process looks like from within one."""


class Plain:
    """`TrainWorker` without Ray and DeepSpeed; a checkpoint after every step."""

    checkpoint: dict | None = None
    dies_before_update: int | None = None
    exported: Path

    def __init__(self, model, loss_fn, *, learning_rate, total_steps, loop_config, weight_decay, gradient_clipping, dtype=torch.bfloat16) -> None:
        model.to(dtype)  # the default is that of a GPU
        self.model, self.rank, self.world_size, self.device = model, 0, 1, torch.device("cpu")
        self._loss_fn, self._rate, self._clip = loss_fn, learning_rate, gradient_clipping
        self._optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
        self._step, self._folder = 0, Path(loop_config["folder"])

    def resume(self, read=None):
        if (found := Plain.checkpoint) is None:
            return {}
        self.model.load_state_dict(found["model"])
        self._optimizer.load_state_dict(copy.deepcopy(found["optimizer"]))
        state = json.loads(found["state"])
        self._step = state["step"]
        if read is not None:
            read(found["folder"])
        return state

    def loss(self, *batch):
        if self._step == Plain.dies_before_update:
            Plain.dies_before_update = None
            raise Killed
        return self._loss_fn(self.model, *batch)

    def step(self, loss):
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self._step)
        self._optimizer.step()
        self._step += 1

    def log(self, step, metrics):
        pass

    def checkpoint_due(self, step, *, max_share):
        return True

    def save(self, state, write=None):
        folder = self._folder / f"checkpoint-{state['step']}"
        folder.mkdir(exist_ok=True)
        if write is not None:
            write(folder)
        parts = {"model": copy.deepcopy(self.model.state_dict()), "optimizer": copy.deepcopy(self._optimizer.state_dict())}
        Plain.checkpoint = {**parts, "state": json.dumps(state), "folder": folder}

    def finish(self, export, metrics=None, *, state, write):
        self.save({**state, "step": self._step}, write)
        Plain.exported = self._folder / "export"
        Plain.exported.mkdir()
        export(Plain.exported)


class Near:
    """A `NamedActor` whose actor lives in this process."""

    def __init__(self, actor) -> None:
        self.name, self.handle = "near", Near.Handle(actor)

    class Handle:
        def __init__(self, actor) -> None:
            self._actor = actor

        def __getattr__(self, method):
            class Remote:
                remote = staticmethod(getattr(self._actor, method))

            return Remote


class Direct:
    """A `Supervisor` of near actors."""

    replaced = 0

    def __init__(self, *, timeout_s) -> None:
        pass

    def call(self, actor, make):
        return make(actor.handle)

    def result(self, call):
        return call


@pytest.fixture
def run(untrained_line, tmp_path, monkeypatch):
    """`run(rewards=None, **settings)` aligns for four steps and returns the folder exported; `rewards(step, Rewards)` may change each step's rewards."""
    torch.set_num_threads(1)
    parts = untrained_line.parts()
    count = iter(range(100))
    monkeypatch.setattr(eg_grpo, "TrainWorker", Plain)
    monkeypatch.setattr(experience, "Supervisor", Direct)
    monkeypatch.setattr(actors.ray, "put", lambda value: value)
    monkeypatch.setattr(experience, "rollout_actors", lambda config, names: [Near(RolloutActor(spec_of(config)))])
    Plain.checkpoint = Plain.dies_before_update = None

    def spec_of(config):
        uris = {name: parts[name].uri for name in ("generator", "sid_index")}
        return {**uris, "rollout": to_dict(config.rollout_config()), "use_gpu": False}

    def aligned(rewards=None, **settings) -> Path:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        reward = RewardActor({**{name: parts[name].uri for name in ("dataset", "sid_index", "encoder")}, "reward": to_dict(RewardConfig())})

        class Changed:
            calls = len(json.loads(Plain.checkpoint["state"])["health"]) if Plain.checkpoint else 0

            def score(self, request_rows, sid_rows):
                Changed.calls += 1
                scored = reward.score(request_rows, sid_rows)
                return scored if rewards is None else rewards(Changed.calls - 1, scored)

        monkeypatch.setattr(experience, "reward_actor", lambda config, names: Near(Changed()))
        settings = {"steps": 4, "requests_per_step": 3, "group_size": 4, "num_experts": 1, "learning_rate": 1e-3, "warmup_steps": 0, "stop": STEADY} | settings
        uris = {name: parts[name].uri for name in ("dataset", "encoder", "sid_index", "generator")}
        eg_grpo.align_loop({"config": to_dict(AlignConfig(**settings)), **uris, "folder": str(folder)})
        return Plain.exported

    return aligned


def outcome(folder: Path) -> tuple[dict[str, np.ndarray], list[dict], dict]:
    """Final weights, health without times, and the facts of a run."""
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in pq.read_table(folder / "health.parquet").to_pylist()]
    return load_file(folder / "stage4" / "model.safetensors"), rows, json.loads((folder / "training.json").read_text())


def assert_same(one: Path, other: Path) -> None:
    (weights, rows, facts), (others, other_rows, other_facts) = outcome(one), outcome(other)
    assert all(np.array_equal(weights[name], others[name]) for name in weights | others)
    np.testing.assert_equal(rows, other_rows)
    assert (facts["steps_run"], facts["kept_step"], facts["stopped"]) == (other_facts["steps_run"], other_facts["kept_step"], other_facts["stopped"])


def run_again(run) -> Path:
    """A synchronous run from the start."""
    Plain.checkpoint = None
    return run()


def started_from(untrained_line) -> dict[str, np.ndarray]:
    return load_file(untrained_line.parts()["generator"].file("stage3") / "model.safetensors")


@pytest.mark.parametrize("dies_before_update", [0, 1, 3])
def test_a_driver_that_dies_and_is_run_again_ends_where_an_undisturbed_one_does(run, dies_before_update):
    undisturbed = run()
    Plain.checkpoint, Plain.dies_before_update = None, dies_before_update
    with pytest.raises(Killed):
        run()
    assert (Plain.checkpoint is None) == (dies_before_update == 0)
    disturbed = run()
    assert_same(disturbed, undisturbed)
    assert (outcome(disturbed)[2]["restarts"], outcome(undisturbed)[2]["restarts"]) == (int(dies_before_update > 0), 0)
    _, rows, _ = outcome(undisturbed)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["kl_1"] != rows[3]["kl_1"]  # it did learn


@pytest.mark.parametrize("stops", [False, True])
def test_a_driver_that_dies_after_the_last_step_exports_what_was_there(run, stops):
    stop = StopConfig(patience=2, baseline_steps=1, min_reward=0.0, max_unusable_rewards=0.0 if stops else 1.0, max_kl=100.0)
    settings = {"rewards": (lambda step, scored: Rewards(scored.values * (np.nan if step else 1), scored.tiers)), "stop": stop, "steps": 4}
    before = run(**settings)
    assert json.loads(Plain.checkpoint["state"])["rollout_step"] == (3 if stops else 4)
    again = run(**settings)  # from the last checkpoint: nothing is left to do
    assert_same(again, before)
    assert (outcome(again)[2]["stopped"] is not None) == stops


def test_a_run_goes_on_where_its_updates_of_several_a_rollout_were(run):
    settings = {"updates_per_rollout": 2, "objective": ObjectiveConfig(sft_anchor_weight=0.5), "distinct_samples": True}
    undisturbed = run(**settings)
    Plain.checkpoint, Plain.dies_before_update = None, 5  # the second update of the third step
    with pytest.raises(Killed):
        run(**settings)
    assert_same(run(**settings), undisturbed)


def test_a_run_that_collapses_after_its_restart_keeps_the_weights_that_were_good_before(run, untrained_line):
    def no_rewards_from_the_third_step_on(step, scored):
        return scored if step < 2 else Rewards(np.full_like(scored.values, np.nan), scored.tiers)

    stop = StopConfig(patience=2, baseline_steps=1, min_reward=0.0, min_entropy=0.0, min_unique_sids=0.0, min_valid_mass=0.0, max_kl=100.0)
    undisturbed = run(no_rewards_from_the_third_step_on, stop=stop)
    _, rows, facts = outcome(undisturbed)
    assert [row["unusable_rewards"] for row in rows] == [0.0, 0.0, 1.0, 1.0]
    assert facts["stopped"].startswith("usable_rewards: unusable_rewards was 1, above its bound 0.5, for 2 steps in a row")
    assert facts["kept_step"] == 1
    Plain.checkpoint, Plain.dies_before_update = None, 3
    with pytest.raises(Killed):
        run(no_rewards_from_the_third_step_on, stop=stop)
    assert json.loads(Plain.checkpoint["state"])["rollout_step"] == 2
    assert_same(run(no_rewards_from_the_third_step_on, stop=stop), undisturbed)
    assert facts["stop_limits"]["unusable_rewards"] == {"limit": 0.5, "at": "most"}
    tags = eg_grpo.tags_of(facts)
    assert tags["alignment.stopped"] == facts["stopped"]
    assert (tags["alignment.broken_rules"], tags["alignment.steps_run"], tags["alignment.kept_step"]) == ("usable_rewards", "4", "1")
    assert (tags["alignment.limit.unusable_rewards"], tags["alignment.limit.kl"]) == ("at most 0.5", "at most 100")
    assert {name.rpartition(".")[2] for name in tags if name.startswith("alignment.limit.")} == set(facts["stop_limits"])


def test_the_ratio_of_a_policy_to_itself_is_one(run):
    _, rows, _ = outcome(run())  # fresh rollouts and one update a step
    assert [row["ratio"] for row in rows] == pytest.approx([1.0] * 4, abs=1e-5)


@pytest.mark.parametrize("max_staleness", [1, 2, 9])
def test_asynchronous_rollouts_are_as_many_updates_old_as_allowed_and_no_more(run, max_staleness):
    asked = run(max_staleness=max_staleness)
    _, rows, facts = outcome(asked)
    assert [row["staleness"] for row in rows] == [min(step, max_staleness) for step in range(4)]
    assert facts["stopped"] is None
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert all(abs(row["ratio"] - 1.0) > 1e-4 for row in rows[1:])  # of weights to older ones
    assert all(np.isfinite(row[name]) for row in rows for name in ("reward", "policy_loss", "kl", "clip_fraction"))
    assert any(not np.array_equal(one, other) for one, other in zip(outcome(asked)[0].values(), outcome(run_again(run))[0].values(), strict=True))


def test_an_asynchronous_run_that_dies_samples_again_what_was_under_way(run):
    Plain.dies_before_update = 2
    with pytest.raises(Killed):
        run(max_staleness=2)
    _, rows, facts = outcome(run(max_staleness=2))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["staleness"] for row in rows] == [0, 1, 0, 1]
    assert facts["restarts"] == 1


@pytest.mark.parametrize("value", [np.nan, 0.5])
def test_groups_without_a_reward_or_with_equal_ones_teach_nothing_and_are_counted(run, untrained_line, value):
    folder = run(lambda step, scored: Rewards(np.full_like(scored.values, value), scored.tiers), objective=ObjectiveConfig(kl_weight=0.0), steps=2)
    weights, rows, _ = outcome(folder)
    before = started_from(untrained_line)
    assert all(np.array_equal(weights[name], before[name]) for name in before)
    for row in rows:
        assert row["zero_spread"] == 1.0
        assert row["empty_groups"] == row["unusable_rewards"] == float(np.isnan(value))
        assert row["policy_loss"] == 0.0


def test_one_reward_that_is_missing_leaves_its_answer_out_alone(run):
    def one_missing(step, scored):
        values = scored.values.copy()
        values[0, 0] = np.inf if step % 2 else np.nan
        return Rewards(values, scored.tiers, failed_calls=1)

    weights, rows, _ = outcome(run(one_missing))
    assert all(np.isfinite(value).all() for value in weights.values())
    assert [row["unusable_rewards"] for row in rows] == pytest.approx([1 / 12] * 4)
    assert [row["empty_groups"] for row in rows] == [0.0] * 4
    assert [row["failed_ranker_calls"] for row in rows] == [1.0] * 4


def test_a_ranking_model_that_stays_down_ends_the_run_and_the_rerun_goes_on(run):
    undisturbed = run()
    Plain.checkpoint = None

    def down_at_the_third_step(step, scored):
        if step == 2:
            raise RankerFailedError("the ranking model failed 3 times in a row")
        return scored

    with pytest.raises(RankerFailedError, match="3 times in a row"):
        run(down_at_the_third_step)
    assert_same(run(), undisturbed)


def test_stale_experts_are_left_out_and_counted(run, monkeypatch):
    built = eg_grpo.build_feedback

    def stale(*args):
        feedback = built(*args)
        feedback.sid_rows[:] = 10_000  # a SID of another index
        return feedback

    monkeypatch.setattr(eg_grpo, "build_feedback", stale)
    _, rows, _ = outcome(run(steps=2))
    assert all(row["stale_experts"] > 0 for row in rows)
    assert [row["expert_share"] for row in rows] == [0.0, 0.0]
    assert [row["valid_rate"] for row in rows] == [1.0, 1.0]
    assert "valid_mass" not in rows[0]  # of a guided decoder
