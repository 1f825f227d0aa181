"""What an evaluation reads: the catalogue, and the requests of each split that it searches.

Shapes: R evaluated requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from genrecall.data.catalog import Catalog, load_catalog
from genrecall.data.interactions import Requests, load_requests
from genrecall.evaluation.evaluation_config import EvaluationConfig
from genrecall.evaluation.slices import Sample, sample_requests
from genrecall.storage import Artifact


@dataclass(frozen=True)
class EvaluatedData:
    """The evaluated data.

    Attributes:
        catalog, train: of the data set.
        requests: R test requests, drawn as `sample` says.
        validation: those that choices are made on: fusion weights, the served stage.
        query_kind: see `sample_requests`.
    """

    catalog: Catalog
    train: Requests
    requests: Requests
    validation: Requests
    sample: Sample
    query_kind: str


def load_evaluated(config: EvaluationConfig, dataset: Artifact, query_kind: str) -> EvaluatedData:
    """The catalogue, the training requests, and the test and validation requests that are searched."""
    catalog = load_catalog(dataset)
    train, validation, test = (load_requests(dataset, split, catalog) for split in ("train", "validation", "test"))
    sample = sample_requests(test, train, catalog, query_kind=query_kind, max_requests=config.max_requests, seed=config.seed)
    if len(validation):
        tuned_on = sample_requests(validation, train, catalog, query_kind=query_kind, max_requests=config.max_validation_requests, seed=config.seed)
        validation = validation.take(tuned_on.indices[tuned_on.primary])
    return EvaluatedData(catalog, train, test.take(sample.indices), validation, sample, query_kind)
