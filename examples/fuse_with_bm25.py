"""Ask the running recall channel and fuse its answer with BM25 by reciprocal rank, as a search application would.

    make demo && make serve          # in one terminal
    .venv/bin/python examples/fuse_with_bm25.py "wireless head phones"

The site's own engine would give the first list; here BM25 runs over the bundle's items in this process. Where the channel gives no answer in
time, the application goes on with what it has.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from genrecall.evaluation.baselines import Bm25
from genrecall.serving.client import RecallClient, RecallError

RRF_K = 60
DEPTH = 100
DEADLINE_MS = 500


def fuse(rankings: Sequence[Sequence[str]]) -> list[str]:
    """Item ids by reciprocal rank fusion (Cormack et al., SIGIR 2009)."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, item_id in enumerate(ranking):
            scores[item_id] = scores.get(item_id, 0.0) + 1.0 / (RRF_K + rank + 1)
    return sorted(scores, key=lambda item_id: -scores[item_id])


def search(query: str, items: Sequence[dict[str, Any]], bm25: Bm25, client: RecallClient, limit: int) -> list[tuple[str, str, list[str]]]:
    """The fused list: title, id and the channels that found it.

    Args:
        items: what BM25 was made of, with item_id and title.
    """
    rankings, _ = bm25.search([query], DEPTH)
    lexical = [items[row]["item_id"] for row in rankings[0] if row >= 0]
    titles = {item["item_id"]: item["title"] for item in items}
    generative: list[str] = []
    try:
        answer = client.recall(query, limit=DEPTH, deadline_ms=DEADLINE_MS)
        generative = [item.item_id for item in answer.items]
        titles |= {item.item_id: item.title for item in answer.items}  # items newer than BM25's list, too
    except RecallError as error:
        print(f"without the generative channel: {error}", file=sys.stderr)
    found = {"bm25": set(lexical), "generative": set(generative)}
    return [(titles[item_id], item_id, [name for name, ids in found.items() if item_id in ids]) for item_id in fuse([lexical, generative])[:limit]]


def served_items(client: RecallClient) -> list[dict[str, Any]]:
    """The items of the bundle that the server answers from, out of the same registry."""
    from mlflow.tracking import MlflowClient

    from genrecall.config import places
    from genrecall.registry.bundle import load_bundle
    from genrecall.registry.versions import fetch_bundle, resolve
    from genrecall.tracking import use_tracking

    use_tracking(places())
    registry = MlflowClient()
    version = resolve(f"models:/{client.model().versions.model}", registry)
    return list(load_bundle(fetch_bundle(version, registry), verify=False).items.to_pylist())


def text_of(item: dict[str, Any]) -> str:
    """What BM25 reads of an item."""
    return " ".join([item["title"], item["brand"] or "", *item["category_path"]])


def main() -> None:
    """Print the fused list and where each item came from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, default=10)
    arguments = parser.parse_args()

    client = RecallClient(arguments.url, os.environ.get("RECALL_API_KEY"), timeout_s=2.0)
    items = served_items(client)
    bm25 = Bm25([text_of(item) for item in items])
    for rank, (title, _, channels) in enumerate(search(arguments.query, items, bm25, client, arguments.limit), start=1):
        print(f"{rank:3}  {title[:80]:80}  {' + '.join(channels)}")


if __name__ == "__main__":
    main()
