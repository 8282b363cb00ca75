"""One of three processes that find the gradient of `ragged_rollouts` together, one group each; then
two of them do, with two groups and one.

    python -m tests.train.gradient_main FOLDER RANK PORT_FOR_THREE PORT_FOR_TWO
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from agro_train.data.batch import build_batch
from agro_train.models import place_on_devices
from agro_train.policy.adapter import whole_tensor
from agro_train.step import update
from tests.train.gradients import CONFIG, lora_policy, numbers, rollouts_of
from tests.train.models import tiny_policy

KINDS = tuple(
    where + what
    for what in ("", "-adapter", "-early", "-kept")
    for where in ("replicated", "sharded")
)


def save_gradient(folder: Path, kind: str, world: int) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    config = replace(
        CONFIG, lr_weight=0.7, fsdp="sharded" in kind, use_peft=kind.endswith("adapter")
    )
    if config.use_peft:
        trained = base = lora_policy().model
    else:
        trained, base = tiny_policy(seed=0).model, tiny_policy(seed=1).model
    rollouts, barred, early = rollouts_of(kind)
    policy, reference = place_on_devices(trained, base, config, accelerator, barred)
    before = {name: whole_tensor(p).clone() for name, p in policy.named_parameters()}
    mine = [
        (r, n)
        for r, n in zip(rollouts, numbers(rollouts), strict=True)
        if n % world == accelerator.process_index
    ]
    # So few tokens a micro-batch that the ranks have different numbers of them.
    batch = build_batch(
        [r for r, _ in mine],
        [n for _, n in mine],
        [True] * len(mine),
        token_budget=12,
        share_prompts=True,
        min_new_tokens=early,
    )
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    update(policy, reference, batch, config, accelerator, optimizer, scheduler)
    change = {
        name.removeprefix("module."): before[name] - whole_tensor(p)
        for name, p in policy.named_parameters()
    }
    if accelerator.is_main_process:
        torch.save(change, folder / f"{kind}-{world}.pt")


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    for world, port in ((3, sys.argv[3]), (2, sys.argv[4])):
        if rank < world:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            for kind in KINDS:
                save_gradient(folder, kind, world)
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)
