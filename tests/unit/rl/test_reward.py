"""Rewards: tiers, the ranking model, both; the cache; what has no reward."""

from __future__ import annotations

import math

import mlflow
import numpy as np
import pytest

from genrecall.config import ConfigError, from_dict, to_dict
from genrecall.rl.feedback import CLICKED, EXPOSED, INVALID, PURCHASED, VALID, Feedback
from genrecall.rl.reward import RewardActor, RewardConfig, RewardModel
from genrecall.sid.index import SidIndex, load_index

# SIDs 0 to 3 with items {0, 1}, {2}, {3, 4, 5}, {}; request 0 bought SID 0, clicked SID 1, saw SID 2.
INDEX = SidIndex.build(np.array([0, 0, 1, 2, 2, 2], dtype=np.int32), 4, np.array([1.0, 2.0, 0.0, 1.0, 3.0, 2.0]))
FEEDBACK = Feedback(4, np.array([0, 3, 3]), np.array([0, 1, 2], dtype=np.int32), np.array([PURCHASED, CLICKED, EXPOSED], dtype=np.int8))
ANSWERS = np.array([[0, 1, 2, 3, -1]], dtype=np.int32)
REQUEST = np.array([0])


class CountingScorer:
    """Scores item i of request r as (i + 1) / 10 + r / 100 and remembers the pairs it was asked about."""

    def __init__(self, scores=None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.scores = scores

    def __call__(self, request_rows, item_rows):
        self.asked += list(zip(request_rows.tolist(), item_rows.tolist(), strict=True))
        return (item_rows + 1) / 10 + request_rows / 100 if self.scores is None else self.scores[item_rows]


def test_feedback_rewards_follow_the_tiers():
    rewards = RewardModel(RewardConfig(clicked=0.9), FEEDBACK, INDEX).score(REQUEST, ANSWERS)
    assert rewards.values[0].tolist() == pytest.approx([1.0, 0.9, 0.5, 0.1, 0.0])
    assert rewards.tiers[0].tolist() == [PURCHASED, CLICKED, EXPOSED, VALID, INVALID]


def test_ranker_reward_is_that_of_the_best_of_the_first_items():
    # Served order of SID 2 by prior: items 4, 5, 3. With two items a SID: max(.5, .6) = .6; SID 0: items 1, 0: .2; SID 1: item 2: .3; SID 3: none.
    scorer = CountingScorer()
    rewards = RewardModel(RewardConfig(mode="ranker", ranker_items=2), FEEDBACK, INDEX, scorer).score(REQUEST, ANSWERS)
    assert rewards.values[0].tolist() == pytest.approx([0.1 + 0.9 * 0.2, 0.1 + 0.9 * 0.3, 0.1 + 0.9 * 0.6, 0.1, 0.0])
    assert rewards.tiers[0].tolist() == [PURCHASED, CLICKED, EXPOSED, VALID, INVALID]
    assert (0, 3) not in scorer.asked


def test_mixed_reward_is_the_weighted_mean():
    config = RewardConfig(mode="mixed", ranker_share=0.25, ranker_items=1)
    rewards = RewardModel(config, FEEDBACK, INDEX, CountingScorer()).score(REQUEST, ANSWERS)
    assert rewards.values[0, 1] == pytest.approx(0.75 * 1.0 + 0.25 * (0.1 + 0.9 * 0.3))
    assert rewards.values[0, 4] == 0.0


def test_pairs_are_scored_once():
    scorer = CountingScorer()
    model = RewardModel(RewardConfig(mode="ranker"), FEEDBACK, INDEX, scorer)
    first = model.score(np.array([0, 1]), np.array([[2, 2, 0], [2, -1, 2]], dtype=np.int32))
    assert len(scorer.asked) == len(set(scorer.asked)) == 3 + 2 + 3
    again = model.score(np.array([1, 0]), np.array([[2, 2, 2], [0, 2, -1]], dtype=np.int32))
    assert len(scorer.asked) == 8
    assert again.values[0].tolist() == [first.values[1, 0]] * 3
    assert again.values[1].tolist() == [first.values[0, 2], first.values[0, 0], 0.0]


def test_cache_stays_bounded():
    scorer = CountingScorer()
    model = RewardModel(RewardConfig(mode="ranker", cache_size=1), FEEDBACK, INDEX, scorer)
    model.score(REQUEST, np.array([[0, 1]], dtype=np.int32))
    assert len(model._cache) == 1
    model.score(REQUEST, np.array([[0]], dtype=np.int32))
    assert scorer.asked.count((0, 0)) == 2


def test_nan_of_the_ranking_model_is_no_reward_and_is_asked_again():
    scorer = CountingScorer(np.array([0.5, 0.5, math.nan, 0.5, 0.5, 0.5]))
    model = RewardModel(RewardConfig(mode="ranker"), FEEDBACK, INDEX, scorer)
    values = model.score(REQUEST, ANSWERS).values[0]
    assert math.isnan(values[1])
    assert np.isfinite(np.delete(values, 1)).all()
    model.score(REQUEST, ANSWERS)
    assert scorer.asked.count((0, 2)) == 2


def test_ranker_mode_without_ranker_is_refused():
    with pytest.raises(ValueError, match=r"reward\.mode='mixed' needs a ranking model"):
        RewardModel(RewardConfig(mode="mixed"), FEEDBACK, INDEX)


def test_impossible_settings_are_listed_together():
    with pytest.raises(ConfigError, match=r"(?s)invalid <= valid <= exposed <= clicked <= purchased.*ranker_share.*ranker_items"):
        from_dict(RewardConfig, {"valid": 0.7, "ranker_share": 1.5, "ranker_items": 0})


def test_settings_of_a_ranker_that_is_not_asked_are_refused():
    for setting in ({"ranker_share": 0.25}, {"ranker_items": 5}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))}: has no effect with mode 'feedback'; leave it out"):
            from_dict(RewardConfig, setting)
        from_dict(RewardConfig, {"mode": "mixed", **setting})
    with pytest.raises(ConfigError, match="ranker_share: has no effect with mode 'ranker'"):
        from_dict(RewardConfig, {"mode": "ranker", "ranker_share": 0.25})


