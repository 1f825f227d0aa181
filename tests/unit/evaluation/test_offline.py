"""The stage on a hand-made line of artifacts (untrained models): what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genrecall.config import ConfigError, apply_overrides
from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.evaluation.baselines import Bm25, document_texts
from genrecall.evaluation.channels import build_channels
from genrecall.evaluation.evaluated_data import load_evaluated
from genrecall.evaluation.evaluation_config import EvaluationConfig
from genrecall.evaluation.gates import GateConfig, check_gates
from genrecall.evaluation.leaks import LeakError
from genrecall.evaluation.offline import evaluate
from genrecall.evaluation.offline_records import ab_sample
from genrecall.evaluation.records import find, headline_metrics
from genrecall.evaluation.results_table import results_table, row_name
from genrecall.generator.model import Decoder
from genrecall.generator.retriever import load_retriever
from genrecall.generator.spelling import SpellingCorrector
from genrecall.recipes import MAIN_VARIANT, VARIANTS
from genrecall.storage import Artifact

CONFIG = EvaluationConfig(beams=(1, 5, 10), cut_beams=(2, 10), item_budgets=(3, 10, 20), cuts=(10, 20), depth=20, bootstrap_samples=100, cut_items=5)


@pytest.fixture(scope="module")
def evaluation(line: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    uri = str(tmp_path_factory.mktemp("evaluation") / "evaluation")
    parts = {"dataset": line.dataset, "encoder": line.encoder, "sid_indexes": line.sid_indexes, "generators": line.generators, "aligned": line.aligned}
    return evaluate(CONFIG, uri=uri, **parts)


@pytest.fixture(scope="module")
def metrics(evaluation: Artifact) -> dict[str, Any]:
    return dict(evaluation.json("metrics.json"))


def test_every_table_and_row_is_there(metrics: dict[str, Any]) -> None:
    rows = {(record["table"], record["row"]) for record in metrics["records"]}
    channels = {"bm25", "dense", "popularity", "guidance", "generative", "rrf_bm25_dense", "rrf_all"}
    assert {("channels", row) for row in channels} <= rows
    assert {("semantic", "cqsid"), ("semantic", "rqvae"), ("personalised", "cqsid"), ("personalised", "rqvae"), ("personalised", "cqsid_aligned")} <= rows
    assert metrics["served"] in metrics["validation_recall"]
    assert list(metrics["validation_recall"]) == ["stage2", "stage3", "stage4"]
    assert (metrics["served"], metrics["stage4_falls"]) == ("stage4", {})  # the same weights as stage 3


def test_where_our_channel_corrects_queries_bm25_is_measured_with_corrected_ones_too(line: Any) -> None:
    data = load_evaluated(CONFIG, line.dataset, "real")
    typed = data.requests.queries[0].split()[0]
    slip = f"{typed}q"
    data.requests.queries[0] = data.requests.queries[0].replace(typed, slip)
    ours = [np.zeros((len(requests), CONFIG.depth), dtype=np.int32) for requests in (data.requests, data.validation)]
    spelling = SpellingCorrector.of_texts(document_texts(data.catalog) * 3, [True] * 3 * len(data.catalog))
    channels = build_channels(CONFIG, data, line.encoder, *ours, spelling)
    bm25 = Bm25(document_texts(data.catalog), k1=CONFIG.bm25_k1, b=CONFIG.bm25_b)
    wanted = bm25.search([data.requests.queries[0].replace(slip, typed), *data.requests.queries[1:]], CONFIG.depth)[0]
    assert np.array_equal(channels.rankings["bm25_corrected"], wanted)
    assert not np.array_equal(channels.rankings["bm25"], wanted)
    assert set(channels.weights) == {"rrf_bm25_dense", "rrf_all", "rrf_bm25_corrected_dense", "rrf_all_corrected"}
    as_typed = build_channels(CONFIG, data, line.encoder, *ours, None)
    assert not [row for row in as_typed.rankings if "corrected" in row]
    assert all(np.array_equal(ranking, channels.rankings[row]) for row, ranking in as_typed.rankings.items())


def test_an_aligned_stage_that_harms_what_is_guarded_is_not_served(line: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(line.aligned.path, tmp_path / "aligned")
    model = Decoder.from_pretrained(tmp_path / "aligned" / "stage4")
    model.guidance.level_weights.data.neg_()  # what shares the fewest words comes first
    shutil.rmtree(tmp_path / "aligned" / "stage4")
    model.save_pretrained(tmp_path / "aligned" / "stage4")
    harmed = Artifact(str(tmp_path / "aligned"), tmp_path / "aligned", line.aligned.manifest)
    parts = {name: {"cqsid": getattr(line, name)["cqsid"]} for name in ("sid_indexes", "generators")}
    made = evaluate(CONFIG, dataset=line.dataset, encoder=line.encoder, aligned=harmed, uri=str(tmp_path / "evaluation"), **parts)
    metrics = made.json("metrics.json")
    assert metrics["served"] != "stage4"
    assert "clk@10" in metrics["stage4_falls"]
    assert all(-1 <= gain["low"] <= gain["value"] <= gain["high"] < 0 for gain in metrics["stage4_falls"].values())
    said = "Not served: stage 4 (EG-GRPO), because on the validation requests it falls beyond noise against stage 3: "
    assert said in made.file("report.html").read_text()
    assert said in " ".join(results_table(metrics).split())
    assert said in caplog.text


def test_records_have_the_agreed_fields_and_sane_intervals(metrics: dict[str, Any]) -> None:
    for record in metrics["records"]:
        assert set(record) == {"table", "dataset", "row", "metric", "slice", "value", "low", "high", "n"}
        if record["low"] is not None and "gain" not in record["metric"] and "gone" not in record["metric"]:
            assert record["low"] - 1e-9 <= record["value"] <= record["high"] + 1e-9


def test_per_request_arrays_average_to_the_records(evaluation: Artifact, metrics: dict[str, Any]) -> None:
    columns = np.load(evaluation.file("per_request/channels.generative.npz"), allow_pickle=False)
    record = find(metrics, "channels", "generative", "recall@10")
    assert record is not None
    assert record["value"] == pytest.approx(float(np.nanmean(columns["recall@10"])), abs=1e-6)
    requests = np.load(evaluation.file("per_request/requests.npz"), allow_pickle=False)
    assert len(requests["request_id"]) == len(columns["recall@10"]) == metrics["counts"]["evaluated_requests"]


def test_gains_are_paired_differences_of_the_rows(metrics: dict[str, Any]) -> None:
    values = {row: find(metrics, "semantic", row, "clk@5") or {} for row in ("cqsid", "rqvae")}
    assert values["cqsid"]["value"] > 0
    gain = find(metrics, "semantic", "cqsid", "hit@items10_gain_vs_rqvae")
    first, second = (find(metrics, "semantic", row, "hit@items10") for row in ("cqsid", "rqvae"))
    assert gain is not None
    assert first is not None
    assert second is not None
    assert gain["value"] == pytest.approx(first["value"] / second["value"] - 1)


def test_beam_metrics_stay_within_budgets_and_sids_are_valid(metrics: dict[str, Any]) -> None:
    assert find(metrics, "semantic", "cqsid", "invalid@10")["value"] == 0.0  # type: ignore[index]
    assert find(metrics, "semantic", "cqsid", "items_per_sid")["value"] == pytest.approx(2.0)  # type: ignore[index]
    assert find(metrics, "channels", "bm25", "recall@20")["value"] > 0.5  # type: ignore[index]
    assert find(metrics, "channels", "generative", "junk@10") is not None


def test_a_guided_row_counts_items_in_the_order_they_are_served_in(line: Any, evaluation: Artifact) -> None:
    places = {"sid_index": line.sid_indexes["cqsid"].path, "encoder": line.encoder.path}
    retriever = load_retriever(generator_folder=line.generators["cqsid"].path, stage="stage2", support="trie", personalised=False, **places)
    requests = load_requests(line.dataset, "test", load_catalog(line.dataset))
    measured = dict(
        zip(
            np.load(evaluation.file("per_request/requests.npz"))["request_id"].tolist(),
            np.load(evaluation.file("per_request/semantic.cqsid.npz"))["hit@items3"].tolist(),
            strict=True,
        )
    )
    found = retriever.generate(requests.queries, requests.genders, requests.age_bands, requests.history, beam_size=10)
    answers = [retriever.expand(*found.of(row), 3).item_rows for row in range(len(requests))]
    for request_id, clicked, items in zip(requests.request_ids, requests.clicked, answers, strict=True):
        assert measured[request_id] == pytest.approx(np.isin(clicked, items).mean())


def test_guidance_row_is_the_served_search_with_a_decoder_that_says_nothing(line: Any, evaluation: Artifact, metrics: dict[str, Any]) -> None:
    folder = {"stage4": line.aligned.path}.get(metrics["served"], line.generators["cqsid"].path) / metrics["served"]
    places = {"sid_index": line.sid_indexes["cqsid"].path, "encoder": line.encoder.path}
    silent = load_retriever(generator_folder=line.generators["cqsid"].path, stage=folder.absolute(), support="trie", **places)
    silent.model.norm.weight.data.zero_()
    requests, rankings = load_requests(line.dataset, "test", load_catalog(line.dataset)), np.load(evaluation.file("per_request/rankings.npz"))
    place = {name: row for row, name in enumerate(requests.request_ids)}
    rows = [place[name] for name in np.load(evaluation.file("per_request/requests.npz"))["request_id"].tolist()]
    personalised = metrics["served"] != "stage2"
    asked = requests.take(rows)
    answers = silent.recall(asked.queries, asked.genders, asked.age_bands, asked.history, beam_size=10, limit=20, personalised=personalised)
    expected = [np.pad(one.item_rows, (0, 20 - len(one.item_rows)), constant_values=-1).tolist() for one in answers]
    assert rankings["guidance"].tolist() == expected
    assert rankings["generative"].tolist() != expected  # the decoder is whole again in what is measured of it
    assert find(metrics, "channels", "generative", "recall@10_gain_vs_guidance") is not None


def test_an_unguided_generator_has_no_guidance_row(line: Any, tmp_path: Path) -> None:
    parts = {"sid_indexes": {"rqvae": line.sid_indexes["rqvae"]}, "generators": {"rqvae": line.generators["rqvae"]}}
    made = evaluate(apply_overrides(CONFIG, ["main=rqvae"]), dataset=line.dataset, encoder=line.encoder, uri=str(tmp_path / "evaluation"), **parts)
    assert {record["row"] for record in made.json("metrics.json")["records"] if record["table"] == "channels"} >= {"generative", "rrf_all"}
    assert not [record for record in made.json("metrics.json")["records"] if "guidance" in record["row"] + record["metric"]]


def test_same_inputs_are_not_evaluated_twice(line: Any, evaluation: Artifact) -> None:
    parts = {"dataset": line.dataset, "encoder": line.encoder, "sid_indexes": line.sid_indexes, "generators": line.generators, "aligned": line.aligned}
    again = evaluate(CONFIG, uri=evaluation.uri, **parts)
    assert again.manifest["created"] == evaluation.manifest["created"]


def test_lineage_names_the_main_variant_plainly(evaluation: Artifact) -> None:
    assert {"dataset", "encoder", "sid_index", "generator", "aligned", "sid_index_rqvae", "generator_rqvae"} == set(evaluation.manifest["parents"])


def test_table_and_report_show_the_results(evaluation: Artifact, metrics: dict[str, Any]) -> None:
    text = results_table(metrics)
    assert max(map(len, text.splitlines())) <= 120
    for part in ("BM25", "generative (ours)", "generative (ours) over guidance alone (no decoder)", "RQ-VAE", "CQ-SID + EG-GRPO", "What it means:"):
        assert part in text
    page = evaluation.file("report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("https://www.w3.org", "")
    assert "&lt;b&gt;sinks&lt;/b&gt;" in page  # what artifacts say is escaped
    assert page.count("data:image/png;base64,") >= 4


def test_every_variant_of_the_recipes_has_a_name() -> None:
    assert [row for row in (*VARIANTS, f"{MAIN_VARIANT}_aligned") if row_name(row) == row] == []


def test_the_simulated_ab_draws_its_requests_from_the_whole_sample() -> None:
    uniform = np.arange(1_000) % 2 == 0  # 500 requests, ordered by time
    chosen = ab_sample(uniform, 100, seed=3)
    assert len(chosen) == len(set(chosen.tolist())) == 100
    assert uniform[chosen].all()
    assert (np.diff(chosen) > 0).all()
    # Half lie in the later half of the time: of 100 draws without replacement 50, give or take 4 standard deviations of 4.5.
    assert 32 <= (chosen >= 500).sum() <= 68
    assert ab_sample(uniform, 100, seed=3).tolist() == chosen.tolist()
    assert ab_sample(uniform, 100, seed=4).tolist() != chosen.tolist()
    assert ab_sample(uniform, 500, seed=3).tolist() == ab_sample(uniform, 9_999, seed=3).tolist() == np.flatnonzero(uniform).tolist()


def test_headline_names_suit_an_experiment_tracker(metrics: dict[str, Any]) -> None:
    flat = headline_metrics(metrics)
    assert "channels/generative/recall_at_10" in flat
    assert not any("@" in name for name in flat)
    assert all(isinstance(value, float) for value in flat.values())


def test_metrics_pass_through_the_gates_and_json(metrics: dict[str, Any]) -> None:
    report = check_gates(metrics, json.loads(json.dumps(metrics)), GateConfig(beat_popularity=False))
    assert report.passed
    assert all(isinstance(reason, str) for reason in report.reasons)


def test_a_planted_leak_stops_the_evaluation(line: Any, make_dataset: Callable[..., Artifact], log: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    leaky = log | {"train": [*log["train"], log["test"][0]]}
    parts = {"encoder": line.encoder, "sid_indexes": line.sid_indexes, "generators": line.generators}
    with pytest.raises(LeakError, match="'r80': is in both train and test"):
        evaluate(CONFIG, dataset=make_dataset(tmp_path / "leaky", leaky), uri=str(tmp_path / "evaluation"), **parts)
    assert not (tmp_path / "evaluation").exists()


def test_variants_that_do_not_match_are_refused(line: Any, tmp_path: Path) -> None:
    parts = {"dataset": line.dataset, "encoder": line.encoder, "uri": str(tmp_path / "e")}
    with pytest.raises(ValueError, match="give the same variants in both"):
        evaluate(CONFIG, sid_indexes={}, generators=line.generators, **parts)
    with pytest.raises(ValueError, match="main='other' is not among the variants"):
        evaluate(apply_overrides(CONFIG, ["main=other"]), sid_indexes=line.sid_indexes, generators=line.generators, **parts)
    swapped = {"cqsid": line.sid_indexes["rqvae"], "rqvae": line.sid_indexes["cqsid"]}
    with pytest.raises(ValueError, match="was trained on another sid_index"):
        evaluate(CONFIG, sid_indexes=swapped, generators=line.generators, **parts)
    with pytest.raises(ValueError, match="needs the ranker artifact"):
        evaluate(apply_overrides(CONFIG, ["ab_ranker=learned"]), sid_indexes=line.sid_indexes, generators=line.generators, **parts)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cuts=[10,500]", "channels hand over fewer items"),
        ("cut_beams=[200]", "the widest search"),
        ("beams=[]", "expected at least one value"),
        ("max_requests=0", "max_requests: expected at least 1 or none"),
    ],
)
def test_impossible_configs_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(EvaluationConfig(), [override])
