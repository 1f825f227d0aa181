"""Cap the clusters and build SID table, trie and SID -> items index."""

from genrecall.pipeline import command_line


def main() -> None:
    """Run the stage."""
    pipeline, arguments = command_line(__doc__ or "", extra={"--variant": {"default": "cqsid", "help": "which of the recipe's SID variants (default: cqsid)"}})
    artifact = pipeline.sid_index(arguments.variant)
    print(artifact.uri)


if __name__ == "__main__":
    main()
