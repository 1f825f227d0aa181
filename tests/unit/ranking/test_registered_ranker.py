"""A ranker out of the registry: calibrated like ours, refused without trust, unpickled only on demand."""

from __future__ import annotations

import json
from pathlib import Path

import lightgbm
import mlflow
import numpy as np
import pandas as pd
import pytest

from genrecall.data.catalog import load_catalog
from genrecall.data.interactions import load_requests
from genrecall.ranking.features import FEATURES
from genrecall.ranking.ranker import RankerConfig, RankerError, load_ranker, train_ranker
from genrecall.ranking.registered_ranker import check_trust, load_registered_ranker, one_score_a_row, pinned_ranker

CODE = """
import mlflow.pyfunc

class ByPopularity(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return 2.0 * model_input["log_popularity"] + model_input["cosine"]

mlflow.models.set_model(ByPopularity())
"""


class Pickled(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return np.ones(len(model_input))


@pytest.fixture
def parts(untrained_line):
    return untrained_line.parts()


@pytest.fixture
def log(registry, tmp_path: Path):
    """`log(python_model)` registers a model as `ours` and gives it the alias champion; `"code"` is a ranker as a file of code."""

    def logged(model) -> None:
        if model == "code":
            (tmp_path / "ranker_code.py").write_text(CODE)
            model = str(tmp_path / "ranker_code.py")
        with mlflow.start_run():
            if isinstance(model, lightgbm.Booster):
                mlflow.lightgbm.log_model(model, name="ranker", registered_model_name="ours", pip_requirements=[])
            else:
                mlflow.pyfunc.log_model(name="ranker", python_model=model, registered_model_name="ours", pip_requirements=[])
        versions = registry.search_model_versions("name = 'ours'")
        registry.set_registered_model_alias("ours", "champion", max(int(one.version) for one in versions))

    return logged


def loaded(parts, uri="models:/ours@champion", *, trust_pyfunc=True, trust_pickles=False):
    trust = {"tracking_uri": mlflow.get_tracking_uri(), "trust_pyfunc": trust_pyfunc, "trust_pickles": trust_pickles}
    catalog = load_catalog(parts["dataset"])
    train, validation = (load_requests(parts["dataset"], split, catalog) for split in ("train", "validation"))
    pinned = pinned_ranker(uri, **trust)
    ranker = load_registered_ranker(pinned, **trust, catalog=catalog, train=train, validation=validation, encoder_folder=parts["encoder"].path)
    return ranker, pinned, catalog, train


def test_a_ranker_of_code_scores_rows_and_is_calibrated(log, parts):
    log("code")
    ranker, pinned, _, train = loaded(parts)
    assert pinned == "models:/ours/1"
    pairs = np.repeat(np.arange(4), 40), np.tile(np.arange(40), 4).astype(np.int32)
    raw, probability = ranker.raw_score(train, *pairs), ranker.score(train, *pairs)
    table = pd.DataFrame(ranker._features.table(train, *pairs), columns=list(FEATURES))
    np.testing.assert_allclose(raw, 2.0 * table["log_popularity"] + table["cosine"], rtol=1e-6)
    assert ((probability > 0) & (probability < 1)).all()
    assert (np.diff(probability[np.argsort(raw, kind="stable")]) >= 0).all()
    clicked, shown = probability[pairs[1] == 0], probability[pairs[1] == 1]  # i00 was clicked in every request, i01 only shown
    assert (clicked > 0.6).all()
    assert (shown < 0.4).all()
    assert ranker.score(train, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)).shape == (0,)


def test_our_own_trees_out_of_the_registry_give_the_same_probabilities(log, parts, tmp_path):
    config = RankerConfig(trees=5, min_rows_per_leaf=1)
    artifact = train_ranker(config, dataset=parts["dataset"], encoder=parts["encoder"], uri=str(tmp_path / "ranker"))
    log(lightgbm.Booster(model_file=str(artifact.file("model.txt"))))
    ranker, _, catalog, train = loaded(parts)
    ours = load_ranker(artifact.path, catalog=catalog, encoder_folder=parts["encoder"].path)
    pairs = np.repeat(np.arange(4), 40), np.tile(np.arange(40), 4).astype(np.int32)
    np.testing.assert_allclose(ranker.score(train, *pairs), ours.score(train, *pairs), rtol=1e-6)
    assert json.loads(artifact.file("ranker.json").read_text())["calibration"]["slope"] == pytest.approx(ranker._calibration.slope, rel=1e-6)


