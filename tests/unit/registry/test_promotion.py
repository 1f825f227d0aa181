"""A version's way: registered, challenger, champion through the gates, and back."""

from __future__ import annotations

import re

import mlflow
import pandas as pd
import pytest

from genrecall.config import ConfigError, apply_overrides
from genrecall.evaluation.gates import GateConfig
from genrecall.registry import promotion
from genrecall.registry.bundle import BundleConfig, build_bundle
from genrecall.registry.promotion import RegistryConfig, aliases_of, current_champion, least_covered, promote, register, rollback
from genrecall.registry.versions import RegistryError, resolve

GATES = GateConfig(guarded=("channels/generative/recall@100",), required_lower_bounds=())


@pytest.fixture
def versions(registry, untrained_line):
    """Two versions: recall .50 and .45."""
    return register(untrained_line(recall=0.5), "shop", metrics={"a": 0.5}), register(untrained_line(seed=1, recall=0.45), "shop", metrics={"a": 0.45})


def aliases(registry):
    return {alias: int(number) for alias, number in registry.get_registered_model("shop").aliases.items()}


def test_a_new_version_becomes_challenger(registry, versions):
    assert [version.number for version in versions] == [1, 2]
    assert aliases(registry) == {"challenger": 2}
    assert current_champion("shop") is None


def test_registering_the_same_bundle_again_keeps_its_version(registry, versions, untrained_line):
    assert register(untrained_line(recall=0.5), "shop", metrics={}) == versions[0]
    assert len(registry.search_model_versions("name='shop'")) == 2


@pytest.mark.parametrize("cut_at", ["set_model_version_tag", "set_registered_model_alias"])
def test_a_registration_that_was_cut_short_is_made_whole_by_the_next(registry, untrained_line, monkeypatch, cut_at):
    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.tracking.MlflowClient, cut_at, cut)
        with pytest.raises(KeyboardInterrupt):
            register(untrained_line(), "shop", metrics={})
    version = register(untrained_line(), "shop", metrics={})
    assert aliases_of(version) == ["challenger"]
    assert aliases(registry) == {"challenger": version.number}
    assert register(untrained_line(), "shop", metrics={}) == version


def test_a_challenger_is_usable_from_the_moment_it_has_the_alias(registry, untrained_line, monkeypatch):
    seen = []
    set_alias = mlflow.tracking.MlflowClient.set_registered_model_alias

    def looked(client, name, alias, number):
        set_alias(client, name, alias, number)
        seen.append(resolve(f"models:/{name}@{alias}", client).number)

    monkeypatch.setattr(mlflow.tracking.MlflowClient, "set_registered_model_alias", looked)
    assert register(untrained_line(), "shop", metrics={}).number == 1
    assert seen == [1]


def test_metrics_are_linked_to_the_logged_model(registry, versions):
    logged = registry.get_logged_model(registry.get_model_version("shop", "1").source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in logged.metrics} == {"a": 0.5}


def test_a_version_is_registered_from_inside_a_run_too(registry, untrained_line):
    with mlflow.start_run() as run:
        version = register(untrained_line(), "shop", metrics={})
    assert registry.get_model_version("shop", str(version.number)).run_id == run.info.run_id


def test_the_first_champion_passes_alone_and_the_challenger_alias_goes(registry, versions):
    report = promote(versions[1], GATES)
    assert report.passed
    assert aliases(registry) == {"champion": 2}


def test_a_worse_version_is_held_back_with_the_reason(registry, versions):
    promote(versions[0], GATES)
    report = promote(versions[1], GATES)
    assert not report.passed
    assert report.reasons == [
        "channels/generative/recall@100: 0.4500 (0.4400 to 0.4600), the champion has 0.5000 (0.4900 to 0.5100): it falls by 10.0%, at most 5.0% is allowed"
    ]
    assert aliases(registry) == {"champion": 1, "challenger": 2}


def test_a_version_that_was_judged_against_another_champion_is_not_promoted(registry, versions, untrained_line, monkeypatch):
    third = register(untrained_line(seed=2, recall=0.6), "shop", metrics={})
    promote(versions[1], GATES)
    fetch = promotion.fetch_metrics

    def another_job_is_faster(version, client):
        monkeypatch.setattr(promotion, "fetch_metrics", fetch)
        assert promote(third, GATES).passed
        return fetch(version, client)

    monkeypatch.setattr(promotion, "fetch_metrics", another_job_is_faster)
    report = promote(versions[0], GATES)
    assert not report.passed
    assert report.reasons == ["shop/3 became the champion meanwhile, the gates judged against shop/2; promote again"]
    assert aliases(registry) == {"champion": 3}
    assert rollback("shop") == versions[1]


