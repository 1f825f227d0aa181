"""Bundle the line's artifacts and register them as the next model version, alias `challenger`."""

from genrecall.pipeline import command_line, register_bundle
from genrecall.registry.promotion import aliases_of
from genrecall.registry.versions import redacting


def main() -> None:
    """Build the bundle and register it."""
    pipeline, _ = command_line(__doc__ or "")
    pipeline.bundle()
    with redacting():
        version = register_bundle(pipeline)
        aliases = ", ".join(aliases_of(version)) or "no alias"
    print(f"registered models:/{version.text} ({aliases}); to promote it: python jobs/promote.py --recipe {pipeline.recipe.name} --version {version.number}")


if __name__ == "__main__":
    main()
