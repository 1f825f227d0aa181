"""The benchmark that tunes the baseline: its settings as configs, its table from small measurements worked out by hand."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from genrecall.config import Places

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("quantizer_tuning")


def line(bench: ModuleType, name: str, dataset: str = "marketplace") -> object:
    return bench.pipeline_of(dataset, 0, name, Places(home="/home", data="/nowhere", tracking_uri="sqlite:///nowhere.db"))


@pytest.mark.parametrize("dataset", ["marketplace", "amazon_scientific", "tiny"])
def test_settings_are_the_tables_but_for_the_latents_and_one_setting_of_the_quantiser(bench: ModuleType, dataset: str) -> None:
    base = line(bench, "rqvae", dataset).recipe
    configs = {name: line(bench, name, dataset).recipe.quantizer_of("rqvae") for name in bench.SETTINGS if name.startswith("rqvae_")}
    assert len(set(configs.values()) | {base.quantizer_of("rqvae")}) == len(configs) + 1
    for name, config in configs.items():
        mine, theirs = (vars(one) for one in (config, base.quantizer_of("rqvae")))
        assert sum(mine[field] != theirs[field] for field in mine) == 1, name
        recipe = line(bench, name, dataset).recipe
        assert (recipe.generator, recipe.encoder, recipe.data, recipe.sid) == (base.generator, base.encoder, base.data, base.sid)
    sids = sys.modules["quality"].apply_overrides(sys.modules["quality"].RECIPES[dataset](), bench.Cell(dataset, 0, "sids").overrides())
    for variant in ("rqvae", "cqsid"):  # the tables' latents were chosen by this comparison, which starts from 64
        assert line(bench, variant, dataset).recipe.quantizer_of(variant) == replace(sids.quantizer_of(variant), latent_dim=64)
    assert replace(base.generator, stage3=sids.generator.stage3, validation_requests=sids.generator.validation_requests) == sids.generator


@pytest.mark.parametrize("dataset", ["marketplace", "amazon_scientific"])
def test_the_tables_have_the_latents_that_won(bench: ModuleType, dataset: str) -> None:
    sids = sys.modules["quality"].apply_overrides(sys.modules["quality"].RECIPES[dataset](), bench.Cell(dataset, 0, "sids").overrides())
    for variant in ("rqvae", "cqsid"):
        assert line(bench, f"{variant}_latent128", dataset).recipe.quantizer_of(variant) == sids.quantizer_of(variant)


def test_a_setting_has_a_folder_of_its_own_and_shares_data_and_encoder(bench: ModuleType) -> None:
    slow = line(bench, "rqvae_rate0.0003")
    assert slow.uri("rqvae/quantizer") == "/home/marketplace/rqvae_rate0.0003/quantizer"
    assert slow.uri("encoder") == line(bench, "cqsid").uri("encoder") == "/home/marketplace/encoder"


def write(home: Path, name: str, hits: Sequence[float], ids: Sequence[str] = ("a", "b")) -> None:
    home.mkdir(parents=True, exist_ok=True)
    columns = {metric: np.array(hits, dtype=np.float32) for metric in ("clk@1", "clk@10", "clk@100", "hit@items10", "hit@items100")}
    np.savez(home / f"{name}.npz", request_id=np.array(ids), **columns)
    (home / f"{name}.json").write_text(json.dumps({"commit": "a1b2c3d", "items_per_sid": 5.0}))


def test_table_has_the_gains_over_rqvaes_own_setting_and_cqsids_over_each(bench: ModuleType, tmp_path: Path) -> None:
    home = bench.home_of(tmp_path, "marketplace", 0) / "measured"
    write(home, "cqsid", [1, 1])
    assert bench.collect("marketplace", "quantizer_tuning", [0], tmp_path) == []  # without RQ-VAE's own there is nothing to compare with
    write(home, "rqvae", [1, 0])
    write(home, "rqvae_latent32", [0.5, 1])
    write(home, "cqsid_latent128", [1, 0.5])
    records = bench.collect("marketplace", "quantizer_tuning", [0], tmp_path)
    values = {(one["row"], one["metric"]): one["value"] for one in records}
    assert values["all", "requests"] == 2
    assert values["rqvae_latent32", "hit@items10"] == 0.75
    assert values["rqvae_latent32", "hit@items10_gain_vs_rqvae"] == 0.5
    assert values["cqsid", "clk@100_gain_vs_rqvae"] == 1.0
    assert values["cqsid", "clk@100_gain_vs_rqvae_latent32"] == pytest.approx(1 / 3)
    assert {one["commit"] for one in records} == {"a1b2c3d"}
    text = bench.markdown(records)
    assert "| rqvae_latent32 over rqvae | +50.0% (" in text
    assert "| cqsid over rqvae_latent32 | +33.3% (" in text
    assert "| cqsid_latent128 over cqsid | -25.0% (" in text
    assert text.startswith("### RQ-VAE's own tuning\n\n1 seed, 2 requests")
    write(home, "rqvae_latent32", [0.5, 1], ids=("a", "x"))
    with pytest.raises(bench.CollectionError, match="measured other requests than"):
        bench.collect("marketplace", "quantizer_tuning", [0], tmp_path)


def test_a_change_that_both_sides_have_is_compared_under_it(bench: ModuleType) -> None:
    assert bench.pairs("quantizer_tuning", ["rqvae", "rqvae_latent128", "cqsid", "cqsid_latent128"]) == [
        ("rqvae_latent128", "rqvae"),
        ("cqsid", "rqvae"),
        ("cqsid_latent128", "rqvae"),
        ("cqsid", "rqvae_latent128"),
        ("cqsid_latent128", "cqsid"),
        ("cqsid_latent128", "rqvae_latent128"),
    ]
    assert bench.pairs("quantizer_tuning", ["rqvae", "cqsid_latent128"]) == [("cqsid_latent128", "rqvae")]


def test_gammas_are_a_table_of_their_own_over_rqvae_and_over_none(bench: ModuleType, tmp_path: Path) -> None:
    home = bench.home_of(tmp_path, "marketplace", 0) / "measured"
    for name, hits in (("rqvae_latent128", [1, 0]), ("cqsid_without_query", [1, 0.5]), ("cqsid_gamma0.2", [1, 1])):
        write(home, name, hits)
    assert bench.collect("marketplace", "quantizer_tuning", [0], tmp_path) == []
    records = bench.collect("marketplace", "gamma", [0], tmp_path)
    values = {(one["row"], one["metric"]): one["value"] for one in records if one["table"] == "gamma"}
    assert values["cqsid_gamma0.2", "clk@1_gain_vs_rqvae_latent128"] == 1.0
    assert values["cqsid_gamma0.2", "clk@1_gain_vs_cqsid_without_query"] == pytest.approx(1 / 3)
    assert values["cqsid_without_query", "clk@1_gain_vs_rqvae_latent128"] == 0.5
    write(home, "rqvae", [1, 0])
    both = records + bench.collect("marketplace", "quantizer_tuning", [0], tmp_path)
    assert [line for line in bench.markdown(both).splitlines() if line.startswith("#")] == ["### RQ-VAE's own tuning", "### CQ-SID's gamma"]
    for gamma in bench.GAMMAS:
        assert line(bench, f"cqsid_gamma{gamma}").recipe.quantizer_of("cqsid").gamma == gamma


def test_collecting_keeps_other_data_sets_records(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GENRECALL_HOME", str(tmp_path))
    output = tmp_path / "results" / "quantizer_tuning.json"
    with pytest.raises(SystemExit, match="nothing to collect under"):
        bench.main(["--collect-only", "--output", str(output)])
    home = bench.home_of(tmp_path, "marketplace", 0) / "measured"
    write(home, "rqvae", [1, 0])
    write(home, "cqsid", [1, 1])
    others = [one | {"dataset": "amazon_scientific"} for one in bench.collect("marketplace", "quantizer_tuning", [0], tmp_path)]
    output.parent.mkdir()
    output.write_text(json.dumps(others))
    bench.main(["--collect-only", "--output", str(output)])
    records = json.loads(output.read_text())
    assert sorted(map(str, (one for one in records if one["dataset"] != "marketplace"))) == sorted(map(str, others))
    assert "## amazon_scientific" in output.with_suffix(".md").read_text()
    assert "| cqsid over rqvae | +100.0% (" in capsys.readouterr().out
