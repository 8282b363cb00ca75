"""One rank of two: a patched model under DDP and under FSDP2 against the same model alone.

Arguments: the file that the ranks meet at, and the rank. Each rank reads its own rows; the sum of
the ranks' gradients must be the whole batch's.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from agro_kernels import next_tokens, patch_model
from tests.kernels.small_models import build, token_batch


def loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    results = model(input_ids=ids, targets=targets, temperature=0.7)
    return -(results.logprobs.sum() + 0.1 * results.entropy.sum())


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def compare(name: str, wrapped: nn.Module, expected: dict[str, Tensor], mine: slice) -> None:
    ids, targets = batch()
    loss(wrapped, ids[mine], targets[mine]).backward()
    inner = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    found = {key: whole(p.grad) for key, p in inner.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():  # DDP and FSDP2 average over the ranks
        torch.testing.assert_close(2 * gradient, expected[key], rtol=1e-4, atol=1e-4, msg=key)
    print(f"{name}: same", flush=True)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    ids, mask = token_batch(batch=4)
    return ids, next_tokens(ids, mask)


def main() -> None:
    store, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    for tied in (True, False):
        model = patch_model(build("llama", tied))
        alone = copy.deepcopy(model)
        loss(alone, *batch()).backward()
        expected = {k: p.grad for k, p in alone.named_parameters() if p.grad is not None}
        if tied:
            compare("replicated", DistributedDataParallel(copy.deepcopy(model)), expected, mine)
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if not tied:  # a head of its own group: it is gathered because it is called as a module
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        compare("sharded" if tied else "sharded, head apart", model, expected, mine)
    dist.barrier()  # a rank that tears down while the other still sends can abort it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
