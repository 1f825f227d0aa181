"""Turn search logs and a catalogue into the canonical dataset: cleaned, split by time, sharded (Ray Data).

python jobs/prepare_data.py --recipe marketplace
python jobs/prepare_data.py --recipe site data.items=logs/items.parquet data.events=logs/events/ data.users=logs/users.jsonl.gz
"""

from genrecall.pipeline import command_line


def main() -> None:
    """Run the stage."""
    pipeline, _ = command_line(__doc__ or "")
    artifact = pipeline.dataset()
    print(f"{artifact.uri}: {dict(artifact.manifest['row_counts'])}")


if __name__ == "__main__":
    main()
