"""Where a run ran: software, machine, command and commit, in its folder's environment.json."""

import json
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agro_train import durable
from agro_train.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = ("agro", "torch", "transformers", "accelerate", "triton")


def record_start(
    folder: Path,
    step: int,
    accelerator: "Accelerator",
    *,
    resumed: bool,
    changed: Mapping[str, tuple[Any, Any]] | None = None,
) -> str:
    """Writes environment.json, one object for every start of the run: its first, and each time it
    was resumed. Returns the run's id, which is the same after every resumption.

    Args:
        changed: the settings that are others from here on, as they were and as they are.
    """
    path = RunFolder(folder).starts
    before = read_starts(folder) if resumed else []
    run_id = before[0]["run_id"] if before else uuid.uuid4().hex
    start = {"run_id": run_id, "step": step, **describe_environment(accelerator)}
    if changed:
        start["changed"] = {name: {"was": was, "now": now} for name, (was, now) in changed.items()}
    starts = [*before, start]
    durable.replace(path, json.dumps(starts, indent=2) + "\n")
    return str(run_id)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What `record_start` has written, oldest first. Nothing where there is no such file or it is
    damaged: no run depends on it.
    """
    try:
        starts = json.loads(RunFolder(folder).starts.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # json's and unicode's errors are ValueErrors
        return []
    valid = isinstance(starts, list) and all(
        isinstance(start, dict) and {"run_id", "step"} <= start.keys() for start in starts
    )
    return starts if valid else []


def describe_environment(accelerator: "Accelerator") -> dict[str, Any]:
    """What may explain a difference between two runs of one configuration."""
    cuda = accelerator.device.type == "cuda"
    return {
        **describe_program(shlex.join(sys.argv)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(accelerator.device) if cuda else None,
        "processes": accelerator.num_processes,
    }


def describe_program(command: str) -> dict[str, Any]:
    """The software, and the machine that it runs on."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **{name: _version(name) for name in PACKAGES},
        "git_commit": git_commit(Path(__file__).with_name("__init__.py")),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
    }


def git_commit(file: Path) -> str | None:
    """The commit of the repository that tracks the file, with "+" if its files have changed since;
    None where no repository does or git is not installed.
    """

    def git(*arguments: str) -> str | None:
        """What git prints; None where it fails."""
        try:
            result = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(file.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10.0,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed package can be in an environment inside another project's repository, whose
    # commit would say nothing about it.
    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+" if changed else "")


def cpu_name() -> str:
    """As the kernel says it, or as Python does where there is no /proc/cpuinfo."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
