"""The house: imports point one way, and the README names what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each package may import of the project's own.
ALLOWED = {
    "agro_kernels": {"agro_kernels"},
    "agro_train": {"agro_kernels", "agro_train"},
    "benchmarks": {"agro_kernels", "agro_train", "benchmarks"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", list(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    ours = {"agro_kernels", "agro_train", "benchmarks", "tests"}
    for path in (ROOT / package).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)} & ours
        assert roots <= ALLOWED[package], path


def test_trainer_sees_only_the_public_names_of_the_kernels() -> None:
    for path in (ROOT / "agro_train").rglob("*.py"):
        kernels = {name for name in imported(path) if name.split(".")[0] == "agro_kernels"}
        assert kernels <= {"agro_kernels"}, path


def test_readme_names_every_file_of_the_packages() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in ("agro_kernels", "agro_train"):
        for path in (ROOT / folder).glob("[a-z]*.py"):
            assert path.name in readme, path


def test_readme_gives_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make (\w+)", readme, flags=re.M))
    assert targets == {"demo", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
