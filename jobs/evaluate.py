"""Evaluate the generative channel and its baselines on the test requests; prints the table, writes the report."""

from genrecall.evaluation.results_table import results_table
from genrecall.pipeline import command_line


def main() -> None:
    """Run the stage and print its table."""
    pipeline, _ = command_line(__doc__ or "")
    artifact = pipeline.evaluation()
    print(results_table(artifact.json("metrics.json")))
    print(f"report: {artifact.path / 'report.html'}")


if __name__ == "__main__":
    main()
