"""Train the text encoder: the two towers that put queries and items into one space (Ray Train + DeepSpeed)."""

from genrecall.pipeline import command_line


def main() -> None:
    """Run the stage."""
    pipeline, _ = command_line(__doc__ or "")
    artifact = pipeline.encoder()
    print(artifact.uri)


if __name__ == "__main__":
    main()
