"""Where sources are looked for."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from genrecall.data.schema import DataError
from genrecall.data.sources import _origin, open_adapter, open_files


def test_a_relative_place_needs_a_data_root_and_an_absolute_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\na,x\n")
    (tmp_path / "events.csv").write_text("query\nx\n")
    with pytest.raises(DataError, match=r"items\.csv: is looked for under GENRECALL_DATA, which is not set"):
        open_files("items.csv", "events.csv", None, "")
    with pytest.raises(DataError, match="home_depot: is looked for under GENRECALL_DATA, which is not set"):
        open_adapter("home_depot", None, "", seed=0)
    assert len(open_files(str(tmp_path / "items.csv"), str(tmp_path / "events.csv"), None, "").portions) == 2


@pytest.mark.parametrize("name", ["ETag", "etag", "last_modified", "created"])  # of S3; of Azure; of fsspec's own in-memory store
def test_a_file_in_a_store_that_is_replaced_by_one_of_the_same_size_is_another_source(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    filesystem, _ = fsspec.core.url_to_fs("memory://shop/items.csv")
    filesystem.pipe_file("/shop/items.csv", b"item_id,title\na,x\n")
    marks = iter(["first", "second"])
    monkeypatch.setattr(filesystem, "info", lambda path, **_: {"name": path, "size": 18, "type": "file", name: next(marks)})
    first, second = (_origin("canonical", "", ["memory://shop/items.csv"]) for _ in range(2))
    assert first.hash != second.hash