def test_a_call_of_the_ranking_model_that_fails_gives_no_reward_is_counted_and_asked_again():
    calls = []

    def fails_first(request_rows, item_rows):
        calls.append(len(item_rows))
        if len(calls) == 1:
            raise TimeoutError("busy")
        return np.full(len(item_rows), 0.5)

    model = RewardModel(RewardConfig(mode="mixed"), FEEDBACK, INDEX, fails_first)
    first, second = model.score(REQUEST, ANSWERS), model.score(REQUEST, ANSWERS)
    assert (first.failed_calls, second.failed_calls) == (1, 0)
    assert np.isnan(first.values[0]).tolist() == [True, True, True, False, False]  # SID 3 has no item and -1 is no SID: nothing to ask about
    assert first.tiers.tolist() == second.tiers.tolist()
    assert second.values[0].tolist() == pytest.approx([0.5 * tier + 0.5 * (0.1 + 0.9 * p) for tier, p in ((1, 0.5), (1, 0.5), (0.5, 0.5), (0.1, 0))] + [0.0])
    assert calls == [6, 6]


def test_registry_ranker_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"(?s)has no effect with mode 'feedback'.*runs its code; set trust_pyfunc=true"):
        from_dict(RewardConfig, {"ranker_uri": "models:/ours@champion"})
    with pytest.raises(ConfigError, match=r"expected models:/NAME@ALIAS or models:/NAME/VERSION, got 's3://x'"):
        from_dict(RewardConfig, {"mode": "ranker", "ranker_uri": "s3://x", "trust_pyfunc": True})
    with pytest.raises(ConfigError, match="trust_pickles: has no effect without ranker_uri"):
        from_dict(RewardConfig, {"mode": "ranker", "trust_pickles": True})
    with pytest.raises(ConfigError, match=r"(?s)max_failures.*timeout_s: expected above 0"):
        from_dict(RewardConfig, {"timeout_s": 0.0, "max_failures": 0})
    from_dict(RewardConfig, {"mode": "mixed", "ranker_uri": "models:/ours/3", "trust_pyfunc": True})


RANKER_CODE = """
import mlflow.pyfunc

class ByPopularity(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input["log_popularity"].to_numpy()

mlflow.models.set_model(ByPopularity())
"""


def test_the_reward_actor_scores_with_a_ranker_of_the_registry(registry, untrained_line, tmp_path):
    (tmp_path / "by_popularity.py").write_text(RANKER_CODE)
    with mlflow.start_run():
        mlflow.pyfunc.log_model(name="ranker", python_model=str(tmp_path / "by_popularity.py"), registered_model_name="ours", pip_requirements=[])
    parts = untrained_line.parts()
    config = RewardConfig(mode="ranker", ranker_uri="models:/ours/1", trust_pyfunc=True)
    uris = {name: parts[name].uri for name in ("dataset", "sid_index", "encoder")}
    actor = RewardActor({**uris, "reward": to_dict(config), "tracking_uri": mlflow.get_tracking_uri()})
    index = load_index(parts["sid_index"].path)
    clicked = int(index.item_sid[0])  # i00, the only item with clicks
    other = next(sid for sid in range(len(index)) if sid != clicked)
    rewards = actor.score(np.array([0]), np.array([[clicked, other, -1]], dtype=np.int32))
    assert rewards.values[0, 0] > rewards.values[0, 1] + 0.2
    assert 0.1 < rewards.values[0, 1] < 0.5
    assert rewards.values[0, 2] == 0.0
    assert rewards.failed_calls == 0
