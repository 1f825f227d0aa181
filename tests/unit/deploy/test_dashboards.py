"""The dashboard and the alerts ask for metrics that exist, and each alert's runbook is written."""

import ast
import json
import re
from pathlib import Path

import pytest
import ray
import yaml

ROOT = Path(__file__).parents[3]
SERVING = ROOT / "platform" / "genrecall" / "serving"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "genrecall.json").read_text())
RULES = [rule for group in yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}

# Ray's own: the exported name, its kind, the file that declares it and how the name is written there.
RAYS = {
    "serve_num_http_requests": ("Counter", "serve/_private/request_ingress_metrics.py", "serve_num_{protocol_name}_requests"),
    "serve_num_http_error_requests": ("Counter", "serve/_private/request_ingress_metrics.py", "serve_num_{protocol_name}_error_requests"),
    "serve_http_request_latency_ms": ("Histogram", "serve/_private/request_ingress_metrics.py", "serve_{protocol_name}_request_latency_ms"),
    "serve_deployment_replica_healthy": ("Gauge", "serve/_private", '"serve_deployment_replica_healthy"'),
    "serve_replica_processing_queries": ("Gauge", "serve/_private", '"serve_replica_processing_queries"'),
    "serve_deployment_queued_queries": ("Gauge", "serve/_private", '"serve_deployment_queued_queries"'),
    "node_cpu_utilization": ("Gauge", "dashboard/modules/reporter/reporter_agent.py", '"node_cpu_utilization"'),
    "node_mem_used": ("Gauge", "dashboard/modules/reporter/reporter_agent.py", '"node_mem_used"'),
}


def declared(source):
    """Name -> (kind, labels) of the metrics that a module makes."""
    found = {}
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in SUFFIXES:
            labels = {one.value for keyword in call.keywords if keyword.arg == "tag_keys" for one in ast.walk(keyword.value) if isinstance(one, ast.Constant)}
            found[call.args[0].value] = (call.func.id, labels)
    return found


OURS = {name: kind for path in sorted(SERVING.glob("*.py")) for name, kind in declared(path.read_text()).items()}
EXPORTED = {
    f"ray_{name}{suffix}" for name, kind in [*((n, k) for n, (k, _) in OURS.items()), *((n, r[0]) for n, r in RAYS.items())] for suffix in SUFFIXES[kind]
}
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])] + [rule["expr"] for rule in RULES]


def metrics_of(expression):
    """The metric names of a PromQL expression: every identifier that starts as Ray's do."""
    return re.findall(r"\bray_\w+", re.sub(r'"[^"]*"', '""', expression))


def labels_of(expression):
    """Metric -> labels that its selector names."""
    return [
        (name, set(re.findall(r"(\w+)\s*=", re.sub(r'"[^"]*"', '""', selector))))
        for name, selector in re.findall(r"(ray_genrecall_\w+)\{([^}]*)\}", expression)
    ]


def anchors(markdown):
    """The anchors of a document's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_name_metrics_that_are_exported(expression):
    names = metrics_of(expression)
    assert names, f"no metric in {expression}"
    assert set(names) <= EXPORTED
    assert expression.count("(") == expression.count(")")
    for name, labels in labels_of(expression):
        base = re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix("ray_"))
        assert labels <= OURS[base][1] | {"application", "deployment", "replica"}


def test_a_renamed_metric_is_seen():
    before = declared('Counter("genrecall_swaps", "", tag_keys=("outcome", "version"))')
    assert before == {"genrecall_swaps": ("Counter", {"outcome", "version"})}
    assert "ray_genrecall_swap_total" not in EXPORTED
    assert "ray_genrecall_swaps" not in EXPORTED, "a counter is exported with _total"
    assert metrics_of('rate(ray_genrecall_swap_total{a="ray_x"}[5m])') == ["ray_genrecall_swap_total"]


@pytest.mark.parametrize("name", RAYS)
def test_rays_own_metrics_are_declared_by_the_installed_ray(name):
    _, where, written = RAYS[name]
    place = Path(ray.__file__).parent / where
    sources = [place] if place.is_file() else sorted(place.glob("*.py"))
    assert any(written in path.read_text() for path in sources)


def test_every_metric_of_ours_is_on_the_dashboard():
    shown = {name for panel in DASHBOARD["panels"] for target in panel.get("targets", []) for name in metrics_of(target["expr"])}
    missing = [name for name, (kind, _) in OURS.items() if not shown & {f"ray_{name}{suffix}" for suffix in SUFFIXES[kind]}]
    assert missing == []


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [(x, y) for p in DASHBOARD["panels"] for g in [p["gridPos"]] for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_runbook(rule):
    document, anchor = rule["annotations"]["runbook"].split("#")
    assert anchor in anchors((ROOT / document).read_text())
    assert rule["labels"]["severity"] in ("warning", "critical")


def test_a_replica_is_behind_when_it_lacks_what_another_had_a_minute_ago():
    """Under steady changes the newest numbers always differ: only the older one says that a replica does not follow."""
    (rule,) = [rule for rule in RULES if rule["alert"] == "GenrecallCatalogueBehind"]
    matched = re.fullmatch(r"min by \(application\) \((\w+)\) < max by \(application\) \((\w+) offset 1m\)", rule["expr"])
    assert matched
    assert matched.groups() == ("ray_genrecall_catalog_seq",) * 2


def test_an_anchor_is_made_from_its_heading():
    assert anchors("# Operations\n### Slow answers\ntext\n## Promote, roll back") == {"operations", "slow-answers", "promote-roll-back"}
