"""Fixtures shared by all tests: one Ray cluster and one tiny pipeline run for the whole session, and the real data where it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, started once."""
    import ray

    from genrecall.train_worker import ensure_ray

    ensure_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("home_depot")` is the folder of that data set; the test skips where it is absent."""
    root = Path(os.environ.get("GENRECALL_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"real data {name!r} not found under {root}; set GENRECALL_DATA to run this test")
        return root / name

    return find
