"""The project's own files: CI, hooks, templates and citation name what exists, in one version."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def commands(workflow: Path) -> list[str]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_of_ci_exist(workflow: Path) -> None:
    text = "\n".join(commands(workflow))
    for target in re.findall(r"\bmake ([\w-]+)", text):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), target
    for path in re.findall(r"\btests/[\w/.]+", text):
        assert (ROOT / path).exists(), path


def test_ci_tests_the_lower_bounds() -> None:
    (tests,) = [path for path in WORKFLOWS if path.stem == "test"]
    oldest = yaml.safe_load(tests.read_text())["jobs"]["tests"]["strategy"]["matrix"]["include"][0]
    assert PROJECT["project"]["requires-python"] == f">={oldest['python']}"
    bounds = dict(re.findall(r"(\w+)>=([\d.]+)", " ".join(PROJECT["project"]["dependencies"])))
    assert oldest["torch"] == " ".join(f"{name}=={bounds[name]}.*" for name in ("torch", "triton"))


def test_hooks_have_the_version_of_ruff_that_the_tests_have() -> None:
    pinned = re.search(r"^ruff==.*$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    hooks = set(re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert pinned is not None
    assert hooks == {pinned[0]}


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for name in ("version", "license"):
        assert citation[name] == PROJECT["project"][name]


def test_command_of_the_bug_template_runs() -> None:
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    text = "\n".join(field["attributes"].get("description", "") for field in template["body"])
    (command,) = re.findall(r"`(python .*?)`", text)
    command = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("agro", "torch", "triton", "python", "cpu", "gpu"):
        assert re.search(rf"^{name} +\S", done.stdout, flags=re.M), name
    assert done.stdout.endswith("all right\n")


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.M)
    assert phony is not None
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert re.findall(r"^make ([\w-]+) +\w", done.stdout, flags=re.M)
    assert set(re.findall(r"^make ([\w-]+)", done.stdout, flags=re.M)) == set(phony[1].split())
