"""The learner's loss and health; EG-GRPO on a toy world moves the policy to what was clicked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrecall.config import ConfigError, from_dict
from genrecall.generator.log_probs import group_log_probs
from genrecall.generator.model import Decoder
from genrecall.rl.advantage import group_advantages
from genrecall.rl.feedback import CLICKED, EXPOSED, INVALID, VALID
from genrecall.rl.learner import ObjectiveConfig, alignment_loss, draw_requests, frequent_queries, rollout_health, valid_mass
from genrecall.rl.reward import RewardConfig, RewardModel, Rewards
from genrecall.rl.rollout import Rollout, RolloutConfig, RolloutWorker, weights_of
from genrecall.sid.index import SidIndex


def reference_levels(toy, model, prompts, tokens):
    with torch.no_grad():
        return group_log_probs(model, prompts, tokens, support=toy.support, trie=toy.trie, return_level_log_probs=True).levels


def loss_of(toy, tokens, old, rewards, experts, *, reference=None, anchors=None, weight=1.0, **objective):
    prompts = toy.prompts(range(len(tokens)))
    answers = tokens if anchors is None else torch.cat((tokens, anchors), dim=1)
    present = None if anchors is None else torch.ones(anchors.shape[:2], dtype=torch.bool)
    return alignment_loss(
        toy.model,
        prompts.token_ids,
        prompts.lengths,
        prompts.soft,
        answers,
        old,
        rewards,
        experts,
        reference_levels(toy, reference or toy.model, prompts, tokens),
        torch.tensor(weight),
        present,
        objective=ObjectiveConfig(**objective),
        support=toy.support,
        trie=toy.trie,
    )


def group_of(toy):
    rollout = RolloutWorker(toy.model, toy.trie, RolloutConfig(seed=0, group_size=5, num_experts=1, support=toy.support)).sample(toy.task(range(6)))
    rewards = torch.from_numpy(np.random.default_rng(0).choice([0.0, 0.1, 1.0], size=(6, 5)).astype(np.float32))
    return torch.from_numpy(rollout.tokens).long(), torch.from_numpy(rollout.log_probs), rewards, torch.from_numpy(rollout.experts)


@pytest.fixture
def group(toy):
    return group_of(toy)


@pytest.fixture(params=["toy", "guided_toy"])
def any_toy(request):
    return request.getfixturevalue(request.param)


def test_fresh_on_policy_loss_is_minus_the_mean_advantage(any_toy):
    toy = any_toy
    tokens, old, rewards, experts = group_of(toy)
    loss, parts = loss_of(toy, tokens, old, rewards, experts)
    loss.backward()  # all ratios are 1 and the KL is at its least: what is left is the plain policy gradient
    got = {name: parameter.grad.clone() for name, parameter in toy.model.named_parameters()}
    toy.model.zero_grad()
    log_probs = group_log_probs(toy.model, toy.prompts(range(6)), tokens, support=toy.support, trie=toy.trie if toy.support == "trie" else None)
    (-(group_advantages(rewards)[..., None] * log_probs).mean()).backward()
    for name, parameter in toy.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert max(parameter.grad.abs().max() for parameter in toy.model.parameters()) > 1e-3
    assert parts["kl"].item() == pytest.approx(0.0, abs=1e-6)
    assert parts["ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert parts["clip_fraction"].item() == 0.0
    assert parts["entropy_1"].item() <= np.log(4) + 1e-5


def test_kl_pulls_toward_the_reference(any_toy):
    toy = any_toy
    tokens, old, rewards, experts = group_of(toy)
    other = Decoder(toy.model.config, seed=9).eval()
    flat = torch.full_like(rewards, 0.1)  # no spread, so only the KL is left
    loss, parts = loss_of(toy, tokens, old, flat, experts, reference=other, kl_weight=2.0)
    assert parts["kl"].item() > 0
    assert loss.item() == pytest.approx(2.0 * parts["kl"].item(), rel=1e-5)
    assert parts["kl"].item() == pytest.approx(sum(parts[f"kl_{level}"].item() for level in (1, 2, 3)) / 3, rel=1e-5)


def test_guided_kl_is_over_the_trie_alone_with_a_finite_gradient(guided_toy):
    tokens, old, rewards, experts = group_of(guided_toy)
    prompts = guided_toy.prompts(range(6))
    with torch.no_grad():
        scored = group_log_probs(guided_toy.model, prompts, tokens, support="trie", trie=guided_toy.trie, return_level_log_probs=True)
    assert all(torch.isneginf(level).any() for level in scored.levels[1:])  # codes that no SID has after the prefix
    flat = torch.full_like(rewards, 0.1)
    loss, parts = loss_of(guided_toy, tokens, old, flat, experts)
    loss.backward()
    assert parts["kl"].item() == pytest.approx(0.0, abs=1e-6)  # against itself
    assert all(torch.isfinite(value) for value in parts.values())
    loss, parts = loss_of(guided_toy, tokens, old, flat, experts, reference=Decoder(guided_toy.model.config, seed=9).eval())
    loss.backward()
    assert 0 < parts["kl"].item() < np.inf
    weights = guided_toy.model.guidance.level_weights
    assert all(torch.isfinite(parameter.grad).all() for parameter in guided_toy.model.parameters())
    assert weights.grad.abs().max() > 0


def test_guided_kl_of_two_level_weights_equals_a_plain_sum(guided_toy):
    tokens, old, rewards, _ = group_of(guided_toy)
    other = Decoder(guided_toy.model.config, seed=1).eval()
    with torch.no_grad():
        other.guidance.level_weights.fill_(0.25)
    nobody = torch.zeros(6, 5, dtype=torch.bool)
    _, parts = loss_of(guided_toy, tokens, old, rewards, nobody, reference=other)
    prompts = guided_toy.prompts(range(6))
    policy, reference = (reference_levels(guided_toy, model, prompts, tokens) for model in (guided_toy.model, other))
    for number, (ours, theirs) in enumerate(zip(policy, reference, strict=True), start=1):
        rows = zip(ours.flatten(0, 1).tolist(), theirs.flatten(0, 1).tolist(), strict=True)
        by_answer = [sum(np.exp(p) * (p - q) for p, q in zip(*row, strict=True) if p > -np.inf) for row in rows]
        assert parts[f"kl_{number}"].item() == pytest.approx(np.mean(by_answer), abs=1e-6)
    assert parts["kl_1"].item() > 0.01
    assert parts["kl"].item() == pytest.approx(sum(parts[f"kl_{number}"].item() for number in (1, 2, 3)) / 3, rel=1e-5)


def test_experts_take_no_part_in_the_kl(toy, group):
    tokens, old, rewards, _ = group
    other = Decoder(toy.model.config, seed=9).eval()
    everyone = torch.ones(6, 5, dtype=torch.bool)
    _, parts = loss_of(toy, tokens, old, rewards, everyone, reference=other)
    assert parts["kl"].item() == 0.0


def test_expert_weight_scales_their_share_of_the_loss(toy, group):
    tokens, old, rewards, experts = group
    full, parts = loss_of(toy, tokens, old, rewards, experts)
    none, _ = loss_of(toy, tokens, old, rewards, experts, weight=0.0)
    expected = float((experts * -group_advantages(rewards)).mean())
    assert (full - none).item() == pytest.approx(expected, abs=1e-5)
    assert parts["expert_loss"].item() == pytest.approx(-group_advantages(rewards)[experts].mean().item(), abs=1e-5)


def test_anchor_is_supervised_and_leaves_the_group_alone(toy, group):
    tokens, old, rewards, experts = group
    anchors = torch.from_numpy(toy.sid_tokens[::2].astype(np.int64))[:, None]
    plain, before = loss_of(toy, tokens, old, rewards, experts)
    anchored, parts = loss_of(toy, tokens, old, rewards, experts, anchors=anchors, sft_anchor_weight=0.5)
    expected = -group_log_probs(toy.model, toy.prompts(range(6)), anchors).mean().item()
    assert parts["anchor_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert anchored.item() == pytest.approx(plain.item() + 0.5 * expected, rel=1e-4)
    assert parts["policy_loss"].item() == pytest.approx(before["policy_loss"].item(), abs=1e-6)


def test_without_policy_and_kl_the_gradient_is_that_of_supervised_training(any_toy):
    toy = any_toy
    tokens, old, rewards, experts = group_of(toy)
    logged = torch.from_numpy(toy.sid_tokens.astype(np.int64)).reshape(6, 2, 3)  # both SIDs of each request
    loss, parts = loss_of(
        toy, tokens, old - 100.0, rewards, experts, anchors=logged, policy_weight=0.0, kl_weight=0.0, sft_anchor_weight=1.0
    )  # ratios overflow, and must not matter
    assert not torch.isfinite(parts["policy_loss"])
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in toy.model.named_parameters()}
    toy.model.zero_grad()
    plain = -group_log_probs(toy.model, toy.prompts(range(6)), logged, support=toy.support, trie=toy.trie if toy.support == "trie" else None).mean()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, parameter in toy.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_policy_weight_scales_the_clipped_objective_alone(toy, group):
    tokens, old, rewards, experts = group
    other = Decoder(toy.model.config, seed=9).eval()
    loss, parts = loss_of(toy, tokens, old, rewards, experts, reference=other, policy_weight=0.25, kl_weight=2.0)
    assert loss.item() == pytest.approx(0.25 * parts["policy_loss"].item() + 2.0 * parts["kl"].item(), rel=1e-6)


def test_closed_groups_keep_their_kl_and_lose_their_share_of_the_policy_loss(any_toy):
    toy = any_toy
    tokens, old, rewards, experts = group_of(toy)
    rewards[:3] = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.5])  # a spread of 0.4
    rewards[3:] = torch.tensor([0.1, 1.0, 0.1, 0.1, 0.1])
    other = Decoder(toy.model.config, seed=9).eval()
    _, before = loss_of(toy, tokens, old + 0.05, rewards, experts, reference=other)
    gated, parts = loss_of(toy, tokens, old + 0.05, rewards, experts, reference=other, gate_min_spread=0.5)
    assert "gate_open" not in before
    assert parts["gate_open"].item() == 0.5
    assert parts["kl"].item() == pytest.approx(before["kl"].item(), rel=1e-6)
    alone = -(group_advantages(rewards)[3:] * np.exp(-0.05)).sum().item() / rewards.numel()  # all ratios are e^-0.05, inside the clip
    assert (gated - parts["kl"]).item() == pytest.approx(alone, abs=1e-5)
    assert parts["entropy_1"].item() == pytest.approx(before["entropy_1"].item())
    shut, parts = loss_of(toy, tokens, old, rewards, experts, gate_min_entropy=1e6)
    assert (parts["gate_open"].item(), shut.item()) == (0.0, pytest.approx(0.0, abs=1e-6))


def test_missing_answers_have_no_reward_and_no_part_in_kl_and_entropy(any_toy):
    toy = any_toy
    tokens, old, rewards, experts = group_of(toy)
    other = Decoder(toy.model.config, seed=9).eval()
    _, parts = loss_of(toy, tokens[:, 1:], old[:, 1:], rewards[:, 1:], experts[:, 1:], reference=other)
    missing, old = tokens.clone(), old.clone()
    missing[:, 0], old[:, 0] = -1, 0.0
    loss, with_missing = loss_of(toy, missing, old, rewards, experts, reference=other)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in toy.model.parameters())
    for name in ("kl", "kl_1", "kl_3", "entropy_1", "entropy_2", "expert_loss"):
        assert with_missing[name].item() == pytest.approx(parts[name].item(), abs=1e-6), name
    assert with_missing["policy_loss"].item() == pytest.approx(parts["policy_loss"].item() * 4 / 5, abs=1e-6)


def train(toy, *, num_experts, steps=60, requests=(0, 1, 2, 3, 4, 5), learning_rate=3e-3):
    """EG-GRPO in plain torch; returns p(clicked SID) per request before and after, and the mean reward of the samples in each step."""
    policy = Decoder(toy.model.config, seed=1)
    reference = Decoder(toy.model.config, seed=1).eval()
    worker = RolloutWorker(toy.model, toy.trie, RolloutConfig(seed=0, group_size=8, num_experts=num_experts, support=toy.support))
    index = SidIndex.build(np.arange(12, dtype=np.int32), 12, np.zeros(12))
    rewards_of = RewardModel(RewardConfig(), toy.feedback, index)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    prompts = toy.prompts(requests)
    clicked = torch.from_numpy(toy.sid_tokens[[2 * row for row in requests]].astype(np.int64))[:, None]

    def probability():
        with torch.no_grad():
            return group_log_probs(policy, prompts, clicked, support=toy.support, trie=toy.trie).sum(-1).exp()[:, 0]

    before, rewards = probability(), []
    for step in range(steps):
        worker.load(step, weights_of(policy))
        rollout = worker.sample(toy.task(requests, step=step))
        scored = rewards_of.score(rollout.request_rows, rollout.sid_rows)
        rewards.append(rollout_health(rollout, scored, np.ones(len(requests), dtype=bool))["reward"])
        tokens = torch.from_numpy(rollout.tokens).long()
        loss, _ = alignment_loss(
            policy,
            prompts.token_ids,
            prompts.lengths,
            prompts.soft,
            tokens,
            torch.from_numpy(rollout.log_probs),
            torch.from_numpy(scored.values),
            torch.from_numpy(rollout.experts),
            reference_levels(toy, reference, prompts, tokens),
            torch.tensor(1.0),
            objective=ObjectiveConfig(kl_weight=0.05),
            support=toy.support,
            trie=toy.trie,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, probability(), rewards


def test_eg_grpo_raises_the_probability_and_the_reward_of_clicked_sids(toy):
    before, after, rewards = train(toy, num_experts=2)
    assert (after > 3 * before).all()
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])


def test_a_guided_policy_learns_what_the_encoder_has_wrong(guided_toy):
    before, after, rewards = train(guided_toy, num_experts=2)
    assert (after > 3 * before).all()
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])


def test_experts_teach_where_samples_never_hit(toy):
    _, without, _ = train(toy, num_experts=0, steps=25)
    _, with_experts, _ = train(toy, num_experts=2, steps=25)
    assert with_experts.mean() > 1.5 * without.mean()


def test_requests_of_a_step_follow_from_seed_and_step():
    eligible = np.array([3, 5, 8, 13, 21], dtype=np.int64)
    first = draw_requests(eligible, seed=1, step=4, count=3)
    assert np.array_equal(first, draw_requests(eligible, seed=1, step=4, count=3))
    assert len(set(first.tolist())) == 3
    assert set(first.tolist()) <= set(eligible.tolist())
    others = [draw_requests(eligible, seed=1, step=step, count=3).tolist() for step in range(5, 25)]
    assert any(other != first.tolist() for other in others)


def test_head_queries_make_up_half_of_the_requests():
    queries = ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["d"]
    assert frequent_queries(queries).tolist() == [True] * 7 + [False] * 3


def test_health_of_a_step_by_hand():
    rollout = Rollout(
        version=0,
        request_rows=np.array([0, 1]),
        tokens=np.zeros((2, 3, 3), dtype=np.int32),
        sid_rows=np.array([[4, 4, 7], [-1, 2, 2]], dtype=np.int32),
        log_probs=np.zeros((2, 3, 3), dtype=np.float32),
        experts=np.array([[False, False, True], [False, False, False]]),
        stale_experts=1,
    )
    tiers = np.array([[EXPOSED, EXPOSED, CLICKED], [INVALID, CLICKED, VALID]], dtype=np.int8)
    rewards = Rewards(np.array([[0.5, 0.5, 1.0], [0.0, np.nan, 0.1]], dtype=np.float32), tiers)
    health = rollout_health(rollout, rewards, np.array([True, False]))
    assert health["reward"] == pytest.approx((0.5 + 0.5 + 0.0 + 0.1) / 4)  # the fifth sample has none
    assert health["group_reward"] == pytest.approx((0.5 + 0.5 + 1.0 + 0.0 + 0.1) / 5)
    assert health["valid_rate"] == pytest.approx(4 / 5)
    assert health["unique_sids"] == pytest.approx((1 + 1) / 2)  # the policy repeats 4 beside its expert, and 2 beside what is no SID
    assert health["zero_spread"] == 0.0
    assert health["unusable_rewards"] == pytest.approx(1 / 6)
    assert health["expert_share"] == pytest.approx(1 / 6)
    assert health["stale_experts"] == 1.0
    assert health["hit_rate"] == pytest.approx(1 / 5)
    assert (health["hit_rate_head"], health["hit_rate_tail"]) == (0.0, pytest.approx(1 / 3))
    assert [health[f"tier_{name}"] for name in ("invalid", "valid", "exposed", "clicked", "purchased")] == pytest.approx([0.2, 0.2, 0.4, 0.2, 0.0])


def test_health_leaves_missing_places_out_and_counts_groups_without_a_reward():
    rollout = Rollout(
        version=0,
        request_rows=np.array([0, 1, 2]),
        tokens=np.array([[[0, 0, 0], [0, 0, 1], [-1, -1, -1]]] * 3, dtype=np.int32),
        sid_rows=np.array([[0, 1, -1]] * 3, dtype=np.int32),
        log_probs=np.zeros((3, 3, 3), dtype=np.float32),
        experts=np.zeros((3, 3), dtype=bool),
        stale_experts=0,
    )
    values = np.array([[1.0, 0.5, 0.0], [np.nan, np.nan, 0.0], [0.5, 0.5, 0.0]], dtype=np.float32)
    health = rollout_health(rollout, Rewards(values, np.array([[CLICKED, EXPOSED, INVALID]] * 3, dtype=np.int8)), np.ones(3, dtype=bool))
    assert health["valid_rate"] == 1.0
    assert [health["reward"], health["group_reward"]] == pytest.approx([(1.0 + 0.5 + 0.5 + 0.5) / 4] * 2)
    nothing = rollout_health(rollout, Rewards(np.full_like(values, np.nan), np.zeros((3, 3), dtype=np.int8)), np.ones(3, dtype=bool))
    assert np.isnan([nothing["reward"], nothing["group_reward"]]).all()
    assert health["missing_answers"] == pytest.approx(1 / 3)
    assert health["empty_groups"] == pytest.approx(1 / 3)
    assert health["unusable_rewards"] == pytest.approx(2 / 6)
    assert health["zero_spread"] == pytest.approx(2 / 3)
    assert health["tier_invalid"] == 0.0


def test_mass_on_sids_is_found_from_samples_of_the_trie(toy):
    """Weighted by the probability that the trie gives them, the twelve SIDs' inside masses come to the sum of their probabilities without it."""
    prompts, sids = toy.prompts([0]), torch.from_numpy(toy.sid_tokens).long()[None]
    with torch.no_grad():
        without = group_log_probs(toy.model, prompts, sids, support="level").sum(-1).exp()[0]
        within = group_log_probs(toy.model, prompts, sids, support="trie", trie=toy.trie, return_level_log_probs=True)
    probabilities = within.log_probs.sum(-1).exp()[0]
    masses = [float(valid_mass(toy.model, prompts, sids, torch.arange(12)[None] != sid, within.levels)) for sid in range(12)]
    assert float(probabilities.sum()) == pytest.approx(1.0)
    assert 0.05 < float(without.sum()) < 0.5  # twelve of 64 answers, of a decoder that knows nothing
    assert float((probabilities * torch.tensor(masses)).sum()) == pytest.approx(float(without.sum()), abs=1e-5)