def test_a_pickled_ranker_is_refused_before_it_is_loaded_unless_that_is_said(log, parts):
    log(Pickled())
    message = r"models:/ours/1: its model is pickled \(python_model.pkl\), and unpickling runs .* or set reward\.trust_pickles=true"
    with pytest.raises(RankerError, match=message):
        loaded(parts)
    ranker, _, _, train = loaded(parts, trust_pickles=True)
    assert np.isfinite(ranker.score(train, np.array([0, 0]), np.array([0, 1], dtype=np.int32))).all()


def test_no_ranker_is_loaded_without_trust_in_its_code(log, parts):
    log("code")
    with pytest.raises(RankerError, match=r"loading a pyfunc runs its code; set reward\.trust_pyfunc=true"):
        loaded(parts, trust_pyfunc=False)


def test_an_alias_is_resolved_once(log, parts):
    log("code")
    log("code")
    assert loaded(parts)[1] == "models:/ours/2"
    assert loaded(parts, "models:/ours/1")[1] == "models:/ours/1"


def test_a_ranker_that_is_not_there_is_named(registry, parts):
    with pytest.raises(RankerError, match=r"reward\.ranker_uri=models:/ours@champion: not found in the registry sqlite.*check the name"):
        loaded(parts)
    with pytest.raises(RankerError, match=r"expected models:/NAME@ALIAS or models:/NAME/VERSION, got 'models:/ours'"):
        loaded(parts, "models:/ours")


@pytest.mark.parametrize(
    ("flavours", "files", "said"),
    [
        ({"python_function": {"loader_module": "mlflow.pyfunc.loaders.code_model", "model_code_path": "/x/ranker.py"}}, ("ranker.py", "MLmodel"), None),
        ({"python_function": {"loader_module": "mlflow.pyfunc.loaders.code_model"}}, (), "its model is pickled"),
        ({"python_function": {"loader_module": "mlflow.pyfunc.model", "model_code_path": "/x/a.py"}}, ("artifacts/w.PKL",), "it holds artifacts/w.PKL"),
        ({"python_function": {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl"}}, (), "its model is pickled"),
        ({"python_function": {"loader_module": "mlflow.sklearn"}, "sklearn": {"serialization_format": "cloudpickle"}}, (), "loader mlflow.sklearn unpickles"),
        ({"python_function": {"loader_module": "mlflow.lightgbm"}, "lightgbm": {"model_class": "lightgbm.basic.Booster"}}, ("model.lgb",), None),
        ({"python_function": {"loader_module": "mlflow.lightgbm"}, "lightgbm": {"model_class": "lightgbm.sklearn.LGBMRanker"}}, (), "pickled lightgbm.sklearn"),
        ({"python_function": {"loader_module": "our.loader"}}, (), "its loader our.loader unpickles, or may"),
    ],
)
def test_what_counts_as_pickled(flavours, files, said):
    check_trust("models:/m/1", flavours, files, trust_pyfunc=True, trust_pickles=True)
    if said is None:
        check_trust("models:/m/1", flavours, files, trust_pyfunc=True, trust_pickles=False)
    else:
        with pytest.raises(RankerError, match=said):
            check_trust("models:/m/1", flavours, files, trust_pyfunc=True, trust_pickles=False)


def test_a_model_that_does_not_predict_is_refused():
    with pytest.raises(RankerError, match=r"has no python_function flavour \(it has lightgbm\)"):
        check_trust("models:/m/1", {"lightgbm": {}}, (), trust_pyfunc=True, trust_pickles=True)


def test_one_number_a_row_comes_in_several_forms():
    for answer in (np.array([[1.0], [2.0]]), pd.Series([1.0, 2.0]), pd.DataFrame({"score": [1.0, 2.0]}), [1, 2]):
        assert one_score_a_row(answer, 2).tolist() == [1.0, 2.0]
    with pytest.raises(RankerError, match=r"expected 2 scores, one a row, got shape \[2, 2\]"):
        one_score_a_row(np.zeros((2, 2)), 2)
    with pytest.raises(RankerError, match="expected one number a row, got list"):
        one_score_a_row(["high", "low"], 2)
