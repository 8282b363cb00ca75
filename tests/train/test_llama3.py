"""The Llama-3 8B configuration, end to end on a CPU with a miniature of Llama-3's shape."""

import json
from pathlib import Path

import pytest

from agro_train.cli import main
from agro_train.data.rows import read_jsonl
from tests.train.models import save_llama3_miniature

pytestmark = pytest.mark.usefixtures("no_curves")


def test_llama3_configuration_trains_and_resumes_on_a_miniature(tmp_path: Path) -> None:
    model = save_llama3_miniature(tmp_path / "model")
    rows = [
        {"problem": f"What is {i}+{i}?", "solution": rf"It is $\boxed{{{2 * i}}}$."}
        for i in range(8)
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [
        f"model={model}",
        f"data={tmp_path / 'math.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        # what a GPU and many ranks would do
        "attn_implementation=sdpa",
        "fsdp=false",
        "steps=2",
        "save_every=1",
        "eval_every=1",
        "eval_prompts=2",
        "prompts_per_step=3",
        "num_generations=3",
        "max_completion_length=12",
        "token_budget=256",
        "reward=tests.train.reward_functions:even_share",
    ]
    assert main(["train", "llama3-8b-math", *small]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "steps=3"]) == 0
    steps = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in steps)
    assert steps[0]["kl"] == 0.0  # bfloat16 or not, policy and reference agree to the last bit
    assert (tmp_path / "run" / "checkpoint-3" / "model.safetensors").is_file()
