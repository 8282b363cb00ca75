"""benchmarks/README.md names every file, and the commands that the texts give exist."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TEXTS = [ROOT / "README.md", BENCHMARKS / "README.md", *(ROOT / "docs").rglob("*.md")]
MODULES = sorted(path for path in BENCHMARKS.rglob("*.py") if path.name != "__init__.py")


def test_readme_names_every_file() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    assert len(MODULES) > 20
    for path in MODULES:
        assert re.search(rf"\b{path.name}", readme), path


@pytest.mark.parametrize(
    "text", [*TEXTS, *MODULES], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_commands_are_modules(text: Path) -> None:
    for command in re.findall(r"-m\s+(benchmarks[\w.]*)", text.read_text()):
        assert importlib.util.find_spec(command.rstrip(".")) is not None, command
