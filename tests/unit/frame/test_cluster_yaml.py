"""cluster.yaml against Ray's own schema, and that it opens no port to the world."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_yaml_is_what_ray_up_reads(cluster):
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(cluster)


def test_node_types_are_consistent(cluster):
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert sum(one.get("min_workers", 0) for one in types.values()) <= cluster["max_workers"]
    assert all(one["resources"]["CPU"] >= 1 for one in types.values())


def test_the_head_starts_with_tokens_and_a_dashboard_on_loopback(cluster):
    head = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    workers = [command for command in cluster["worker_start_ray_commands"] if "ray start" in command]
    assert len(head) == len(workers) == 1
    assert "--dashboard-host=127.0.0.1" in head[0]
    assert all(". ~/.genrecall_env; ray start" in command for command in head + workers)
    assert any("RAY_AUTH_MODE=token" in command and "> ~/.genrecall_env" in command for command in cluster["setup_commands"])
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head[0]
