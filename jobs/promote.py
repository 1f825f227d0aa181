"""Move the alias `champion`: to a version that passes the gates, or back to the version before.

    python jobs/promote.py --recipe home_depot                 # the challenger, if the gates let it
    python jobs/promote.py --recipe home_depot --version 3     # this one, also if it was rolled back from
    python jobs/promote.py --recipe home_depot --rollback

Servers that follow the alias take the version into service by themselves. Exit status 1 where the gates refuse, 2 where there is no such version or the registry fails.
"""

import sys

from mlflow.tracking import MlflowClient

from genrecall.pipeline import command_line
from genrecall.registry.bundle import BundleError
from genrecall.registry.promotion import promote, rollback
from genrecall.registry.versions import RegistryError, redacting, resolve
from genrecall.storage import ArtifactError


def main() -> None:
    """Promote or roll back."""
    pipeline, arguments = command_line(
        __doc__ or "",
        extra={
            "--version": {"type": int, "help": "version number (default: the challenger)"},
            "--rollback": {"action": "store_true", "help": "give champion back to the version before"},
        },
    )
    name = pipeline.recipe.registered_name
    try:
        with redacting():
            if arguments.rollback:
                print(f"champion of {name} is version {rollback(name).number} again")
                return
            version = resolve(f"models:/{name}/{arguments.version}" if arguments.version is not None else f"models:/{name}@challenger", MlflowClient())
            report = promote(version, pipeline.recipe.registry.gates, named=arguments.version is not None)
    except (RegistryError, BundleError, ArtifactError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print("\n".join(report.reasons))
    print(f"champion of {name} is version {version.number}" if report.passed else f"version {version.number} was not promoted")
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
