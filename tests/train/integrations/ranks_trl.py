"""One rank of two under DDP: AGROTrainer's gradient is that of the whole batch of both ranks.

Arguments: the model's folder and a folder to write to. A group's completions are on both ranks.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset

from agro_train.integrations.trl import AGROConfig
from agro_train.policy import tiny
from tests.train.integrations import test_trl as one


def padded(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Both ranks' rows in TRL's order; prompts padded left, completions right."""
    joined = {"rewards": batches[0]["rewards"]}  # every rank has all of them
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        width = max(batch[name].size(1) for batch in batches)
        left = name.startswith("prompt")
        parts = []
        for batch in batches:
            missing = width - batch[name].size(1)
            sides = (missing, 0) if left else (0, missing)
            parts.append(torch.nn.functional.pad(batch[name], sides))
        joined[name] = torch.cat(parts)
    return joined


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    recorder = one.Recorder()
    options = one.common(output, gradient_accumulation_steps=3, per_device_train_batch_size=3)
    trainer = one.Spying(
        one.policy(folder),
        [one.share_of_small_digits, one.length],
        AGROConfig(
            **options, ddp_backend="gloo", **{**one.rollouts(beta=0.3), "num_generations": 6}
        ),
        train_dataset=Dataset.from_list(one.PROMPTS),
        processing_class=tiny.build_tokenizer(),
        callbacks=[recorder],
    )
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    batches: list[Any] = [None, None]
    dist.all_gather_object(batches, trainer.scored)
    one.compare(recorder, folder, padded(batches), {"beta": 0.3}, group_size=6)
    print("both ranks: same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
