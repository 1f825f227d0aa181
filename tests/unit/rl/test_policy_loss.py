"""The terms of the EG-GRPO objective, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from genrecall.rl import policy_loss


def logs(*ratios: float) -> torch.Tensor:
    """Log-probabilities [1, 1, L] whose ratio to 0 is the given one."""
    return torch.log(torch.tensor([[ratios]]))


def objective(log_probs, advantage, **kwargs):
    kwargs = {"clip_low": 0.2, "clip_high": 0.3, **kwargs}
    return policy_loss.clipped_objective(log_probs, torch.zeros_like(log_probs), torch.tensor([[advantage]]), **kwargs)


def test_loss_is_minus_the_mean_clipped_ratio_times_advantage():
    # A = 2: min(1.1 * 2, same) = 2.2; ratio 1.5 clips to 1.3: 2.6; ratio 0.5 stays (the smaller): 1.0. Mean 5.8 / 3.
    result = objective(logs(1.1, 1.5, 0.5), 2.0)
    assert result.loss.item() == pytest.approx(-(2.2 + 2.6 + 1.0) / 3, rel=1e-6)
    assert result.clipped.tolist() == [[[False, True, False]]]
    assert result.ratio[0, 0].tolist() == pytest.approx([1.1, 1.5, 0.5])


def test_negative_advantage_clips_on_the_other_side():
    # A = -1: ratio 1.5 -> min(-1.5, -1.3) = -1.5 unclipped; ratio 0.5 -> min(-0.5, -0.8) = -0.8 clipped; 1.0 -> -1.
    result = objective(logs(1.5, 0.5, 1.0), -1.0)
    assert result.loss.item() == pytest.approx((1.5 + 0.8 + 1.0) / 3, rel=1e-6)
    assert result.clipped.tolist() == [[[False, True, False]]]


def test_clipped_token_gets_no_gradient():
    log_probs = logs(1.5, 1.1, 1.0).requires_grad_()
    objective(log_probs, 1.0).loss.backward()
    assert log_probs.grad[0, 0].tolist() == pytest.approx([0.0, -1.1 / 3, -1.0 / 3])


def test_on_policy_gradient_is_the_policy_gradient():
    log_probs = logs(1.0, 1.0, 1.0).requires_grad_()
    objective(log_probs, 0.7).loss.backward()
    assert log_probs.grad[0, 0].tolist() == pytest.approx([-0.7 / 3] * 3)


def test_weights_scale_answers():
    log_probs = torch.zeros(1, 2, 3)
    result = policy_loss.clipped_objective(log_probs, log_probs, torch.tensor([[1.0, 1.0]]), clip_low=0.2, clip_high=0.2, weights=torch.tensor([[1.0, 0.5]]))
    assert result.loss.item() == pytest.approx(-0.75)
    assert result.per_answer.tolist() == [[-1.0, -1.0]]


def test_expert_weights_fall_linearly_to_zero():
    weight = [policy_loss.decayed_expert_weight(step, start=2.0, decay_steps=4) for step in range(6)]
    assert weight == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert policy_loss.decayed_expert_weight(1000, start=2.0, decay_steps=0) == 2.0


def test_ablation_gives_experts_ratio_one_and_keeps_their_gradient():
    log_probs = torch.tensor([[[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]]], requires_grad=True)
    old = torch.full((1, 2, 3), -2.0)
    old_one = policy_loss.ratio_one_for(torch.tensor([[False, True]]), log_probs, old)
    assert old_one.tolist() == [[[-2.0, -2.0, -2.0], [-1.0, -1.0, -1.0]]]
    result = policy_loss.clipped_objective(log_probs, old_one, torch.tensor([[0.0, 1.0]]), clip_low=0.2, clip_high=0.2)
    result.loss.backward()
    assert log_probs.grad[0, 1].tolist() == pytest.approx([-1 / 6] * 3)


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"expected log_probs and old_log_probs \[B, G, L\] with advantages \[B, G\]"):
        policy_loss.clipped_objective(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 3), clip_low=0.1, clip_high=0.1)


def test_kl_of_two_coins():
    policy, reference = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert policy_loss.exact_kl(policy, reference).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_kl_ignores_codes_outside_the_support_and_has_a_finite_gradient():
    logits = torch.tensor([1.0, 2.0, -torch.inf], requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 0.0, -torch.inf]), dim=-1)
    kl = policy_loss.exact_kl(torch.log_softmax(logits, dim=-1), reference)
    p = 1 / (1 + math.e)
    assert kl.item() == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)), rel=1e-5)
    kl.backward()
    assert torch.isfinite(logits.grad).all()


def test_kl_of_a_policy_to_itself_is_zero_with_zero_gradient():
    logits = torch.randn(4, 7, requires_grad=True)
    log_policy = torch.log_softmax(logits, dim=-1)
    kl = policy_loss.exact_kl(log_policy, log_policy.detach())
    kl.sum().backward()
    assert kl.abs().max().item() < 1e-6
    assert logits.grad.abs().max().item() < 1e-6


def test_sample_mean_leaves_experts_out():
    experts = torch.tensor([[False, False, True]])
    assert policy_loss.mean_over_samples(torch.tensor([[1.0, 3.0, 100.0]]), experts).item() == 2.0
    assert policy_loss.mean_over_samples(torch.ones(1, 3, 2), experts).item() == 1.0
    assert policy_loss.mean_over_samples(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)).item() == 0.0


def test_entropy_of_a_uniform_level_is_the_log_of_its_size():
    assert policy_loss.entropy(torch.log_softmax(torch.zeros(2, 8), dim=-1)).tolist() == pytest.approx([math.log(8)] * 2)
    assert policy_loss.entropy(torch.tensor([0.0, -torch.inf])).item() == 0.0


def test_mass_inside_a_support_is_the_product_of_the_levels_shares():
    # One prompt, two answers. Level 1 (shared): 0.8 inside. Level 2: 0.5 and all. Level 3: 0.25 and 0.1.
    levels = [torch.tensor(one).log() for one in ([[[0.5, 0.3, 0.2]]], [[[0.5, 0.5], [0.9, 0.1]]], [[[0.25, 0.75], [0.9, 0.1]]])]
    inside = [torch.tensor(one) for one in ([[[True, True, False]]], [[[True, False], [True, True]]], [[[True, False], [False, True]]])]
    torch.testing.assert_close(policy_loss.inside_mass(levels, inside), torch.tensor([[0.8 * 0.5 * 0.25, 0.8 * 1.0 * 0.1]]))


def test_anchor_is_the_mean_negative_log_probability_of_present_answers():
    log_probs = torch.tensor([[[-1.0, -2.0, -3.0]], [[-9.0, -9.0, -9.0]]])
    assert policy_loss.sft_anchor(log_probs, torch.tensor([[True], [False]])).item() == pytest.approx(2.0)
    assert policy_loss.sft_anchor(log_probs, torch.tensor([[False], [False]])).item() == 0.0


def test_gate_opens_where_the_policy_is_uncertain_and_the_reward_tells_answers_apart():
    # Spreads: 0.9, 0.4, 0.9, 0.4 without the nan, none with one reward, none without any.
    nan = math.nan
    rewards = torch.tensor([[0.1, 1.0, 0.5], [0.1, 0.5, 0.1], [0.1, 1.0, 0.1], [nan, 0.1, 0.5], [nan, nan, 1.0], [nan, nan, nan]])
    entropy = torch.tensor([2.0, 2.0, 0.5, 2.0, 2.0, 2.0])
    gate = policy_loss.open_groups(entropy, rewards, min_entropy=1.0, min_spread=0.5)
    assert gate.tolist() == [True, False, False, False, False, False]
    assert policy_loss.open_groups(entropy, rewards, min_entropy=0.0, min_spread=0.3).tolist() == [True, True, True, True, False, False]
    assert policy_loss.open_groups(entropy, rewards, min_entropy=0.0, min_spread=0.0).all()


def test_entropy_of_answers_adds_the_levels_up_over_own_samples():
    by_level = torch.tensor([[[1.0, 0.5, 0.25], [1.0, 1.5, 0.75], [1.0, 9.0, 9.0]], [[1.0, 1.0, 1.0]] * 3])
    left_out = torch.tensor([[False, False, True], [True, True, True]])
    assert policy_loss.answer_entropy(by_level, left_out).tolist() == pytest.approx([1.0 + 1.0 + 0.5, 0.0])
