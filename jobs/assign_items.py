"""Place items that came after training: gives each a published SID through the bundle's own encoder and codebooks (Ray Data).

    python jobs/assign_items.py --recipe home_depot --items new_items.jsonl --output assigned/

Reads Parquet, JSONL or CSV with at least `item_id` and `title`. Writes `placed.parquet` (item_id, sid, sid_row, quantization_error,
known, unknown_category) and `rejected.parquet`, and says by the limits of the servers' drift alarm whether it is time to retrain. The SIDs are those of the champion, or of the version that --model names. With --append-log the items also go into the
model's catalogue log, from where every server takes them within seconds.
"""

import functools
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

from genrecall.data.schema import DataError
from genrecall.pipeline import command_line
from genrecall.registry.bundle import BundleError
from genrecall.registry.catalogue_log import CatalogueLog, CatalogueLogError, log_folder
from genrecall.registry.item_placement import append_items, assign_items
from genrecall.registry.versions import RegistryError, fetch_bundle, fetch_bundle_from, redacting, resolve
from genrecall.storage import ArtifactError, open_artifact


def main() -> None:
    """Assign SIDs to the given items."""
    pipeline, arguments = command_line(
        __doc__ or "",
        extra={
            "--items": {"required": True, "help": "file, folder or glob of new items"},
            "--output": {"required": True, "help": "folder for the result; must not exist"},
            "--append-log": {"action": "store_true", "help": "serve the items: append them to the catalogue log"},
            "--catalogue-folder": {"help": "folder of the catalogue logs (default: GENRECALL_HOME/catalogue)"},
            "--model": {"help": "models:/NAME@ALIAS or models:/NAME/NUMBER (default: the recipe's champion)"},
        },
    )
    try:
        client = MlflowClient()
        with redacting():
            version = resolve(arguments.model or f"models:/{pipeline.recipe.registered_name}@champion", client)
            bundle = open_artifact(str(fetch_bundle(version, client)), kind="bundle")
        folder = functools.partial(fetch_bundle_from, pipeline.where.tracking_uri, version)
        separator = pipeline.recipe.data.category_separator
        summary = assign_items(bundle, arguments.items, Path(arguments.output), folder=folder, category_separator=separator)
        if arguments.append_log:
            log = CatalogueLog(log_folder(arguments.catalogue_folder or f"{pipeline.where.home}/catalogue", version.name))
            sequence = append_items(arguments.items, log, category_separator=separator)
    except (RegistryError, BundleError, ArtifactError, DataError, CatalogueLogError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"model: {version.text}")
    print("\n".join(summary.lines()))
    if arguments.append_log:
        print(f"catalogue log: {log.folder}, last change {sequence}")


if __name__ == "__main__":
    main()