def test_promoting_the_champion_changes_nothing(registry, versions):
    promote(versions[0], GATES)
    assert promote(versions[0], GATES).reasons == ["shop/1 is the champion already"]


def test_rollback_gives_champion_back_one_step_at_a_time(registry, versions, untrained_line):
    third = register(untrained_line(seed=2, recall=0.6), "shop", metrics={})
    for version in (versions[1], versions[0], third):
        assert promote(version, GATES).passed
    assert aliases(registry) == {"champion": 3}
    assert rollback("shop") == versions[0]
    assert rollback("shop") == versions[1]
    with pytest.raises(RegistryError, match="shop: version 2 was the first champion; there is nothing to roll back to"):
        rollback("shop")
    assert aliases(registry) == {"champion": 2}


def test_a_version_that_was_rolled_back_from_is_promoted_again_only_by_name(registry, versions, untrained_line):
    for version in versions[::-1]:
        promote(version, GATES)
    assert rollback("shop") == versions[1]
    again = register(untrained_line(recall=0.5), "shop", metrics={})  # what a scheduled run finds where no artifact changed
    assert again == versions[0]
    report = promote(again, GATES)
    assert not report.passed
    (reason,) = report.reasons
    assert re.fullmatch(r"shop/1 was rolled back from at 20\d\d-\S+\+00:00; train another, or name it: jobs/promote\.py --version 1", reason)
    assert aliases(registry) == {"champion": 2}
    assert promote(again, GATES, named=True).passed
    assert aliases(registry) == {"champion": 1}
    assert "genrecall.rolled_back_at" not in registry.get_model_version("shop", "1").tags
    assert promote(versions[0], GATES).passed  # it is the champion already
    assert rollback("shop") == versions[1]
    assert not promote(again, GATES).passed


def test_naming_a_version_that_was_rolled_back_from_opens_no_gate(registry, versions):
    for version in versions:
        promote(version, GateConfig(guarded=(), required_lower_bounds=()))
    rollback("shop")
    assert not promote(versions[1], GATES, named=True).passed
    assert "genrecall.rolled_back_at" in registry.get_model_version("shop", "2").tags


def test_rollback_without_a_champion_says_so(registry, versions):
    for name in ("shop", "unknown"):
        with pytest.raises(RegistryError, match=f"{name}: has no champion to roll back from"):
            rollback(name)


def test_a_champion_that_others_registered_stops_promotion(registry, versions):
    foreign = registry.create_model_version("shop", "/nowhere")
    registry.set_registered_model_alias("shop", "champion", foreign.version)
    with pytest.raises(RegistryError, match="was not registered by genrecall"):
        promote(versions[0], GATES)


def test_mlflow_itself_can_score_a_version(registry, versions):
    model = mlflow.pyfunc.load_model("models:/shop/1")
    answers = model.predict(pd.DataFrame({"query": ["angle bracket", ""]}), params={"limit": 3, "beam_size": 4})
    assert [len(answer) for answer in answers] == [3, 3]
    assert all(item.startswith("i") for answer in answers for item in answer)
    assert resolve("models:/shop/1", registry) == versions[0]


def test_a_model_name_that_no_address_can_hold_is_a_config_error():
    with pytest.raises(ConfigError, match="model_name: expected letters"):
        apply_overrides(RegistryConfig(), ["model_name=a/b"])


def test_the_log_may_be_compacted_as_far_as_the_versions_an_alias_move_away_cover(registry, untrained_line, tmp_path):
    assert least_covered("shop") is None
    for number, covered in enumerate((40, 30, 50), start=1):
        config = BundleConfig(warm_up_beam_size=5, catalog_seq=covered)
        bundle = build_bundle(config, **untrained_line.parts(), uri=str(tmp_path / f"bundle{number}"))
        version = register(bundle, "shop", metrics={})
        assert registry.get_model_version("shop", str(version.number)).tags["genrecall.catalog_seq"] == str(covered)
    assert least_covered("shop") == (50, 3)  # the challenger alone
    first, second = (resolve(f"models:/shop/{number}", registry) for number in (1, 2))
    promote(first, GATES)
    assert least_covered("shop") == (40, 1)
    promote(second, GATES)
    assert least_covered("shop") == (30, 2)
    registry.delete_model_version_tag("shop", "1", "genrecall.catalog_seq")  # the champion before, registered by an older release
    assert least_covered("shop") == (0, 1)
    registry.delete_model_version("shop", "1")  # nothing goes back to it
    assert least_covered("shop") == (30, 2)
