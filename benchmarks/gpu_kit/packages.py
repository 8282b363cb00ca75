"""The Python packages that the kit needs: which are lacking, and wheels that are carried along.

Gathered where there is a network, installed where there is none, beside the machine's own packages
and never in their place on the disk. torch and triton are always the machine's: they belong to its
driver. Nothing but Python itself is imported here.
"""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agro_train.refusal import Refusal, writing_to

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "wheelhouse" / "gpu-kit"
FOUND = ("torch", "triton")
# These ask for torch: they are downloaded alone. What else they ask for the others bring, but for
# psutil.
ALONE = ("accelerate", "peft", "trl")
BESIDE = ("psutil",)


def requirements() -> list[str]:
    """What the trainer and the marked tests import, as pyproject.toml has it: `peft>=0.18`."""
    extras = _extras()
    tests = [line for line in extras["dev"] if _name(line) == "pytest"]
    return [*extras["train"], *tests]


def found_here() -> list[str]:
    """What is the machine's own, in the versions that the project asks for."""
    return list(_project()["dependencies"])


def peers() -> list[str]:
    """What is measured beside ours where it is there."""
    return _extras()["trl"]


def absent(wanted: Sequence[str]) -> list[str]:
    """The names of those that are not installed."""
    return [name for name in map(_name, wanted) if version(name) is None]


def older(wanted: Sequence[str]) -> list[str]:
    """Those that are installed in an older version than is wanted: `peft 0.17, wanted >=0.18`."""
    found = []
    for line in wanted:
        name, has = _name(line), version(_name(line))
        least = re.search(r">=([\d.]+)", line)
        if has is not None and least is not None and _numbers(has) < _numbers(least[1]):
            found.append(f"{name} {has}, wanted >={least[1]}")
    return found


def version(name: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gather(folder: Path, python: str) -> None:
    """Downloads the wheels of what the kit needs, TRL's among them, for one version of Python and
    this machine's kind. Raises Refusal where pip cannot."""
    with writing_to(folder, "--wheels"):
        folder.mkdir(parents=True, exist_ok=True)
    download = [
        *("download", "--only-binary", ":all:", "--python-version", python),
        *("--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder)),
    ]
    wanted = [*requirements(), *peers(), *BESIDE]
    _pip(*download, *(line for line in wanted if _name(line) not in ALONE))
    _pip(*download, "--no-deps", *(line for line in wanted if _name(line) in ALONE))


def add(folder: Path) -> None:
    """Installs the wheels of `folder` that this Python lacks into a folder of their own, whose
    modules are from now on found first. Does nothing where there are no wheels. Raises Refusal
    where pip cannot."""
    if not any(folder.glob("*.whl")):
        return
    own = folder / f"installed-{sys.implementation.cache_tag}"
    sys.path.insert(0, str(own))
    # For pip, and for every process of the kit.
    os.environ["PYTHONPATH"] = f"{own}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    wanted = [*requirements(), *(line for line in peers() if any(folder.glob(f"{_name(line)}-*")))]
    if absent(wanted) or older(wanted):
        wheels = ("--no-index", "--find-links", str(folder))
        report = json.loads(_pip("install", "--dry-run", "--report", "-", *wheels, *wanted))
        chosen = {one["metadata"]["name"]: one["metadata"]["version"] for one in report["install"]}
        if wrong := [name for name in FOUND if name in chosen]:
            raise Refusal(
                f"--wheels: expected wheels that go with this machine's {wrong[0]}, got {folder}, "
                f"with which pip would bring {wrong[0]} {chosen[wrong[0]]}; take that out"
            )
        pins = [f"{name}=={number}" for name, number in chosen.items()]
        _pip("install", "--no-deps", "--target", str(own), *wheels, *pins)
    importlib.invalidate_caches()


def check(wanted: Sequence[str], wheels: Path) -> None:
    """Raises Refusal where one of them is not there."""
    if missing := absent(wanted):
        raise Refusal(
            f"packages: expected {', '.join(missing)} for {sys.executable}, got none; pip install "
            "them, or, without a network here, run make gpu-wheels where there is one and carry "
            f"the folder along as {wheels} (torch and triton are never in it)"
        )


def _project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


def _extras() -> dict[str, list[str]]:
    return dict(_project()["optional-dependencies"])


def _name(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def _numbers(text: str) -> list[int]:
    """The numbers that a version begins with: 2.9.0a0+nv counts as 2.9.0."""
    begin = re.match(r"\d+(\.\d+)*", text)
    return [int(number) for number in begin[0].split(".")] if begin else []


def _pip(*arguments: str) -> str:
    """What pip prints. Raises Refusal, with its last line, where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise Refusal(
            f"pip {arguments[0]}: expected it to succeed with {sys.executable}, got {said[-1]!r}; "
            "see the packages of the extra train in pyproject.toml"
        )
    return done.stdout
