"""What `serve_apps/recall.yaml` may set of the deployment."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from genrecall.registry.drift import DriftLimits
from genrecall.registry.versions import is_address
from genrecall.serving.messages import MAX_BEAM_SIZE

_BeamSize = Annotated[int, Field(ge=1, le=MAX_BEAM_SIZE)]


class RecallSettings(BaseModel):
    """`args` of `serve_apps/recall.yaml`; unknown ones are errors.

    Attributes:
        model: `models:/NAME@champion`, `models:/NAME/NUMBER` or `latest-champion`.
        tracking_uri: of the MLflow registry; default: `MLFLOW_TRACKING_URI`, else the sqlite file in `GENRECALL_HOME`.
        bundle_cache: folder for copies of registered bundles; default: a local store is read in place, copies of a remote one lie in `GENRECALL_CACHE`.
        beam_sizes: widest, middle, narrowest; which one depends on how many requests wait.
        max_batch_size: requests decoded together.
        max_waiting: requests a replica holds at a time; more get 503 with Retry-After. Below `max_ongoing_requests`.
        follow_s: seconds between two looks at the registry and the key files; 0: never at the registry, at the key files every 10 s.
        catalogue_folder: folder of the catalogue logs, one of each model's name, on a file system that all replicas share; default: `catalogue` in
            `GENRECALL_HOME` where that is a folder.
        catalogue_follow_s: seconds between two looks at the log.
        drift_error_ratio, drift_oversize_share, drift_unknown_categories, drift_min_items: the alarm's limits, see `DriftLimits`.
        cache_entries, cache_mb: answers (and their size) that a replica keeps for requests that come again; 0 entries: none.
        api_keys_file: one key a line; default: the environment's `GENRECALL_API_KEYS`.
        admin_keys_file: likewise, of who may change the catalogue; default: `GENRECALL_ADMIN_KEYS`.
        torch_threads: at most the replica's CPUs.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "latest-champion"
    tracking_uri: str | None = None
    bundle_cache: str | None = None
    beam_sizes: tuple[_BeamSize, _BeamSize, _BeamSize] = (100, 50, 20)
    max_batch_size: int = Field(default=16, ge=1, le=256)
    max_waiting: int = Field(default=64, ge=1)
    follow_s: float = Field(default=10.0, ge=0)
    cache_entries: int = Field(default=0, ge=0, le=10_000_000)
    cache_mb: float = Field(default=64.0, gt=0)
    catalogue_folder: str | None = None
    catalogue_follow_s: float = Field(default=1.0, ge=0.05, le=4)
    drift_error_ratio: float = Field(default=DriftLimits.error_ratio, gt=0)
    drift_oversize_share: float = Field(default=DriftLimits.oversize_share, ge=0, le=1)
    drift_unknown_categories: float = Field(default=DriftLimits.unknown_categories, ge=0, le=1)
    drift_min_items: int = Field(default=DriftLimits.min_items, ge=1)
    api_keys_file: str | None = None
    admin_keys_file: str | None = None
    torch_threads: int = Field(default=1, ge=1)

    @field_validator("model")
    @classmethod
    def _can_be_resolved(cls, model: str) -> str:
        if not is_address(model):
            raise ValueError(f"expected models:/NAME@ALIAS, models:/NAME/NUMBER or latest-champion, got {model!r}")
        return model

    @field_validator("beam_sizes")
    @classmethod
    def _widest_first(cls, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
        if list(sizes) != sorted(sizes, reverse=True):
            raise ValueError(f"expected the widest beam first, got {list(sizes)}")
        return sizes

    def drift_limits(self) -> DriftLimits:
        """When the drift alarm is raised."""
        return DriftLimits(
            error_ratio=self.drift_error_ratio,
            oversize_share=self.drift_oversize_share,
            unknown_categories=self.drift_unknown_categories,
            min_items=self.drift_min_items,
        )
