"""Ask the running recall channel and fuse its answer with BM25 by reciprocal rank, as a search application would.

    make demo && make serve          # in one terminal
    .venv/bin/python examples/fuse_with_bm25.py "wireless head phones"

The site's own engine would give the first list; here BM25 runs over the bundle's items in this process.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

from mlflow.tracking import MlflowClient

from genrecall.config import places
from genrecall.evaluation.baselines import Bm25
from genrecall.registry.bundle import load_bundle
from genrecall.registry.versions import fetch_bundle, resolve
from genrecall.tracking import use_tracking

RRF_K = 60


def recall(url: str, query: str, limit: int) -> dict:
    """The channel's answer to a query."""
    body = json.dumps({"query": query, "limit": limit}).encode()
    request = urllib.request.Request(f"{url}/v1/recall", data=body, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def fuse(rankings: list[list[str]]) -> list[str]:
    """Item ids by reciprocal rank fusion (Cormack et al., SIGIR 2009)."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, item_id in enumerate(ranking):
            scores[item_id] = scores.get(item_id, 0.0) + 1.0 / (RRF_K + rank + 1)
    return sorted(scores, key=lambda item_id: -scores[item_id])


def main() -> None:
    """Print the fused list and where each item came from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, default=10)
    arguments = parser.parse_args()

    answer = recall(arguments.url, arguments.query, 100)
    use_tracking(places())
    client = MlflowClient()
    bundle = load_bundle(fetch_bundle(resolve(f"models:/{answer['versions']['model']}", client), client), verify=False)
    items = bundle.items.to_pylist()
    bm25 = Bm25([" ".join([item["title"], item["brand"] or "", *item["category_path"]]) for item in items])
    rankings, _ = bm25.search([arguments.query], 100)
    lexical = [items[row]["item_id"] for row in rankings[0] if row >= 0]
    titles = {item["item_id"]: item["title"] for item in items}
    generative = [item["item_id"] for item in answer["items"]]
    for rank, item_id in enumerate(fuse([lexical, generative])[: arguments.limit], start=1):
        sources = [name for name, ranking in (("bm25", lexical), ("generative", generative)) if item_id in ranking]
        print(f"{rank:3}  {titles[item_id][:80]:80}  {' + '.join(sources)}")


if __name__ == "__main__":
    main()
