"""The reinforcement learning benchmark's quick mode: all sides compute the same, and every figure is recorded."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.sid.trie import Trie

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("rl")


def test_quick_mode_compares_all_sides_and_writes_records(benchmark: ModuleType, tmp_path: Path) -> None:
    parts = ["sampling", "update", "step"]
    records = benchmark.main(["--quick", "--parts", *parts, "--threads", "1", "--output", str(tmp_path / "rl.json")])
    assert json.loads((tmp_path / "rl.json").read_text()) == records
    of_table = {table: {record["metric"] for record in records if record["table"] == table} for table in ("rl", "throughput")}
    assert of_table["rl"] >= {"speedup_group_sampling", "speedup_group_sampling_packed", "speedup_packed_update", "speedup_packed_update_vs_all_logits"}
    assert of_table["throughput"] >= {"step_speedup_vs_trl_style", *(f"ours_{part}_ms" for part in benchmark.STEP_PARTS)}
    rows = {(record["row"], record["batch"]) for record in records}
    assert rows == {("uniform, group 4", 2), ("clustered, group 4", 2), ("group 4", 2), ("3 prompts, group 4, 2 experts", 3)}
    assert set(records[0]) == {"table", "row", "metric", "value", "low", "high", "batch", "beam", "threads", "machine", "command", "commit"}


def test_parts_of_a_step_and_the_step_are_timed_by_one_clock(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))  # each look at the clock is a second later than the one before

    def ticking(side: Callable[[], Any]) -> float:
        started = next(ticks)
        side()
        return next(ticks) - started

    monkeypatch.setattr(benchmark, "clock", lambda: ticking)
    monkeypatch.setattr(sys.modules["measurement"], "clock", lambda: ticking)
    task, taken = benchmark.QUICK, {}
    tokens = benchmark.sid_tokens("uniform", task.decoder, np.random.default_rng(0))
    trie = Trie.from_tokens(tokens, benchmark.decoder_config(task.decoder).alphabet_sizes)
    benchmark.compare_step(task, trie, tokens, 1, lambda row, metric, values, **options: taken.update({metric: values[0]}), np.random.default_rng(1))
    parts = [taken[f"ours_{part}_ms"] for part in benchmark.STEP_PARTS]
    assert parts == [1000.0] * 5
    assert taken["ours_step_ms"] == 11_000.0  # five parts of a tick, a tick before each of them and one at the end


@pytest.mark.timeout(180)
def test_rollout_actors_are_timed_alone_and_leave_the_rows_of_other_parts(ray_cluster: None, benchmark: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "rl.json"
    kept = [{"table": "throughput", "row": "16 prompts", "value": 1}, {"table": "rl", "row": "group 8", "value": 2}]
    output.write_text(json.dumps([*kept, {"table": "throughput", "row": "actors_1", "value": 3}]))
    records = benchmark.main(["--quick", "--parts", "actors", "--threads", "1", "--output", str(output)])
    assert json.loads(output.read_text()) == [*kept, *records]
    assert {record["table"] for record in records} == {"throughput"}
    rates = {record["row"]: record for record in records if record["metric"] == "rollouts_per_s"}
    assert set(rates) >= {"actors_1", "actors_2"}
    assert {(record["batch"], record["threads"]) for record in records} == {(6, 1)}  # two tasks of three requests
    assert all(record["value"] > 0 for record in rates.values())
    assert [record["row"] for record in records if record["metric"] == "speedup_vs_actors_1"] == list(rates)[1:]


def test_generate_reports_log_probabilities_over_the_children(benchmark: ModuleType) -> None:
    task = benchmark.QUICK.decoder
    model = Decoder(benchmark.decoder_config(task), seed=0).eval()
    tokens = benchmark.sid_tokens("clustered", task, np.random.default_rng(1))
    trie = Trie.from_tokens(tokens, model.config.alphabet_sizes)
    ids = torch.randint(0, task.text_vocab_size, (3, task.prompt_tokens), generator=torch.Generator().manual_seed(2))
    sampler = benchmark.Sampler(benchmark.as_hugging_face(model), tokens, model.config, task.prompt_tokens)
    answers, reported = sampler.scored(ids, 5)
    assert answers.shape == (3, 5, 3)
    assert bool((trie.find(answers) >= 0).all())
    with torch.no_grad():
        wanted = group_log_probs(model, benchmark.prompts_of(ids), answers, support="trie", trie=trie)
        over_level = group_log_probs(model, benchmark.prompts_of(ids), answers)
    torch.testing.assert_close(reported, wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(reported, over_level, atol=1e-2)


def test_unequal_work_is_not_compared(benchmark: ModuleType) -> None:
    model = Decoder(benchmark.decoder_config(benchmark.QUICK.decoder), seed=0)
    theirs = benchmark.as_hugging_face(model)
    with pytest.raises(SystemExit, match=r"losses differ by 1\.00e\+00; not comparing"):
        benchmark.require_close("losses", torch.tensor(1.0), torch.tensor(2.0))
    for one in (model, theirs):
        for parameter in one.parameters():
            parameter.grad = torch.ones_like(parameter)
    benchmark.require_same_gradients("update", model, theirs)
    theirs.model.layers[1].mlp.up_proj.weight.grad[3, 4] += 0.01
    with pytest.raises(SystemExit, match=r"update: gradients of model\.layers\.1\.mlp\.up_proj\.weight"):
        benchmark.require_same_gradients("update", model, theirs)


def test_rewards_are_looked_up_by_request_and_answer(benchmark: ModuleType) -> None:
    tokens = benchmark.sid_tokens("uniform", benchmark.QUICK.decoder, np.random.default_rng(3))
    requests = benchmark.Requests.drawn(benchmark.QUICK, tokens, np.random.default_rng(4))
    rewards = requests.rewarded(requests.logged)
    assert rewards.tolist() == [pytest.approx([1.0, 0.5, 0.5, 0.5, 0.5])] * 3
    other = torch.from_numpy(tokens[[row for row in range(200) if row not in requests.sid_rows[0]][:2]].astype(np.int64))
    assert requests.rewarded(other[None]).tolist() == [pytest.approx([0.1, 0.1])]
