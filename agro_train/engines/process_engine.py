"""transformers' `generate` in a process of its own, which samples while the policy is trained."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors import SafetensorError
from torch import nn

from agro_train.config import TrainConfig
from agro_train.engines import generation_worker
from agro_train.engines.engine import TOKENS_S, Ask, BrokenEngine, Sampling, Snapshot, cut
from agro_train.engines.turns import Dialogue, Group, sampled
from agro_train.engines.weights import MEMORY, gathered_by_all, written
from agro_train.policy.adapter import merged_weights
from agro_train.policy.policy import unwrap
from agro_train.rewards.workers import NoResult, Workers
from agro_train.types import Prompt, Rollout


class ProcessEngine:
    """An `EngineAhead`. Every rank has a process of its own, with the rank's number of threads and
    on its device.

    Weights lie in memory on their way (/dev/shm, where the system has it): with `max_staleness` k
    up to k copies of the model.
    """

    def __init__(
        self,
        policy: nn.Module,
        accelerator: Any,
        tokenizer: Any,
        end_tokens: set[int],
        config: TrainConfig,
        dialogue: Dialogue | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.end_tokens = policy, tokenizer, end_tokens
        self.config, self.dialogue = config, dialogue
        self.folder = tempfile.TemporaryDirectory(prefix="agro-", dir=place(policy, config))
        path = Path(self.folder.name)
        unwrap(policy).model.config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / generation_worker.SETTINGS).write_text(config.to_yaml())
        (path / generation_worker.END_TOKENS).write_text(json.dumps(sorted(end_tokens)))
        self.workers = Workers(
            generation_worker.__name__,
            str(path),
            str(accelerator.device),
            str(torch.get_num_threads()),
            size=1,
            timeout_s=TOKENS_S,
            advice="its own messages above say more",
        )
        self.workers.start()

    def snapshot(self, step: int, prompt: Prompt) -> Snapshot:
        del prompt
        folder = Path(self.folder.name) / f"step-{step}"
        weights = merged_weights(unwrap(self.policy).model)
        try:
            with gathered_by_all(weights):
                # Anew where a signal has interrupted the first try.
                folder.mkdir(parents=True, exist_ok=True)
                return Snapshot(step, tuple(written(weights, folder, None)))
        except (OSError, SafetensorError) as error:
            raise BrokenEngine(
                f"max_staleness: expected room for a copy of the weights in {folder}, got {error}; "
                "make room there (TMPDIR names another place), or start with max_staleness=0"
            ) from error

    def load(self, snapshot: Snapshot) -> None:
        missing = self._job({"load": [str(file) for file in snapshot.files]})
        assert not missing, f"the sampling process has other weights: {missing[0]}"
        for file in snapshot.files:
            file.unlink()
        if snapshot.files:
            snapshot.files[0].parent.rmdir()

    def sample(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> Iterator[Group]:
        yield from sampled(self.dialogue, self._one_turn, prompts, **ask)

    def _one_turn(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> Iterator[Group]:
        temperature, step = ask["temperature"], ask["step"]
        groups = self._job(
            {
                "prompts": [prompt.ids for prompt in prompts],
                "seeds": list(ask["seeds"]),
                "num_generations": ask["num_generations"],
                "temperature": temperature,
                "limits": ask.get("limits"),
            }
        )
        for place, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
            yield place, [self._rollout(prompt, temperature, step, *found) for found in group]

    def _rollout(
        self,
        prompt: Prompt,
        temperature: float,
        step: int | None,
        ids: list[int],
        logprobs: list[float] | None,
        kept: str | None,
    ) -> Rollout:
        whole = cut(
            prompt,
            ids,
            self.tokenizer,
            self.end_tokens,
            temperature,
            step,
            logprobs,
            Sampling.of(self.config),
        )
        assert len(whole.completion_ids) == len(ids), "both processes know the same ends"
        return replace(whole, kept_ids=kept)

    def close(self) -> None:
        self.workers.close()
        self.folder.cleanup()

    def _job(self, job: dict[str, Any]) -> Any:
        (result,) = self.workers.map([job])
        if isinstance(result, NoResult):
            how = "took too long" if result is NoResult.TIMED_OUT else "ended"
            raise BrokenEngine(
                f"max_staleness: expected completions of the process that samples, got one that "
                f"{how}; its own messages above say more (the system ends the largest process when "
                "memory runs out); go on with --resume"
            )
        return result


def place(policy: nn.Module, config: TrainConfig) -> Path | None:
    """Where copies of the weights wait: in memory, if that holds all that may wait at once."""
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        return None
    model = unwrap(policy).model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    enough = shutil.disk_usage(MEMORY).free > (config.max_staleness + 1) * size
    return MEMORY if enough else None
