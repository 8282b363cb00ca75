"""The pages: the site's navigation names each, links lead somewhere, and every block of code is run
by a test or says that it is not.
"""

import ast
import functools
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from agro_train import cli, config
from agro_train.callbacks import Callback

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
TEXTS = [*PAGES, README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEXTS += [ROOT / folder / "README.md" for folder in ("benchmarks", "csrc", "examples")]

texts = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())


class SiteLoader(yaml.SafeLoader):
    """mkdocs.yml names functions of Python, which are of no interest here."""


SiteLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def mounted() -> dict[str, str]:
    """Files outside docs/ that are pages of the site, and their places on it."""
    for node in ast.parse((DOCS / "site_hooks.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MOUNTED":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("docs/site_hooks.py: no MOUNTED")


def named(nav: Any) -> Iterator[str]:
    """The pages that a part of the navigation names."""
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from named(inner)


def test_navigation_names_every_page_once() -> None:
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), SiteLoader)
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES} | set(mounted().values())
    assert sorted(named(site["nav"])) == sorted(pages), "a page has its line in nav of mkdocs.yml"
    assert all((ROOT / name).is_file() for name in mounted())


@functools.cache
def without_code(path: Path) -> str:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("](", "] ("), text)


@functools.cache
def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings, and so the site."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(path), flags=re.M):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = found[name] = found.get(name, -1) + 1
        names.add(name if count == 0 else f"{name}-{count}")
    return names


