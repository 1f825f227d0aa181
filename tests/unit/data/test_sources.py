"""Where sources are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrecall.data.schema import DataError
from genrecall.data.sources import open_adapter, open_files


def test_a_relative_place_needs_a_data_root_and_an_absolute_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\na,x\n")
    (tmp_path / "events.csv").write_text("query\nx\n")
    with pytest.raises(DataError, match=r"items\.csv: is looked for under GENRECALL_DATA, which is not set"):
        open_files("items.csv", "events.csv", None, "")
    with pytest.raises(DataError, match="home_depot: is looked for under GENRECALL_DATA, which is not set"):
        open_adapter("home_depot", None, "", seed=0)
    assert len(open_files(str(tmp_path / "items.csv"), str(tmp_path / "events.csv"), None, "").portions) == 2
