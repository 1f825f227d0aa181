"""Learn the codebooks and give every item its three codes (Ray Train + DeepSpeed)."""

from genrecall.pipeline import command_line


def main() -> None:
    """Run the stage."""
    pipeline, arguments = command_line(__doc__ or "", extra={"--variant": {"default": "cqsid", "help": "which of the recipe's SID variants (default: cqsid)"}})
    artifact = pipeline.quantizer(arguments.variant)
    print(artifact.uri)


if __name__ == "__main__":
    main()
