"""A site's own ranking model out of the MLflow registry: any pyfunc that scores rows, calibrated as ours is.

The pyfunc gets a DataFrame with the columns `FEATURES` (float32, nan for what is not known), a row per (request, item) pair, and gives one score a row,
higher for better. Item counts in the features come from the training split, without a correction for position.

Loading a pyfunc runs its code, so `trust_pyfunc` has to be said; one that MLflow would unpickle is refused unless `trust_pickles` is said as well.
Which those are is read from its MLmodel file: models-from-code and the listed native formats pass, everything else counts as pickled.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

from genrecall.data.catalog import Catalog
from genrecall.data.interactions import Requests
from genrecall.encoders.embed import load_item_embeddings
from genrecall.encoders.text_encoder import load_encoder
from genrecall.ranking.features import FEATURES, PairFeatures, item_statistics
from genrecall.ranking.ranker import Calibration, RankerConfig, RankerError, calibrate

PICKLE_SUFFIXES = (".pkl", ".pickle", ".cloudpickle", ".joblib", ".skops", ".pt", ".pth")
_NATIVE_LOADERS = ("mlflow.xgboost", "mlflow.catboost", "mlflow.onnx")
_PYFUNC, _BOOSTER = "python_function", "lightgbm.basic.Booster"
_PYTHON_LOADERS = ("mlflow.pyfunc.model", "mlflow.pyfunc.loaders.code_model")
_ALLOW_PICKLES = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"


class RegisteredRanker:
    """Scores (request, item) pairs by a pyfunc.

    Args:
        predict: DataFrame of P rows -> P scores.
        calibration: score -> click probability.
        features: builds the rows.
        folder: kept as long as the ranker is, for a pyfunc that reads its files late.
    """

    def __init__(
        self,
        predict: Callable[[pd.DataFrame], Any],
        calibration: Calibration,
        features: PairFeatures,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._folder = folder
        self._predict = predict
        self._calibration = calibration
        self._features = features

    def raw_score(self, requests: Requests, request_rows: NDArray[np.integer], item_rows: NDArray[np.integer]) -> NDArray[np.float64]:
        """The pyfunc's scores float64 [P].

        Raises:
            RankerError: it gave something else than one number a row.
        """
        if not len(request_rows):
            return np.zeros(0)
        rows = pd.DataFrame(self._features.table(requests, request_rows, item_rows), columns=list(FEATURES))
        return one_score_a_row(self._predict(rows), len(rows))

    def score(self, requests: Requests, request_rows: NDArray[np.integer], item_rows: NDArray[np.integer]) -> NDArray[np.float64]:
        """Probability float64 [P] that the item is clicked when it is shown for the request."""
        return self._calibration(self.raw_score(requests, request_rows, item_rows))


def one_score_a_row(answer: Any, count: int) -> NDArray[np.float64]:
    """What a pyfunc answered as float64 [count]: an array, a Series, a list, or a table of one column.

    Raises:
        RankerError: anything else.
    """
    try:
        scores = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RankerError(f"ranker: expected one number a row, got {type(answer).__name__} ({error})") from error
    if scores.shape not in ((count,), (count, 1)):
        raise RankerError(f"ranker: expected {count} scores, one a row, got shape {list(scores.shape)}; give the score of a click alone")
    return scores.reshape(count)


def pinned_ranker(uri: str, *, tracking_uri: str | None, trust_pyfunc: bool, trust_pickles: bool) -> str:
    """`models:/NAME/VERSION` of a ranker, checked without loading it; an alias is resolved once, so that a run keeps the version it began with.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.

    Raises:
        RankerError: not in the registry, or refused (see the module's head).
    """
    name, alias, version = _parts(uri)
    with _registry(tracking_uri):
        client = MlflowClient()
        try:
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
            pinned = f"models:/{name}/{found.version}"
            flavours = mlflow.models.get_model_info(pinned).flavors
        except MlflowException as error:
            raise RankerError(
                f"reward.ranker_uri={uri}: not found in the registry {mlflow.get_registry_uri()}: {error.message}; check the name, or set MLFLOW_TRACKING_URI"
            ) from error
    check_trust(pinned, flavours, (), trust_pyfunc=trust_pyfunc, trust_pickles=trust_pickles)
    return pinned


def check_trust(uri: str, flavours: Mapping[str, Any], files: tuple[str, ...], *, trust_pyfunc: bool, trust_pickles: bool) -> None:
    """Refuse a model whose loading needs more trust than was given.

    Args:
        flavours: of its MLmodel file.
        files: names of its files, where they are at hand.

    Raises:
        RankerError: saying what to set.
    """
    if not trust_pyfunc:
        raise RankerError(f"{uri}: loading a pyfunc runs its code; set reward.trust_pyfunc=true if you trust whoever registered it")
    if _PYFUNC not in flavours:
        raise RankerError(f"{uri}: has no python_function flavour (it has {', '.join(sorted(flavours))}); log it with one that predicts")
    if not trust_pickles and (pickled := pickled_part(flavours, files)):
        raise RankerError(
            f"{uri}: {pickled}, and unpickling runs whatever the file says; log it as models-from-code (python_model='ranker.py') or as a LightGBM Booster, "
            "or set reward.trust_pickles=true if you trust whoever wrote it"
        )


def pickled_part(flavours: Mapping[str, Any], files: tuple[str, ...]) -> str | None:
    """What of a model is (or may be) unpickled when it is loaded, in words; None where nothing is."""
    config = flavours[_PYFUNC]
    loader = str(config.get("loader_module"))
    if loader in _PYTHON_LOADERS:
        if "model_code_path" not in config:
            return f"its model is pickled ({config.get('python_model', 'python_model.pkl')})"
    elif loader == "mlflow.lightgbm":
        model_class = flavours.get("lightgbm", {}).get("model_class")
        if model_class != _BOOSTER:
            return f"its LightGBM model is a pickled {model_class}, not a Booster"
    elif loader not in _NATIVE_LOADERS:
        return f"its loader {loader} unpickles, or may"
    suspicious = [name for name in files if name.lower().endswith(PICKLE_SUFFIXES)]
    return f"it holds {', '.join(suspicious[:3])}" if suspicious else None


def load_registered_ranker(
    uri: str,
    *,
    tracking_uri: str | None,
    trust_pyfunc: bool,
    trust_pickles: bool,
    catalog: Catalog,
    train: Requests,
    validation: Requests,
    encoder_folder: Path,
) -> RegisteredRanker:
    """Download a ranker, check and load it, and calibrate its scores on the validation requests.

    Args:
        uri: models:/NAME/VERSION.
        train: whose clicks and exposures the features count. Its last tenth takes the place of `validation` where that has no click.

    Raises:
        RankerError: refused, or its answers are not one number a row.
    """
    folder = tempfile.TemporaryDirectory(prefix="genrecall-ranker-")
    with _registry(tracking_uri):
        path = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder.name))
        files = tuple(sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()))
        check_trust(uri, Model.load(str(path)).flavors, files, trust_pyfunc=trust_pyfunc, trust_pickles=trust_pickles)
        with _pickles_allowed(trust_pickles):
            predict = mlflow.pyfunc.load_model(str(path)).predict
    features = PairFeatures(catalog, load_item_embeddings(encoder_folder), load_encoder(encoder_folder).encode_queries, item_statistics(train, len(catalog)))
    raw = RegisteredRanker(predict, Calibration(1.0, 0.0), features).raw_score
    return RegisteredRanker(predict, calibrate(RankerConfig(), raw, train, validation, len(catalog)), features, folder)


def _parts(uri: str) -> tuple[str, str, str]:
    """Name, alias and version of a registry URI; one of the last two is empty."""
    rest = uri.removeprefix("models:/")
    name, at, alias = rest.partition("@")
    if at and uri.startswith("models:/") and name and alias:
        return name, alias, ""
    name, _, version = rest.rpartition("/")
    if not uri.startswith("models:/") or not name or not version.isdigit():
        raise RankerError(f"reward.ranker_uri: expected models:/NAME@ALIAS or models:/NAME/VERSION, got {uri!r}")
    return name, "", version


@contextlib.contextmanager
def _registry(tracking_uri: str | None) -> Iterator[None]:
    """MLflow pointed at a store (where it is already, if None), and back."""
    before = mlflow.get_tracking_uri()
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


@contextlib.contextmanager
def _pickles_allowed(allowed: bool) -> Iterator[None]:
    """MLflow's own switch against unpickling, for what a MLmodel file does not tell."""
    before = os.environ.get(_ALLOW_PICKLES)
    os.environ[_ALLOW_PICKLES] = str(allowed).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ALLOW_PICKLES]
        else:
            os.environ[_ALLOW_PICKLES] = before
