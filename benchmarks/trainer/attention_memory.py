"""Memory of a pass over a packed micro-batch whose prompts are shared, by its length and attention.

    python -m benchmarks.trainer.attention_memory [--lengths 1024 2048 4096 8192] [--out FILE]

Question: how do masks, and the passes that take them, grow with the tokens of a micro-batch?

Method. A micro-batch as the trainer packs it: groups of a prompt of 64 tokens and 8 completions, of
which 56 tokens are read, 512 tokens a group. A Llama of 2 layers and width 256 with random float32
weights reads it on the CPU, one thread. A pass goes from the micro-batch to the hidden states,
so it makes the mask, too, as the trainer's does; with a backward pass, to the gradients. Every row
is a process of its own: a first pass compiles and warms up, of a second the peak is taken (Linux's
VmHWM) less what the process had before it. Freed blocks above 64 kB return to the system at once.
Flex attention is what torch compiles for a CPU; its hidden states are compared with sdpa's
afterwards. torch has no backward pass of it on a CPU, so there is no such row.

One row of the CSV:

    attention  sdpa: a mask of L x L; flex_attention: a block mask
    form       forward, forward_backward
    tokens     L, read by the pass
    mask_mb    the mask alone, 1e6 bytes: its tensors, and those that its function reads
    peak_mb    the pass, mask included, beyond weights and micro-batch
"""

import argparse
import csv
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from agro_train.data.batch import pack
from agro_train.policy.attention import packed_inputs, settle
from agro_train.types import MicroBatch, Rollout
from benchmarks.measure import timing
from benchmarks.measure.arguments import parser_of
from benchmarks.measure.rows import RESULTS, column_names, texts

PROMPT, COMPLETION, COMPLETIONS = 64, 56, 8  # tokens read of each, and completions of a prompt
GROUP = PROMPT + COMPLETIONS * COMPLETION
VOCABULARY = 512
CASES = (("sdpa", "forward"), ("sdpa", "forward_backward"), ("flex_attention", "forward"))


@dataclass(frozen=True)
class Row:
    """The module's docstring says what the columns are."""

    attention: str
    form: str
    tokens: int
    mask_mb: float | None
    peak_mb: float | None
    cpu: str
    torch: str
    threads: str
    commit: str


def micro_batch(tokens: int) -> MicroBatch:
    """`tokens`, a multiple of GROUP, in one micro-batch."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())

    prompts = [(str(group), ids(PROMPT)) for group in range(tokens // GROUP)]
    # Of a completion the last token is predicted and not read.
    rollouts = [
        Rollout(group, "", prompt, "", ids(COMPLETION + 1), finish="length", reward=None)
        for group, prompt in prompts
        for _ in range(COMPLETIONS)
    ]
    (micro,) = pack(rollouts, token_budget=tokens, share_prompts=True)
    return micro


def model_of(attention: str) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaModel(config)
    settle(model, attention)
    return model


def mask_bytes(mask: Any) -> int:
    """Of a dense mask, or of a block mask with what its function reads for each token."""
    if isinstance(mask, Tensor):
        return mask.nbytes
    inside = [*mask.as_tuple(), *inspect.getclosurevars(mask.mask_mod).nonlocals.values()]
    return sum(each.nbytes for each in inside if isinstance(each, Tensor))


def hidden_states(model: LlamaModel, micro: MicroBatch) -> Tensor:
    """(L, D)."""
    hidden: Tensor = model(**packed_inputs(micro, model), use_cache=False).last_hidden_state[0]
    return hidden


def measure(attention: str, form: str, tokens: int) -> dict[str, float]:
    """`mask_mb` and `peak_mb` of a case, in this process.

    Raises ArithmeticError where the attention does not compute what sdpa does.
    """
    model, micro = model_of(attention), micro_batch(tokens)

    def forward() -> Tensor:
        with torch.no_grad():
            return hidden_states(model, micro)

    def forward_backward() -> None:
        model.zero_grad()
        hidden_states(model, micro)[micro.predictors].square().mean().backward()

    run = {"forward": forward, "forward_backward": forward_backward}[form]
    run()
    model.zero_grad()
    peak = timing.peak_bytes(run)
    mask = mask_bytes(packed_inputs(micro, model)["attention_mask"])
    if attention != "sdpa":
        found = forward()
        settle(model, "sdpa")
        apart = float((found - forward()).abs().max())
        if not apart < 1e-4:  # the hidden states are of the size 1
            raise ArithmeticError(f"{attention}: expected sdpa's hidden states, got {apart} beside")
    return {"mask_mb": mask / 1e6, "peak_mb": peak / 1e6}


def in_a_process(attention: str, form: str, tokens: int) -> dict[str, float] | None:
    """`measure` in a fresh process; None: it failed, and has said why."""
    command = [sys.executable, "-m", "benchmarks.trainer.attention_memory"]
    command += ["--process", attention, form, "--lengths", str(tokens)]
    environment = {**os.environ, **timing.RETURNS_FREED_MEMORY, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_attention_memory.csv")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for tokens in options.lengths:
        if tokens < GROUP or tokens % GROUP:
            parser.error(
                f"--lengths: expected multiples of {GROUP}, the tokens of a group, got {tokens}; "
                f"name {max(1, round(tokens / GROUP)) * GROUP}"
            )
    if options.process:
        print(json.dumps(measure(*options.process, *options.lengths)))
        return 0
    facts = timing.machine_facts() | {"threads": "1"}
    about = [facts[name] for name in ("cpu", "torch", "threads", "commit")]
    rows = []
    for attention, form in CASES:
        for tokens in options.lengths:
            found = in_a_process(attention, form, tokens)
            if found is None:
                print(f"{attention}, {form}, {tokens} tokens: failed, see its output above")
                return 1
            rows.append(Row(attention, form, tokens, found["mask_mb"], found["peak_mb"], *about))
            print(
                f"{attention:16s}{form:18s}{tokens:6d} tokens   mask {found['mask_mb']:7.2f} MB   "
                f"pass {found['peak_mb']:7.1f} MB",
                flush=True,
            )
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(column_names(Row))
        writer.writerows(map(texts, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
