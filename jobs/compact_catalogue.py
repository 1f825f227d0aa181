"""Compact a model's catalogue log: of each item the newest record or tombstone alone is kept. Servers go on meanwhile.

    python jobs/compact_catalogue.py --recipe home_depot
    python jobs/compact_catalogue.py --recipe home_depot --covered 41200

--covered drops all changes up to that number. Give the `catalog_seq` of the oldest version that may ever be served again: one whose bundle covers less is
refused from then on, because it would bring delisted items back. More than the champion, the one before it and the challenger hold is refused here.
"""

import sys

from genrecall.pipeline import command_line
from genrecall.registry.catalogue_log import CatalogueLog, CatalogueLogError, log_folder
from genrecall.registry.promotion import least_covered
from genrecall.registry.versions import RegistryError, redacting


def main() -> None:
    """Compact the log."""
    pipeline, arguments = command_line(
        __doc__ or "",
        extra={
            "--covered": {"type": int, "default": 0, "help": "the last change that every version to be served holds itself (default: 0, none)"},
            "--catalogue-folder": {"help": "folder of the catalogue logs (default: GENRECALL_HOME/catalogue)"},
        },
    )
    name = pipeline.recipe.registered_name
    try:
        with redacting():
            least = least_covered(name)
        if least is not None and arguments.covered > least[0]:
            raise CatalogueLogError(
                f"--covered {arguments.covered}: version {least[1]} of {name} holds the changes up to {least[0]} only and could not be served"
            )
        log = CatalogueLog(log_folder(arguments.catalogue_folder or f"{pipeline.where.home}/catalogue", name))
        done = log.compact(arguments.covered, wait_s=60)
    except (CatalogueLogError, RegistryError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{log.folder}: {done.kept} changes kept, {done.dropped} dropped, {done.bytes_before} bytes before, {done.bytes_after} after")


if __name__ == "__main__":
    main()
