"""The KubeRay manifests: against a schema, and against what they stand for.

GENRECALL_KUBERAY_CRDS names a folder with KubeRay's own CRDs (`ray.io_rayservices.yaml`, `ray.io_rayjobs.yaml`); where it is set, the manifests are
judged by them too.
"""

import copy
import importlib.util
import os
import shlex
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from genrecall.serving.recall_settings import RecallSettings

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "deploy" / "kuberay"
MANIFESTS = {"RayService": "rayservice.yaml", "RayJob": "rayjob.yaml"}
CLUSTER_FIELD = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}

_spec = importlib.util.spec_from_file_location("kuberay_schema", Path(__file__).with_name("kuberay_schema.py"))
kuberay_schema = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kuberay_schema)


def read(name):
    return yaml.safe_load((KUBERAY / name).read_text())


def manifest(kind):
    return read(MANIFESTS[kind])


def cluster(kind):
    return manifest(kind)["spec"][CLUSTER_FIELD[kind]]


def pods(kind):
    found = cluster(kind)
    return [found["headGroupSpec"]["template"]["spec"], *(group["template"]["spec"] for group in found["workerGroupSpecs"])]


def close(schema):
    """Kubernetes drops fields that a CRD does not name, silently; a copy that refuses them."""
    if isinstance(schema, list):
        return [close(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: ({name: close(one) for name, one in value.items()} if key == "properties" else close(value)) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def crd_schema(kind):
    folder = os.environ.get("GENRECALL_KUBERAY_CRDS")
    if not folder:
        pytest.skip("GENRECALL_KUBERAY_CRDS names no folder with KubeRay's CRDs")
    crd = yaml.safe_load((Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text())
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = close(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def changed(kind, path, new):
    """The manifest with the field at `path` under another name."""
    document = copy.deepcopy(manifest(kind))
    place = document
    for step in path[:-1]:
        place = place[step]
    place[new] = place.pop(path[-1])
    return document


TYPOS = [
    (("spec",), "specs"),
    (("spec", "CLUSTER", "authOptions"), "authOption"),
    (("spec", "CLUSTER", "workerGroupSpecs", 0, "maxReplicas"), "maxReplica"),
    (("spec", "CLUSTER", "headGroupSpec", "template", "spec", "containers", 0, "volumeMounts"), "volumeMount"),
    (("spec", "CLUSTER", "headGroupSpec", "template", "spec", "securityContext", "runAsNonRoot"), "runAsNonroot"),
    (("spec", "CLUSTER", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits"), "limit"),
]


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_hold_only_known_fields(kind):
    jsonschema.Draft202012Validator(kuberay_schema.SCHEMAS[kind]).validate(manifest(kind))


@pytest.mark.parametrize("kind", MANIFESTS)
@pytest.mark.parametrize(("path", "new"), TYPOS)
def test_a_misspelt_field_is_refused(kind, path, new):
    path = tuple(CLUSTER_FIELD[kind] if step == "CLUSTER" else step for step in path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(kind, path, new), kuberay_schema.SCHEMAS[kind])


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_hold_to_kuberays_own_schema(kind):
    jsonschema.validate(manifest(kind), crd_schema(kind))


def test_a_crd_is_closed_before_it_judges():
    open_schema = {"type": "object", "properties": {"properties": {"type": "object", "properties": {"a": {"type": "string"}}}}}
    jsonschema.validate({"properties": {"b": 1}}, open_schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"properties": {"b": 1}}, close(open_schema))


def test_serve_config_means_what_recall_yaml_means():
    config = yaml.safe_load(manifest("RayService")["spec"]["serveConfigV2"])
    ours = yaml.safe_load((ROOT / "serve_apps" / "recall.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    args = config["applications"][0]["args"]
    RecallSettings(**args)
    for key in ("api_keys_file", "admin_keys_file"):
        assert args.pop(key).startswith("/etc/genrecall/keys/")
    assert args["model"].endswith("@champion")
    args["model"] = ours["applications"][0]["args"]["model"]
    scaling, our_scaling = (one["applications"][0]["deployments"][0]["autoscaling_config"] for one in (config, ours))
    assert scaling["min_replicas"] >= 2, "one replica may die"
    for bound in ("min_replicas", "max_replicas"):
        scaling[bound] = our_scaling[bound]
    assert (config["proxy_location"], config["http_options"]["host"]) == ("EveryNode", "0.0.0.0")
    config["proxy_location"], config["http_options"]["host"] = ours["proxy_location"], ours["http_options"]["host"]
    assert config == ours


@pytest.mark.parametrize("kind", MANIFESTS)
def test_nothing_is_exposed_and_every_pod_is_unprivileged(kind):
    text = (KUBERAY / MANIFESTS[kind]).read_text()
    assert "LoadBalancer" not in text
    assert "NodePort" not in text
    assert cluster(kind)["authOptions"] == {"mode": "token"}
    assert cluster(kind)["rayVersion"] == ray.__version__
    for pod in pods(kind):
        assert pod["securityContext"]["runAsUser"] == 1000
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        environment = {one["name"]: one for one in container["env"]}
        assert environment["GENRECALL_HOME"]["value"] in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "secretKeyRef" in environment["MLFLOW_TRACKING_URI"]["valueFrom"]


def test_replicas_are_ready_by_readyz_and_fit_their_nodes():
    config = yaml.safe_load(manifest("RayService")["spec"]["serveConfigV2"])
    deployment = config["applications"][0]["deployments"][0]
    (group,) = cluster("RayService")["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": config["http_options"]["port"]}
    per_node = int(worker["resources"]["requests"]["cpu"]) // deployment["ray_actor_options"]["num_cpus"]
    assert per_node * group["maxReplicas"] >= deployment["autoscaling_config"]["max_replicas"]
    assert cluster("RayService")["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "replicas stay off the head"


def test_the_catalogue_log_is_shared_and_resources_are_named_once():
    claim = read("volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for kind in MANIFESTS:
        for pod in pods(kind):
            assert claim["metadata"]["name"] in {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
    for name in read("kustomization.yaml")["resources"]:
        found = read(name)
        assert found["metadata"].get("namespace", "genrecall") == "genrecall"


def test_the_job_runs_a_script_that_exists():
    command = shlex.split(manifest("RayJob")["spec"]["entrypoint"])
    assert command[0] == "python"
    assert (ROOT / Path(command[1]).relative_to("/app")).is_file()
    assert "COPY jobs jobs" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_the_image_is_unprivileged_and_pinned():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert all("-c constraints.txt" in line for line in lines if "pip install" in line)
