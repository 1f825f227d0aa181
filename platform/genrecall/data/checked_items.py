"""Items of the site's files as they go to placement: checked row by row, with their place in the file.

A module of its own, because every reading worker imports it and nothing else: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from genrecall.data.schema import REJECTED, DataError
from genrecall.data.table_readers import Portion, read_portion
from genrecall.data.validation import SCHEMAS, RowRules, check_chunk, text_columns

COLUMNS = ("item_id", "title", "brand", "category_path", "text")
ORIGIN = ("file", "row", "column", "reason", "value")
UNREADABLE = "unreadable_input"


def checked_items(portion: Portion, rules: RowRules) -> Iterator[pa.Table]:
    """The rows of a portion: sound ones with their columns, others with a `reason`; both with their place in the file."""
    items = pa.schema([SCHEMAS["items"].field(name).with_nullable(True) for name in COLUMNS])

    def without_columns(count: int, origin: list[pa.Array]) -> pa.Table:
        return pa.table([*(pa.nulls(count, field.type) for field in items), *origin], names=[*COLUMNS, *ORIGIN])

    try:
        for chunk in read_portion(portion, SCHEMAS["items"].names, text_columns("items")):
            checked = check_chunk(portion, chunk, rules)
            sound, count = checked.table, len(checked.table)
            origin = {name: pa.nulls(count, REJECTED.field(name).type) for name in ORIGIN}
            origin |= {"file": pa.array([portion.label] * count, pa.string()), "row": sound["_row"], "value": sound["item_id"]}
            yield pa.table([*(sound[name] for name in COLUMNS), *origin.values()], names=[*COLUMNS, *ORIGIN])
            if len(checked.rejected):
                yield without_columns(len(checked.rejected), [checked.rejected[name] for name in ORIGIN])
    except DataError as error:  # travels as a row: Ray Data would wrap it and lose its type
        found = {"file": portion.label, "reason": UNREADABLE, "value": str(error)}
        yield without_columns(1, [pa.array([found.get(name)], REJECTED.field(name).type) for name in ORIGIN])
