"""The jobs' command lines, and those that the documents show."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from genrecall import pipeline
from genrecall.config import Places, apply_overrides
from genrecall.recipes import RECIPES
from genrecall.registry.versions import RegistryError

ROOT = Path(__file__).parents[3]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
WRITTEN = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *JOBS, ROOT / "jobs" / "runtime_env.yaml", *(ROOT / "deploy").rglob("*.yaml")]


def text_of(path):
    """What a reader is told: of a job its docstring."""
    return ast.get_docstring(ast.parse(path.read_text())) if path.suffix == ".py" else path.read_text().replace("\\\n", " ")


COMMANDS = sorted({(path.name, line) for path in WRITTEN for line in re.findall(r"python (?:/app/)?(jobs/\w+\.py --[^\n`#]*)", text_of(path))})


@pytest.fixture
def run(registry, tmp_path, monkeypatch):
    """`run("promote", "--rollback")` runs a job in this process on a home of its own and returns its exit status."""
    monkeypatch.setenv("GENRECALL_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def job(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"jobs_{name}", ROOT / "jobs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            module.main()
        except SystemExit as exit_:
            return exit_.code
        return 0

    return job


@pytest.mark.parametrize("name", [path.stem for path in JOBS])
def test_a_registry_that_does_not_answer_ends_a_job_with_a_line_that_has_no_password(run, monkeypatch, capsys, name):
    for variable, value in (("TRACKING_URI", "http://bob:s3cret@127.0.0.1:9"), ("HTTP_REQUEST_MAX_RETRIES", "0"), ("HTTP_REQUEST_TIMEOUT", "2")):
        monkeypatch.setenv(f"MLFLOW_{variable}", value)
    needed = ("--items", "new.csv", "--output", "assigned") if name == "assign_items" else ()
    assert run(name, *needed) == 2
    said = capsys.readouterr().err
    assert "the registry or its store failed: API request to http://***@127.0.0.1:9/" in said
    assert "s3cret" not in said


def test_a_registry_that_fails_in_a_stage_shows_no_password(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise MlflowException("API request to http://bob:s3cret@host failed")

    monkeypatch.setattr(pipeline, "stage_run", fails)
    line = pipeline.Pipeline(RECIPES["tiny"](), Places(home=str(tmp_path), data="", tracking_uri=""))
    with pytest.raises(RegistryError, match=r"API request to http://\*\*\*@host failed") as caught:
        line.dataset()
    assert caught.value.__suppress_context__


def test_compacting_a_log_that_is_not_there_says_so_and_makes_none(run, tmp_path, capsys):
    assert run("compact_catalogue", "--recipe", "tiny") == 2
    assert f"{tmp_path}/catalogue/genrecall-tiny: no catalogue log here; set GENRECALL_HOME" in capsys.readouterr().err
    assert not (tmp_path / "catalogue").exists()


def test_the_documents_show_commands():
    assert {"jobs/run_pipeline.py", "jobs/promote.py", "jobs/compact_catalogue.py", "jobs/prepare_data.py"} <= {line.split()[0] for _, line in COMMANDS}


@pytest.mark.parametrize(("where", "line"), COMMANDS)
def test_a_command_that_a_document_shows_names_a_job_a_recipe_options_and_settings_that_exist(where, line):
    job, *words = shlex.split(line)
    assert (ROOT / job).is_file()
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "marketplace"
    if recipe not in ("...", "NAME"):
        apply_overrides(RECIPES[recipe](), [word.replace("=...", "=x") for word in words if re.match(r"[a-z_.0-9]+=", word)])
    known = (ROOT / job).read_text() + (ROOT / "platform" / "genrecall" / "pipeline.py").read_text()
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in known] == []