def test_impossible_objectives_are_listed_together():
    with pytest.raises(ConfigError, match=r"(?s)clip_low: expected between 0 and 1, got 1.5.*clip_high: expected above 0.*kl_weight: expected at least 0"):
        from_dict(ObjectiveConfig, {"clip_low": 1.5, "clip_high": 0.0, "kl_weight": -1.0})


def test_objective_without_any_weight_or_effect_is_refused():
    with pytest.raises(ConfigError, match="policy_weight, kl_weight, sft_anchor_weight: all are 0, so nothing is trained"):
        from_dict(ObjectiveConfig, {"policy_weight": 0.0, "kl_weight": 0.0})
    with pytest.raises(ConfigError, match="sft_anchors: 3 have no effect without sft_anchor_weight"):
        from_dict(ObjectiveConfig, {"sft_anchors": 3})
    with pytest.raises(ConfigError, match=r"(?s)policy_weight: expected at least 0, got -1.*sft_anchors: expected at least 1, got 0"):
        from_dict(ObjectiveConfig, {"policy_weight": -1.0, "sft_anchors": 0})
    with pytest.raises(ConfigError, match="gate_min_entropy, gate_min_spread: have no effect with policy_weight 0"):
        from_dict(ObjectiveConfig, {"policy_weight": 0.0, "gate_min_spread": 0.1})
    from_dict(ObjectiveConfig, {"policy_weight": 0.0, "kl_weight": 0.0, "sft_anchor_weight": 1.0, "sft_anchors": 8})
