"""What the kit does, in order of worth: the table of its parts, on a GPU and dry.

Nothing heavy is imported here: a part's function is named, and found by the process that runs it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

TESTS = Path(__file__).parents[2] / "tests"
DRY_SHAPE = "dry"
DRY_LIMIT_S = 600.0


@dataclass(frozen=True)
class Job:
    """Steps of one trainer on a model with random weights. Every completion has the same length.

    A micro-batch is `groups_at_once` groups for both trainers: ours packs a prompt once for its
    group, TRL's has a padded row for each completion.
    """

    trainer: Literal["agro", "trl"]
    shapes: tuple[
        str, ...
    ]  # of benchmarks.gpu_kit.shapes; of several, the first that is planned to fit
    lora: bool  # an adapter on bfloat16 weights; else all of them, in float32, by bfloat16 products
    prompts: int
    generations: int  # completions of each
    prompt_length: int  # tokens
    completion_length: int  # tokens
    groups_at_once: int
    steps: int  # timed; one more comes before them
    gradient_checkpointing: bool = False

    @property
    def token_budget(self) -> int:
        """Tokens of our micro-batch. The model never reads the last one of a completion."""
        one_group = self.prompt_length + self.generations * (self.completion_length - 1)
        return self.groups_at_once * one_group

    def dry(self) -> "Job":
        """The same on a shape for which a CPU takes no time."""
        small = Job(self.trainer, (DRY_SHAPE,), self.lora, 2, 2, 5, 4, groups_at_once=1, steps=1)
        return replace(small, gradient_checkpointing=self.gradient_checkpointing)


@dataclass(frozen=True)
class Part:
    """One process: a function that is given a Report, the part's folder and the arguments."""

    name: str
    about: str
    function: str  # module:function
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: str = ""  # a package without which it is skipped


MACHINE = "machine"
SMOLLM2_FULL = Job("agro", ("smollm2-135m",), False, 16, 8, 128, 128, groups_at_once=4, steps=4)
LLAMA_LORA = Job("agro", ("llama3-8b",), True, 16, 8, 256, 128, groups_at_once=2, steps=3)
# Largest first. With weights, reference, gradients and moments in float32, 20 bytes a weight.
LARGEST_FULL = Job(
    "agro",
    ("llama3-8b", "llama3-3b", "smollm2-1.7b", "llama3-1b", "smollm2-135m"),
    False,
    16,
    8,
    256,
    128,
    groups_at_once=2,
    steps=3,
    gradient_checkpointing=True,
)
TINY = ["tiny-arithmetic"]
TINY_SHORT = [*TINY, "steps=10", "warm_start_steps=50", "eval_every=10", "eval_prompts=32"]
TINY_DRY = [*TINY, "steps=1", "warm_start_steps=1", "eval_every=0", "prompts_per_step=2",
            "num_generations=2", "max_completion_length=4"]  # fmt: skip


def table(*, dry: bool) -> list[Part]:
    """The parts in order: later ones are skipped when time is up. Limits are about twice what each
    is thought to take."""
    short, preset = (TINY_DRY, TINY_DRY) if dry else (TINY_SHORT, TINY)
    trains = "benchmarks.gpu_kit.checks:agro_train"
    parts = [
        Part(
            MACHINE,
            "card, clocks, versions, and whether Triton's kernels run",
            "benchmarks.gpu_kit.checks:machine",
            90,
        ),
        Part(
            "agro_train_tiny",
            f"agro train {' '.join(short)}",
            trains,
            90,
            {"settings": short},
        ),
        _training("smollm2_135m_full", SMOLLM2_FULL, 100, dry=dry),
        _training("llama3_8b_lora", LLAMA_LORA, 180, dry=dry),
        Part(
            "marked_tests",
            "pytest -m gpu",
            "benchmarks.gpu_kit.checks:marked_tests",
            180,
            # Without a GPU the first file is skipped whole.
            {"files": [str(TESTS / "kernels" / "test_cuda.py")] if dry else marked_files()},
        ),
        _training("trl_llama3_8b_lora", replace(LLAMA_LORA, trainer="trl"), 150, dry=dry),
        _training("largest_full", LARGEST_FULL, 150, dry=dry),
        _training("trl_smollm2_135m_full", replace(SMOLLM2_FULL, trainer="trl"), 100, dry=dry),
        _training("smollm2_135m_lora", replace(SMOLLM2_FULL, lora=True), 80, dry=dry),
        Part(
            "agro_train_preset", f"agro train {' '.join(preset)}", trains, 150, {"settings": preset}
        ),
        Part("self_check", "python -m agro_kernels", "benchmarks.gpu_kit.checks:self_checked", 60),
    ]
    if dry:  # a CPU that is busy with other things takes longer than a GPU machine
        parts = [replace(part, limit_s=DRY_LIMIT_S) for part in parts]
    return parts


def marked_files() -> list[str]:
    """The test files in which a test is marked gpu."""
    files = sorted(TESTS.rglob("test_*.py"))
    return [str(path) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def _training(name: str, job: Job, limit_s: float, *, dry: bool) -> Part:
    trainer = {"agro": "agro train", "trl": "TRL's GRPOTrainer"}[job.trainer]
    trained = "an adapter (LoRA) on bfloat16 weights" if job.lora else "all weights"
    shape = job.shapes[0] if len(job.shapes) == 1 else "the largest shape that fits"
    return Part(
        name,
        f"{trainer}, {trained}, {shape}",
        f"benchmarks.gpu_kit.{job.trainer}_steps:run",
        limit_s,
        {"job": job.dry() if dry else job},
        needs="trl" if job.trainer == "trl" else "",
    )
