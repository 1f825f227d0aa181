"""Taking shoppers out of a dataset: their user rows, events and requests, for good and as a new artifact.

Other shoppers' histories never hold events of the erased ones, so nothing else changes. Models trained on the old dataset are not
touched: retrain from the new artifact, then delete the old one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrecall.data.schema import SPLITS
from genrecall.storage import Artifact, ArtifactError, Stage

ALGORITHM_VERSION = 1
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """Names the erased shoppers by a hash only, because a config is kept in the manifest."""

    users_sha256: str
    seed: int = 0


def erase_users(dataset: Artifact, user_ids: Sequence[str], *, uri: str, force: bool = False) -> Artifact:
    """Write a copy of `dataset` without these shoppers to `uri`, which must differ from the dataset's own place.

    Raises:
        ArtifactError: `dataset` is of another kind, or `uri` is its own place.
    """
    if dataset.kind != "dataset":
        raise ArtifactError(f"{dataset.uri}: expected an artifact of kind 'dataset', found {dataset.kind!r}")
    if uri.rstrip("/") == dataset.uri.rstrip("/"):
        raise ArtifactError(f"{uri}: is the dataset itself; give another place, then delete the old one")
    names = sorted(set(user_ids))
    config = EraseConfig(users_sha256=hashlib.sha256("\n".join(names).encode()).hexdigest())
    stage = Stage(kind="dataset", uri=uri, config=config, algorithm_version=ALGORITHM_VERSION, parents={"dataset": dataset}, seed=0, job="prepare_data")
    if done := stage.current(force=force):
        return done
    erased = pa.array(names, pa.string())
    counts: dict[str, int] = {}
    with stage.write() as draft:
        for folder in ("items", "rejected", "users", *(f"{kind}/{split}" for kind in ("requests", "events") for split in SPLITS)):
            counts[folder] = 0
            (draft.path / folder).mkdir(parents=True)
            for source in sorted(dataset.file(folder).glob("*.parquet")):
                file = pq.ParquetFile(source)
                with pq.ParquetWriter(draft.path / folder / source.name, file.schema_arrow, compression="zstd") as writer:
                    for group in range(file.num_row_groups):
                        table = file.read_row_group(group)
                        if folder == "rejected":  # a rejected row keeps a value of the source, which may be a user id
                            table = table.filter(pc.fill_null(pc.invert(pc.is_in(table["value"], value_set=erased)), True))
                        elif "user_id" in table.column_names:
                            table = table.filter(pc.invert(pc.is_in(table["user_id"], value_set=erased)))
                        writer.write_table(table)
                        counts[folder] += len(table)
        stats = dataset.json("stats.json")
        stats["users"] = counts["users"]
        stats["requests"] = {split: counts[f"requests/{split}"] for split in SPLITS}
        stats["events_by_split"] = {split: counts[f"events/{split}"] for split in SPLITS}
        stats["events"] = sum(stats["events_by_split"].values())
        (draft.path / "stats.json").write_text(json.dumps(stats, indent=2, sort_keys=True))
        draft.row_counts.update(counts)
    _logger.info("erased %d user ids: %d requests are left", len(names), sum(stats["requests"].values()))
    return stage.open()
