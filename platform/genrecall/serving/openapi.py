"""The API's OpenAPI document, as `docs/openapi.json` holds it: that of a server with keys.

Run: python -m genrecall.serving.openapi docs/openapi.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from genrecall.serving.api import create_app


class _AnyKey:
    """Stands in for `ApiKeys`: the document says that keys are asked for, and names none."""

    required = True

    def accept(self, given: bytes) -> bool:
        return False


def _nothing_served() -> NoReturn:
    raise AssertionError("the document is made without a backend")


def document() -> dict[str, Any]:
    """The document as JSON values."""
    backend_of: Any = _nothing_served
    keys: Any = _AnyKey()
    return create_app(backend_of, keys, keys).openapi()


def text() -> str:
    """The document as the file holds it."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document to the path given."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 1:
        raise SystemExit("expected the path to write, such as docs/openapi.json")
    Path(given[0]).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
