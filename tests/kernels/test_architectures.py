"""Architectures beyond Llama's: some of each kind here, all of them in docs/architectures.md."""

import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.kernels import architectures

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"

# Mixtures of experts, a state-space hybrid, an older decoder, each way to scale and to cap, one
# whose backbone has another name, and two that are no head of the last hidden state.
SOME = [
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoehybrid", "falcon_h1", "gpt2",
    "bart", "llama4_text", "cohere2", "minicpm3", "inkling_text", "gemma3_text", "nanochat",
    "recurrent_gemma", "xlstm", "bert", "rembert",
]  # fmt: skip


def rows() -> dict[str, list[str]]:
    """The page's lines: model_type to (class, outcome, logits or reason)."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| model_type"):
            family, *others = (cell.strip() for cell in line.strip("|").split("|"))
            found[family] = others
    return found


@pytest.mark.filterwarnings("ignore")  # transformers', of configurations this small
@pytest.mark.parametrize("family", SOME)
def test_an_architecture_is_what_the_page_says(family: str) -> None:
    """`visit` compares a served one's log-probabilities with its own logits'."""
    row = architectures.visit(family)
    name, outcome, why = rows()[family]
    assert (row.model, row.outcome) == (name, outcome)
    assert outcome == ("refused" if family in ("bert", "rembert") else "served")
    if outcome == "served":
        assert row.why == why
    else:
        assert row.why.startswith("model: expected ")


def test_the_readme_counts_what_the_page_lists() -> None:
    every = rows()
    count = Counter(outcome for _, outcome, _ in every.values())
    assert set(count) == {"served", "refused", "not built"}
    (said,) = re.findall(r"(\d+) of (\d+) architectures", (ROOT / "README.md").read_text())
    assert (int(said[0]), int(said[1])) == (count["served"], len(every))


def test_the_page_lists_the_mapping_of_its_version_of_transformers() -> None:
    if f"transformers {transformers.__version__} " not in PAGE.read_text():
        pytest.skip(f"the page is of another version than {transformers.__version__}")
    assert list(rows()) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
