"""The whole line at the recipe `tiny`: what comes out, what a rerun does, how jobs refuse bad settings."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from genrecall.config import ConfigError, apply_overrides
from genrecall.evaluation.results_table import results_table
from genrecall.pipeline import Pipeline, example_request, promote_if_it_passes, register_bundle
from genrecall.recipes import RECIPES
from genrecall.registry.bundle import load_bundle
from genrecall.registry.versions import fetch_bundle, resolve
from genrecall.rl.eg_grpo import tags_of

ROOT = Path(__file__).parent.parent.parent


def test_every_stage_left_its_artifact(tiny_pipeline: Pipeline) -> None:
    for name in ("dataset", "encoder", "cqsid/quantizer", "cqsid/sid_index", "cqsid/generator", "rqvae/generator", "ranker", "aligned", "evaluation", "bundle"):
        assert tiny_pipeline.existing(name).manifest["files"], name


def test_the_results_table_has_the_channels_and_both_sid_variants(tiny_pipeline: Pipeline) -> None:
    table = results_table(tiny_pipeline.existing("evaluation").json("metrics.json"))
    for row in ("BM25", "dense two-tower", "generative (ours)", "RRF of BM25 + dense + generative", "RQ-VAE", "CQ-SID"):
        assert row in table


def test_the_generative_channel_beats_popularity_even_at_this_size(tiny_pipeline: Pipeline) -> None:
    records = tiny_pipeline.existing("evaluation").json("metrics.json")["records"]
    recall = {one["row"]: one["value"] for one in records if one["table"] == "channels" and one["metric"] == "recall@10" and not one["slice"]}
    assert recall["generative"] > recall["popularity"]


def test_a_rerun_skips_every_stage(tiny_pipeline: Pipeline) -> None:
    before = {name: artifact.manifest["created"] for name, artifact in tiny_pipeline.run_all().items()}
    again = Pipeline(tiny_pipeline.recipe, tiny_pipeline.where).run_all()
    assert {name: artifact.manifest["created"] for name, artifact in again.items()} == before


def test_a_changed_setting_reruns_its_stage_and_those_after_it_only(tiny_pipeline: Pipeline) -> None:
    recipe = dataclasses.replace(tiny_pipeline.recipe, ranker=dataclasses.replace(tiny_pipeline.recipe.ranker, trees=7))
    other = Pipeline(recipe, tiny_pipeline.where)
    encoder, ranker = tiny_pipeline.existing("encoder"), tiny_pipeline.existing("ranker")
    assert other.encoder().hash == encoder.hash
    assert other.ranker().hash != ranker.hash
    assert tiny_pipeline.ranker().hash == ranker.hash  # made again as it was: the same trees


def test_registered_version_is_champion_and_holds_the_bundle(tiny_pipeline: Pipeline) -> None:
    version = register_bundle(tiny_pipeline)
    assert promote_if_it_passes(version, tiny_pipeline.recipe) == "champion"
    assert register_bundle(tiny_pipeline) == version
    client = MlflowClient()
    assert resolve(f"models:/{version.name}@champion", client) == version
    bundle = load_bundle(fetch_bundle(version, client))
    [title] = [item["title"] for item in bundle.shown([0])]
    [result] = bundle.retriever.recall([title], [None], [None], [np.zeros(0, np.int32)], beam_size=10, limit=10)
    assert len(result.item_rows) == 10


def test_the_example_request_asks_what_shoppers_ask_most(tiny_pipeline: Pipeline) -> None:
    dataset = tiny_pipeline.existing("dataset")
    body = json.loads(example_request(dataset))
    queries = [query for file in dataset.file("requests/test").glob("*.parquet") for query in pq.read_table(file)["query"].to_pylist()]
    assert body["limit"] == 5
    assert queries.count(body["query"]) == max(queries.count(query) for query in set(queries)) > 0


def test_how_the_alignment_ended_is_on_its_mlflow_run(tiny_pipeline: Pipeline) -> None:
    facts = tiny_pipeline.existing("aligned").json("training.json")
    runs = MlflowClient().search_runs([mlflow.get_experiment_by_name("genrecall").experiment_id], filter_string="tags.`mlflow.runName` = 'aligned'")
    tags = next(run.data.tags for run in runs if run.data.tags["artifact.reused"] == "false")
    assert {name: tags[name] for name in tags_of(facts)} == tags_of(facts)
    assert (tags["alignment.stopped"], tags["alignment.kept_step"]) == ("no", "3")
    assert tags["alignment.limit.kl"] == "at most 1"


def test_the_models_metrics_are_linked_to_it_in_mlflow(tiny_pipeline: Pipeline) -> None:
    version = register_bundle(tiny_pipeline)
    source = MlflowClient().get_model_version(version.name, str(version.number)).source
    metrics = {metric.key for metric in mlflow.get_logged_model(source.removeprefix("models:/")).metrics}
    assert "channels/generative/recall_at_100" in metrics


def test_stage_runs_say_what_they_made(tiny_pipeline: Pipeline) -> None:
    runs = MlflowClient().search_runs([mlflow.get_experiment_by_name("genrecall").experiment_id], filter_string="tags.`mlflow.runName` = 'encoder'")
    assert tiny_pipeline.existing("encoder").hash in {run.data.tags["artifact.hash"] for run in runs}
    assert any("loss" in run.data.metrics for run in runs)


def test_all_recipes_can_be_built_and_agree_with_themselves() -> None:
    for name, recipe in RECIPES.items():
        assert apply_overrides(recipe(), []).name == name


def test_a_recipe_without_the_served_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="variants: must hold 'cqsid'"):
        apply_overrides(RECIPES["tiny"](), ['variants=["rqvae"]'])


@pytest.mark.parametrize("job", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_jobs_explain_themselves(job: str) -> None:
    assert (ROOT / "jobs" / f"{job}.py").read_text().count("\n") <= 80
    assert (ROOT / "jobs" / f"{job}.py").read_text().startswith('"""')


def test_a_job_lists_all_bad_settings_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train_encoder.py"), "--recipe", "tiny", "encoder.stepz=3", "generator.vocab_size=many"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2
    assert "encoder.stepz: unknown key; did you mean 'encoder.steps'?" in done.stderr
    assert "generator.vocab_size: expected int, got 'many'" in done.stderr
    assert not list(tmp_path.iterdir())
