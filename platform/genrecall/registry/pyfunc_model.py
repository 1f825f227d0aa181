"""The MLflow face of a bundle, as models-from-code: lets MLflow's own tools score it. Our server does not use it.

Input: a table with a `query` column; output: one list of item ids a query. MLflow runs this file; the package never imports it.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from genrecall.registry.bundle import load_bundle


class RecallModel(PythonModel):
    """Loads the bundle beside it and recalls items for queries."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle that was logged as artifact `bundle`."""
        self._bundle = load_bundle(context.artifacts["bundle"])

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[list[str]]:
        """Item ids for each row's query, best first; `params`: beam_size (default 20) and limit (default 100)."""
        settings = {"beam_size": 20, "limit": 100} | (params or {})
        queries = [str(query) for query in model_input["query"]]
        nothing, no_history = [None] * len(queries), [np.zeros(0, np.int32)] * len(queries)
        results = self._bundle.retriever.recall(queries, nothing, nothing, no_history, beam_size=int(settings["beam_size"]), limit=int(settings["limit"]))
        return [self._bundle.ids_of(result.item_rows) for result in results]


mlflow.models.set_model(RecallModel())
