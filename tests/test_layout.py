"""The house: imports point one way, tests mirror the packages, and the texts name what is there."""

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import agro_kernels

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

# What each package may import of the project's own.
ALLOWED = {
    "agro_kernels": {"agro_kernels"},
    "agro_train": {"agro_kernels", "agro_train"},
    "benchmarks": {"agro_kernels", "agro_train", "benchmarks"},
}

# The floors of each package, the ground first. A module or wing (a folder) may import what stands
# on a lower floor, never its neighbours; the files of a wing may import each other. A file of a
# wing may have a floor of its own: "wing.file".
FLOORS: dict[str, list[set[str]]] = {
    "agro_kernels": [
        {"reference", "tiles", "packing"},
        {"arguments"},
        {"head", "head_modules"},
        {
            "agro_options",
            "counted_rows",
            "kept_logits",
            "logit_rows",
            "many_targets",
            "model_head",
        },
        {"backward"},
        {"_torch", "_triton"},
        {"_cpu"},
        {"ops"},
        {"divergences", "linear_logprobs", "linear_topk"},
        {
            "cross_entropy",
            "weighted_logprobs",
            "selective_logprobs",
            "agro_loss",
            "policy_gradient",
        },
        {"parallel", "modules", "self_check"},
        {"__main__"},
    ],
    "agro_train": [
        {"transfer"},
        {"types", "refusal", "seeds", "durable", "interrupt"},
        {"keys", "lock", "ranks", "run_folder", "user_function"},
        {"settings"},
        {"config"},
        {"data"},
        {"policy", "rewards", "watch"},
        {"environments"},
        {"engines", "plan"},
        {"algorithm", "callbacks", "completion", "evaluate", "fresh", "questions"},
        {"metrics", "run"},
        {"checks", "models", "resume", "step"},
        {"setup", "train"},
        {"commands"},
        {"experiments"},
        {"commands.reproduce"},
        {"cli"},
        {"__main__", "integrations"},
    ],
    "benchmarks": [
        {"measure", "regression"},
        {"head"},
        {"predict", "trainer"},
        {"gpu_kit", "pages"},
    ],
}

TESTS = {
    "agro_kernels": ROOT / "tests" / "kernels",
    "agro_train": ROOT / "tests" / "train",
    "benchmarks": ROOT / "tests" / "benchmarks",
}

packages = pytest.mark.parametrize("package", list(ALLOWED))


def modules(package: str) -> dict[str, Path]:
    """Dotted names of a package's modules and their files."""
    files = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = path
    return files


@functools.cache
def imported(path: Path) -> dict[str, set[str]]:
    """The modules that a file imports, wherever in it, by dotted name; what it takes of each."""
    names: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.setdefault(alias.name, set())
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return names


def imports(package: str) -> dict[str, set[str]]:
    """For each module of a package the modules of the same package that it imports.

    `from package.wing import module` is an import of the module, not of the wing's __init__.
    """
    files = modules(package)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = graph[module] = set()
        for source, names in imported(path).items():
            inside = {f"{source}.{name}" for name in names} & files.keys()
            targets |= inside
            if source in files and len(inside) < max(1, len(names)):
                targets.add(source)
    return graph


def part(module: str) -> str:
    """What FLOORS calls the module or its wing; of a package's own __init__, "".

    >>> part("agro_train.data.mix")
    'data'
    """
    package, _, inside = module.partition(".")
    alone = any(inside in floor for floor in FLOORS[package])
    return inside if alone else inside.partition(".")[0]


@packages
def test_imports_point_one_way(package: str) -> None:
    ours = {"agro_kernels", "agro_train", "benchmarks", "tests"}
    for path in (ROOT / package).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)} & ours
        assert roots <= ALLOWED[package], path


@packages
def test_every_part_has_one_floor(package: str) -> None:
    placed = [name for floor in FLOORS[package] for name in floor]
    assert len(set(placed)) == len(placed)
    parts = {part(module) for module in modules(package)} - {""}
    assert parts == set(placed), "place it in FLOORS, as low as what it imports allows"


@packages
def test_imports_go_down_the_floors(package: str) -> None:
    floor_of = {name: i for i, floor in enumerate(FLOORS[package]) for name in floor}
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports(package).items()
        for target in sorted(targets)
        if part(module) != part(target)
        and {part(module), part(target)} <= floor_of.keys()  # not the package's own __init__
        and floor_of[part(module)] <= floor_of[part(target)]
    ]
    assert not wrong, wrong


@packages
def test_no_import_goes_in_a_circle(package: str) -> None:
    try:
        TopologicalSorter(imports(package)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_trainer_sees_only_the_public_names_of_the_kernels() -> None:
    for path in (ROOT / "agro_train").rglob("*.py"):
        kernels = {name for name in imported(path) if name.split(".")[0] == "agro_kernels"}
        assert kernels <= {"agro_kernels"}, path
        assert imported(path).get("agro_kernels", set()) <= set(agro_kernels.__all__), path


def test_integrations_need_nothing_of_the_trainer() -> None:
    for module, targets in imports("agro_train").items():
        if part(module) == "integrations":
            assert all(part(target) == "integrations" for target in targets), module


def wings(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/__init__.py")}


@packages
def test_tests_mirror_the_package(package: str) -> None:
    assert wings(TESTS[package]) <= wings(ROOT / package)


def test_every_wing_of_the_trainer_has_tests() -> None:
    assert wings(TESTS["agro_train"]) == wings(ROOT / "agro_train")


def tree() -> dict[Path, set[str]]:
    """The names that CONTRIBUTING's tree gives for each folder.

    A line that starts with `folder/` is about that folder, and so are the lines indented deeper
    than it.
    """
    block = re.search(r"^```\n(agro_kernels/\n.*?)^```", CONTRIBUTING.read_text(), re.M | re.S)
    assert block is not None, "CONTRIBUTING.md: no tree"
    names: dict[Path, set[str]] = {}
    open_folders: list[tuple[int, Path]] = []
    for line in block[1].splitlines():
        indent, first = len(line) - len(line.lstrip()), line.split()[0]
        while open_folders and open_folders[-1][0] >= indent:
            open_folders.pop()
        folder = open_folders[-1][1] if open_folders else ROOT
        if first.endswith("/"):
            folder = folder / first
            open_folders.append((indent, folder))
        names.setdefault(folder, set()).update(re.findall(r"[\w-]+\.(?:py|cpp|h|md)\b|\w+/", line))
    return names


@pytest.mark.parametrize("package", [*ALLOWED, "csrc"])
def test_contributing_names_every_file(package: str) -> None:
    """A folder in a wing may be named as a whole."""
    names, missing = tree(), []
    for path in (ROOT / package).rglob("*"):
        if path.suffix not in (".py", ".cpp", ".h") or path.name == "__init__.py":
            continue
        folder = path.parent
        while folder not in names:
            folder = folder.parent
        first, *deeper = path.relative_to(folder).parts
        if (f"{first}/" if deeper else first) not in names[folder]:
            missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_contributing_names_only_what_exists() -> None:
    missing = [
        str((folder / name).relative_to(ROOT))
        for folder, names in tree().items()
        for name in names
        if f"{folder.name}/" != name and not (folder / name).exists()
    ]
    assert not missing


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_commands_of_the_texts_exist(text: str) -> None:
    targets = set(re.findall(r"^make ([\w-]+)", (ROOT / text).read_text(), flags=re.M))
    assert targets >= {"test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


def test_readme_gives_two_commands() -> None:
    targets = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.M)
    assert set(targets) == {"demo", "test"}
