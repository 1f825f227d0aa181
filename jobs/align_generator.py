"""Align the generator with clicks and purchases: EG-GRPO over a pool of rollout actors and a reward actor."""

from genrecall.pipeline import command_line


def main() -> None:
    """Run the stage."""
    pipeline, _ = command_line(__doc__ or "")
    artifact = pipeline.aligned()
    print(artifact.uri if artifact else "this recipe has no alignment (align=none)")


if __name__ == "__main__":
    main()
