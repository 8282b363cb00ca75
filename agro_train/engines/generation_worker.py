"""The program that samples beside a run, `python -m THIS_MODULE TIMEOUT_S FOLDER DEVICE THREADS`.

FOLDER holds the run's config.yaml and end tokens, and the model's configuration and tokenizer. A
job is `{"load": [files]}`, or prompts with what `Generator.complete` takes: the answer is then,
prompt after prompt, `[[ids, logprobs or null, kept ids or null]]` of its completions.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from agro_train import config as configuration
from agro_train.config import TrainConfig
from agro_train.data.batch import pack
from agro_train.engines.engine import Sampling
from agro_train.engines.transformers_engine import generate
from agro_train.policy.attention import name_at_load, settle
from agro_train.policy.load import barred, prepare, set_matmul_precision
from agro_train.policy.policy import Policy
from agro_train.rewards.worker_main import serve
from agro_train.types import Prompt, Rollout

SETTINGS = "config.yaml"
END_TOKENS = "end_tokens.json"  # the run's, which a model's configuration alone may not name


def start(folder: Path, device: str, threads: int) -> Callable[[dict[str, Any]], Any]:
    torch.set_num_threads(threads)
    config = configuration.load(folder / SETTINGS, [])
    set_matmul_precision(config.matmul_precision)
    shape = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(
        shape,
        dtype=getattr(torch, config.dtype),
        attn_implementation=name_at_load(config.attn_implementation),
    ).to(device)
    settle(model, config.attn_implementation)
    prepare(model, config)
    ends = set(json.loads((folder / END_TOKENS).read_text()))
    return Generator(model, AutoTokenizer.from_pretrained(folder), ends, config).work


class Generator:
    """The model, which has no weights before the first job of loading them."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, end_tokens: set[int], config: TrainConfig
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.end_tokens = end_tokens
        self.policy = Policy(model, barred(config, end_tokens))
        self.loaded = False

    def work(self, job: dict[str, Any]) -> Any:
        if "load" in job:
            return self.load(job["load"])
        assert self.loaded, "weights come first"
        low = self.config.mixed_precision == "bf16"
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            return self.complete(**job)

    def load(self, files: list[str]) -> list[str]:
        """The names of the parameters that no file had."""
        left = dict(self.model.named_parameters())
        for file in files:
            for name, weight in load_file(file).items():
                left.pop(name).data.copy_(weight)
        self.loaded = True
        return list(left)

    def complete(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        num_generations: int,
        temperature: float,
        limits: list[int] | None = None,
    ) -> list[list[tuple[tuple[int, ...], list[float] | None, str | None]]]:
        rollouts = generate(
            self.model,
            self.tokenizer,
            [Prompt("", "", tuple(ids), {}) for ids in prompts],
            seeds=seeds,
            num_generations=num_generations,
            temperature=temperature,
            max_completion_length=self.config.max_completion_length,
            batch_size=self.config.generation_batch_size,
            end_tokens=self.end_tokens,
            sampling=Sampling.of(self.config),
            limits=limits,
        )
        logprobs = self.logprobs(rollouts) if temperature else [None] * len(rollouts)
        found = [
            (r.completion_ids, of_tokens, r.kept_ids)
            for r, of_tokens in zip(rollouts, logprobs, strict=True)
        ]
        size = num_generations
        return [found[start : start + size] for start in range(0, len(found), size)]

    def logprobs(self, rollouts: list[Rollout]) -> list[list[float] | None]:
        """Of each completion's tokens, nats, at the temperature of the run: by the head that the
        trainer scores with."""
        found: list[list[float] | None] = [None] * len(rollouts)
        config = self.config
        with torch.no_grad():
            for micro in pack(
                rollouts,
                token_budget=config.token_budget,
                share_prompts=config.share_prompts,
                min_new_tokens=config.min_new_tokens,
            ):
                stats = self.policy(micro.to(self.model.device), config.temperature)
                parts = stats.logprobs.float().cpu().split(micro.cu_seqlens.diff().tolist())
                for row, part in zip(micro.rows.tolist(), parts, strict=True):
                    found[row] = part.tolist()
        return found


if __name__ == "__main__":
    _, timeout_s, folder, device, threads = sys.argv
    try:
        serve(lambda: start(Path(folder), device, int(threads)), timeout_s=float(timeout_s))
    finally:  # where the run was killed nobody else can: it may hold copies of the weights
        shutil.rmtree(folder, ignore_errors=True)
