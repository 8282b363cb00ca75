"""Time and memory of one training pass of a whole model: its logits, the patched model, TRL's head.

    python -m benchmarks.trainer.model [--model FOLDER | --layers 30 | --smoke] [--batch 2]
        [--length 256] [--counted 256] [--repetitions 5]
        [--ways logits patched trl trl_agro hf_trainer hf_trainer_patched]

Question: what changes in a trainer when the log-probabilities come from `patch_model`, or when
TRL's trainers run inside `agro_logprobs`? One pass is forward and backward of the mean
log-probability of the counted tokens: the last --counted of each row. Ways:

    logits     log_softmax of the model's own logits, in fp32, and gather
    patched    patch_model(model); model(..., targets=targets).logprobs
    trl        TRL's fused head: add_fused_lm_head(model), as its trainers use it
    trl_agro   the same inside agro_logprobs

and two ways are a whole step of transformers' Trainer, with AdamW and without gradient clipping:

    hf_trainer          Trainer, its loss from the model's logits
    hf_trainer_patched  the LogprobTrainer of docs/hf-trainer.md, from the page itself

Method. Without --model a random Llama in SmolLM2-135M's shape, with all of its layers or fewer,
which leaves more of the pass to the head (--smoke: a tiny one). fp32; each way in a fresh process,
warmed up once; median of the repetitions, and the process's peak memory during a warm pass beyond
what it held before (gradients are freed before each; an optimiser's moments stay). A way whose
gradient of the embedding differs from that of `logits` by more than 1e-4 of its largest element is
reported as wrong.

Sample output, a row a way (the machine's line precedes it):

    patched              1.64 s   (1.61 to 1.70, n=5)     412 MB
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from agro_kernels import next_tokens, patch_model
from benchmarks.measure import timing
from benchmarks.measure.arguments import parser_of

WAYS = ("logits", "patched", "trl", "trl_agro", "hf_trainer", "hf_trainer_patched")
MOST_ERROR = 1e-4  # of the embedding's gradient, over its largest element
PAGE = Path(__file__).parents[2] / "docs" / "hf-trainer.md"
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMOKE = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def load(options: argparse.Namespace) -> Any:
    """The model that all ways run: the folder's, or a random Llama, the same in every process."""
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    torch.manual_seed(0)
    shape = SMOKE if options.smoke else {**SMOLLM2, "num_hidden_layers": options.layers}
    return LlamaForCausalLM(LlamaConfig(**shape))


def scorer(way: str, model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(ids (B, T), targets (B, T)) -> logprobs of the targets, 0 where not counted."""
    if way == "logits":

        def by_logits(ids: Tensor, targets: Tensor) -> Tensor:
            everything = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            picked: Tensor = everything.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
            return picked.where(targets != -100, 0.0)

        return by_logits
    if way == "patched":
        patch_model(model)
        return lambda ids, targets: model(input_ids=ids, targets=targets).logprobs
    from trl.trainer.utils import add_fused_lm_head

    from agro_train.integrations.trl import agro_logprobs

    add_fused_lm_head(model)
    around = agro_logprobs if way == "trl_agro" else nullcontext

    def fused(ids: Tensor, targets: Tensor) -> Tensor:
        with around():
            results = model(input_ids=ids, shift_labels=targets, fused_lm_head=True)
        scores: Tensor = results.log_probs
        return scores

    return fused


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory in MB, error of the embedding's gradient, and the times of one way."""
    model = load(options)
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.length))
    counted = torch.arange(options.length) >= options.length - options.counted
    counted = counted.expand_as(ids)
    if way.startswith("hf_trainer"):
        measured = trainer_steps(way, model, ids, counted, options.repetitions)
    else:
        measured = passes(way, model, ids, counted, options.repetitions)
    times, peak, gradient = measured
    error = 0.0
    if way != "logits":
        plain, targets = load(options), next_tokens(ids, counted)
        reference = scorer("logits", plain)
        (-reference(ids, targets).sum() / (targets != -100).sum()).backward()
        exact = plain.get_input_embeddings().weight.grad
        error = float((gradient - exact).abs().max() / exact.abs().max())
    return {"peak_mb": peak / 1e6, "error": error, **vars(timing.summary(times))}


def passes(
    way: str, model: Any, ids: Tensor, counted: Tensor, repetitions: int
) -> tuple[list[float], int, Tensor]:
    """Seconds of each pass, peak bytes of one, and the embedding's gradient."""
    targets = next_tokens(ids, counted)
    score = scorer(way, model)

    def one_pass() -> None:
        (-score(ids, targets).sum() / (targets != -100).sum()).backward()

    one_pass()
    gradient = model.get_input_embeddings().weight.grad.clone()
    times = []
    for _ in range(repetitions):
        model.zero_grad(set_to_none=True)
        times.append(timing.time_call(one_pass))
    model.zero_grad(set_to_none=True)
    return times, timing.peak_bytes(one_pass), gradient


class Steps(TrainerCallback):  # type: ignore[misc]
    """Time and peak memory of every step of a Trainer, and the first one's gradient."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peaks: list[int] = []
        self.gradient: Tensor | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        timing.reset_peak()
        self.resident = timing.resident_bytes()
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if self.gradient is None:
            self.gradient = model.get_input_embeddings().weight.grad.clone()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter() - self.began)
        self.peaks.append(timing.high_water_bytes() - self.resident)


def trainer_steps(
    way: str, model: Any, ids: Tensor, counted: Tensor, repetitions: int
) -> tuple[list[float], int, Tensor]:
    """As `passes`, of the steps of a Trainer on one batch again and again."""
    labels = ids.masked_fill(~counted, -100)
    batch = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=1 + repetitions,
            per_device_train_batch_size=len(batch),
            max_grad_norm=0.0,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        names = {"model": model, "args": args, "dataset": batch, "collate": default_data_collator}
        word = "class LogprobTrainer" if way == "hf_trainer_patched" else "trainer = Trainer("
        blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
        (block,) = [block for block in blocks if word in block]
        exec(compile(block, str(PAGE), "exec"), names)
        steps = Steps()
        names["trainer"].add_callback(steps)
        names["trainer"].train()
    assert steps.gradient is not None
    return steps.times[1:], max(steps.peaks[1:]), steps.gradient


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a way failed or has another gradient than `logits`."""
    options = parse(arguments)
    if options.process:
        print(json.dumps(measure(options.process, options)))
        return 0
    facts = timing.machine_facts()
    print(" ".join(f"{facts[name]}" for name in ("cpu", "torch", "ours_instruction_set", "commit")))
    given = sys.argv[1:] if arguments is None else arguments
    succeeded = [run_way(way, given) for way in options.ways]
    return 0 if all(succeeded) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--counted", type=int, default=256)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS[:2]))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--process", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_way(way: str, given: list[str]) -> bool:
    """Measures one way in a fresh process and prints its row; False if it failed or is wrong."""
    command = [sys.executable, "-m", "benchmarks.trainer.model", *given, "--process", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        print(f"{way:18s}  {said[-1]}")
        return False
    row = json.loads(done.stdout.splitlines()[-1])
    is_right = bool(row["error"] <= MOST_ERROR)
    note = "" if is_right else f"   wrong: gradient off by {row['error']:.1e}"
    spread = f"({row['min_s']:.2f} to {row['p80_s']:.2f}, n={row['n']})"
    print(f"{way:18s} {row['median_s']:6.2f} s   {spread:24s} {row['peak_mb']:7.0f} MB{note}")
    return is_right


if __name__ == "__main__":
    sys.exit(main())
