"""cluster.yaml against Ray's own schema, and that it opens no port to the world."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import requires
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.aws.config import DEFAULT_AMI_NAME

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


def test_nodes_have_the_python_that_the_package_needs(cluster):
    images = [one["node_config"]["ImageId"] for one in cluster["available_node_types"].values()]
    assert "Ubuntu 18.04" in DEFAULT_AMI_NAME, "Ray's default image is another one now: it may do"
    assert "latest_dlami" not in images
    (made,) = [command for command in cluster["setup_commands"] if "python3 -m venv ~/venv" in command]
    (installed,) = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert cluster["setup_commands"].index(made) < cluster["setup_commands"].index(installed)
    assert "~/venv/bin/pip install -q -c constraints.txt" in installed
    assert any("PATH=$HOME/venv/bin:$PATH" in command for command in cluster["setup_commands"])
    assert all(". ~/.genrecall_env; " in command for name in ("head", "worker") for command in cluster[f"{name}_start_ray_commands"])


def test_what_s3_needs_is_installed_with_the_package():
    """MLflow's S3 store and Ray's node provider import boto3, which neither of them requires."""
    ours = {Requirement(line).name for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    assert {"s3fs", "boto3"} <= ours
    pins = {one.name: str(one.specifier) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha() and (one := Requirement(line))}
    (botocore,) = [one for line in requires("aiobotocore") or [] if (one := Requirement(line)).name == "botocore" and one.marker is None]
    assert Version(pins["botocore"].removeprefix("==")) in botocore.specifier, "boto3 and s3fs share one botocore"
