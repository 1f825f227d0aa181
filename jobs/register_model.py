"""Bundle the line's artifacts and register them as the next model version, alias `challenger`."""

from genrecall.pipeline import command_line, register_bundle


def main() -> None:
    """Build the bundle and register it."""
    pipeline, _ = command_line(__doc__ or "")
    pipeline.bundle()
    version = register_bundle(pipeline)
    print(f"registered models:/{version.text} (challenger); to promote it: python jobs/promote.py --recipe {pipeline.recipe.name}")


if __name__ == "__main__":
    main()
