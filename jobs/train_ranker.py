"""Train the downstream ranking model (LightGBM LambdaMART), which rewards the generator and ranks in simulations."""

from genrecall.pipeline import command_line


def main() -> None:
    """Run the stage."""
    pipeline, _ = command_line(__doc__ or "")
    artifact = pipeline.ranker()
    print(artifact.uri)


if __name__ == "__main__":
    main()