@texts
def test_every_link_leads_somewhere(text: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        target = (text.parent / name).resolve() if name else text
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


class Block(NamedTuple):
    language: str
    text: str
    note: str  # of the comment before it, <!-- not run: ... -->


def blocks(path: Path) -> list[Block]:
    pattern = r"(?:<!-- not run: ([^\n]+?) -->\n+)?^```(\w*)\n(.*?)^```$"
    found = re.findall(pattern, path.read_text(), flags=re.M | re.S)
    return [Block(language, text, note) for note, language, text in found]


# --- Code -----------------------------------------------------------------------------------------

INTEGRATIONS = "tests/train/integrations"
# page: {a text of a block: the file of the test that runs it}. Commands of `agro`, configurations
# and rows of data need no entry: they are read below.
RUN_BY = {
    "README.md": dict.fromkeys(
        ("log_softmax", "import linear_logprobs", "agro_coefficients(", "def short"),
        "tests/test_docs.py",
    ),
    "algorithms.md": {"def standardised": "tests/train/test_algorithm.py"},
    "distillation.md": dict.fromkeys(
        ("def topk_distillation", "def reverse_kl", "def on_policy", "def whole_vocabulary"),
        "tests/kernels/test_distillation.py",
    ),
    "environments.md": {"class SecondTry": "tests/train/environments/test_docs.py"},
    "hf-trainer.md": {
        "trainer = Trainer(": f"{INTEGRATIONS}/test_losses.py",
        "class LogprobTrainer": f"{INTEGRATIONS}/test_losses.py",
    },
    "index.md": {"import linear_logprobs": "tests/test_docs.py"},
    "losses.md": {
        f"def {name}(": f"{INTEGRATIONS}/test_losses.py"
        for name in ("cross_entropy", "dpo", "rloo", "tapered")
    },
    "other-trainers.md": {
        "python train_agro.py": f"{INTEGRATIONS}/test_recipes.py",
        "is_correction_level": f"{INTEGRATIONS}/test_recipes.py",
        "class AgroEstimator": f"{INTEGRATIONS}/test_recipes.py",
        "def agro_loss": f"{INTEGRATIONS}/test_recipes.py",
        "def group_advantages": f"{INTEGRATIONS}/test_recipes.py",
    },
    "plain-loop.md": dict.fromkeys(
        ("# before", "# after", "# by hand", "for rows in", "Accelerator(", "LightningModule"),
        f"{INTEGRATIONS}/test_losses.py",
    ),
    "rewards.md": {
        "def brief": "tests/train/rewards/test_docs.py",
        "class ContainsReward": "tests/train/rewards/test_docs.py",
    },
    "trl.md": {"trainer = AGROTrainer(": f"{INTEGRATIONS}/test_trl.py"},
    "verl.md": {
        "python -m verl": f"{INTEGRATIONS}/test_verl.py",
        "+algorithm.agro.taper": f"{INTEGRATIONS}/test_verl.py",
    },
    "watching.md": {"class MyClass": "tests/test_docs.py"},
}
SHELL = ("", "sh", "bash")
# Besides `agro`: tests/benchmarks/test_readme.py looks for the modules of benchmarks,
# tests/test_layout.py for make's targets, other tests run the self-check and the completion, and
# what is installed is there before any test.
READ_COMMANDS = (
    r"agro |python -m (agro_kernels|benchmarks)\b|eval \$\(agro --print-completion |pip install "
    r"|make \w+$"
)


def name_of(page: Path) -> str:
    """As RUN_BY calls it."""
    return page.relative_to(ROOT if page == README else DOCS).as_posix()


pages = pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block, lines that go on with \\ joined, without comments."""
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def read_below(block: Block) -> bool:
    if block.language in ("yaml", "json"):
        return True
    return block.language in SHELL and all(
        re.match(READ_COMMANDS, " ".join(words)) for words in commands(block)
    )


@pages
def test_every_block_is_run_or_says_that_it_is_not(page: Path) -> None:
    run_by, used = RUN_BY.get(name_of(page), {}), set()
    for block in blocks(page):
        texts = {text for text in run_by if text in block.text}
        used |= texts
        if block.note:
            assert not texts, f"{block.text}\nhas a test, {run_by[texts.pop()]}, and says not run"
        else:
            assert texts or read_below(block), (
                f"{block.text}\nis run by no test: name the one that does in RUN_BY, or put "
                "<!-- not run: why --> and an empty line before the block"
            )
    assert used == run_by.keys()


@pages
def test_tests_of_blocks_read_the_page(page: Path) -> None:
    for test in set(RUN_BY.get(name_of(page), {}).values()):
        assert page.name in (ROOT / test).read_text(), test


@pages
def test_commands_of_agro_are_taken(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the resolved configuration: no run is started. FIGURE stands for any figure; a
    variable of the shell is taken as a text.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("steps: 3\n")
    text = joined(page).replace("FIGURE", "fig1")
    text = re.sub(r"\$(\{[^}]*\}|\w+)", lambda name: re.sub(r"\W", "", name[0]), text)
    for line in re.findall(r"^(?:    )?agro (.*)$|-m agro_train ([^\n`']*)", text, flags=re.M):
        words = shlex.split("".join(line), comments=True)
        options = cli.parse([word for word in words if word not in ("&", "...")])
        if words[0] == "train" and options.resume is None:
            config.from_arguments(options.settings)
        elif words[0] in ("rollout", "eval"):
            config.read_overrides([word for word in words if re.match(r"\w+=", word)])


@texts
def test_extras_that_are_installed_exist(text: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\bpip install '?\.\[([\w,-]+)\]", text.read_text()):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def joined(page: Path) -> str:
    """The page with lines that go on joined."""
    return re.sub(r"\\\n\s*", " ", page.read_text())


@pages
def test_configurations_and_rows_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
        elif block.language == "yaml" and "distributed_type" in block.text:
            (tmp_path / "accelerate.yaml").write_text(block.text)
            read = load_config_from_file(str(tmp_path / "accelerate.yaml"))
            assert read.num_processes == yaml.safe_load(block.text)["num_processes"]
        elif block.language == "yaml":
            (tmp_path / "my.yaml").write_text(block.text)
            config.load(tmp_path / "my.yaml")


def python_block(page: Path, text: str, **given: Any) -> dict[str, Any]:
    """The names that a block leaves behind; given: those that it takes for granted."""
    (block,) = [block for block in blocks(page) if text in block.text]
    names = dict(given)
    exec(compile(block.text, str(page), "exec"), names)
    return names


def test_first_program_of_the_start_page() -> None:
    names = python_block(DOCS / "index.md", "import linear_logprobs")
    assert names["logprobs"].shape == (6,) and names["logprobs"][5] == 0.0
    assert names["hidden"].grad[:5].abs().sum() > 0.0 and names["hidden"].grad[5].abs().sum() == 0.0


def test_readme_replaces_logits_by_an_op_of_the_same_result() -> None:
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 50, bias=False)})
    given = {"model": model, "hidden": torch.randn(6, 8), "targets": torch.randint(50, (6,))}
    before = python_block(README, "log_softmax", **given)["logprobs"]
    after = python_block(README, "import linear_logprobs", **given)["logprobs"]
    assert after.shape == (6,) and after.dtype == torch.float32 and after.requires_grad
    torch.testing.assert_close(after, before)


def test_readme_makes_the_gradient_of_agro() -> None:
    sequence_of_token = torch.arange(4).repeat_interleave(3)
    given = {
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64),
        "logprobs": torch.zeros(4, dtype=torch.float64),
        "ref_logprobs": torch.zeros(4, dtype=torch.float64),
        "groups": torch.tensor([0, 0, 1, 1]),
        "sequence_of_token": sequence_of_token,
        "hidden": torch.randn(12, 8),
        "weight": torch.randn(50, 8, requires_grad=True),
        "targets": torch.randint(50, (12,)),
    }
    names = python_block(README, "agro_coefficients(", **given)
    # What was right is made likelier, what was wrong less likely, each by as much as its pair.
    assert names["c"].tolist() == [-x for x in names["c"][[1, 0, 3, 2]].tolist()]
    assert names["c"][0] < 0 < names["c"][1]
    assert names["weight"].grad.abs().sum() > 0


def test_readme_has_a_reward() -> None:
    short = python_block(README, "def short")["short"]
    assert short(["It is 42.", "a" * 500 + "42", "41"], answer=[42] * 3) == [1.0, 0.0, 0.0]


def test_callbacks_page_has_every_method() -> None:
    shown = python_block(DOCS / "watching.md", "class MyClass")["MyClass"]
    names = [name for name in vars(Callback) if name.startswith("on_")]
    assert [name for name in vars(shown) if name.startswith("on_")] == names
    for name in names:
        arguments = [
            list(inspect.signature(getattr(one, name)).parameters) for one in (shown, Callback)
        ]
        assert arguments[0] == arguments[1], name
