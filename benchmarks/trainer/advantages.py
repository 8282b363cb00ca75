"""What AGRO's advantages and its linear loss cost by themselves, beside verl's RLOO and PPO loss.

    python -m benchmarks.trainer.advantages [--prompts 128] [--generations 8] [--tokens 1024]
        [--micro-batch 32] [--repetitions 20]

Question: how much time and memory do the adapters of verl and OpenRLHF, and the recipes for other
trainers, add or save? They replace the advantages and, in verl, the loss over log-probabilities
that the trainer has computed already; this measures both, on random numbers.

    agro_coefficients  one a completion, from its reward and two sums of log-probabilities
    verl advantage     of rloo and agro, from rewards (B, T), mask (B, T) and uids (B,)
    verl loss          of vanilla and agro, forward and backward to the log-probabilities of one
                       micro-batch (b, T)

Method: one process, fp32 on the CPU, one call not counted, median of the repetitions, and the peak
memory during a call beyond what was held before. The rows of verl need verl, see `make test-verl`;
without it they are left out. The advantages of verl's `agro` and `rloo` must agree to 1e-4, since
all groups are of one size, and the gradients of the two losses, since the ratio is 1.

Sample output:

    verl advantage agro      6.1 ms   (5.9 to 6.4, n=20)      21.0 MB
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agro_kernels import agro_coefficients
from benchmarks.measure import timing
from benchmarks.measure.arguments import add_numbers, parser_of

BETA = 0.05


def report(name: str, call: Callable[[], object], repetitions: int) -> None:
    """Times a call, after one that is not counted, and prints its row."""
    call()
    peak = timing.peak_bytes(call)
    times = timing.summary(timing.time_calls(call, repetitions))
    spread = f"({times.min_s * 1e3:.2f} to {times.p80_s * 1e3:.2f}, n={times.n})"
    print(f"{name:20s} {times.median_s * 1e3:8.2f} ms   {spread:28s} {peak / 1e6:8.1f} MB")


def coefficients(options: argparse.Namespace) -> None:
    """agro_coefficients for all completions of a step."""
    rows = options.prompts * options.generations
    rewards = torch.randint(0, 2, (rows,)).double()
    policy_logprobs, ref_logprobs = -100 * torch.rand(2, rows, dtype=torch.float64)
    groups = torch.arange(rows) // options.generations

    def call() -> object:
        return agro_coefficients(
            rewards, policy_logprobs, ref_logprobs, groups, beta=BETA, scale=1 / BETA
        )

    report("agro_coefficients", call, options.repetitions)


def verl_functions(options: argparse.Namespace) -> bool:
    """Prints a row for each of verl's functions; whether rloo's and PPO's agree with ours."""
    rows = options.prompts * options.generations
    mask = torch.arange(options.tokens) < torch.randint(1, options.tokens + 1, (rows, 1))
    advantages = verl_advantages(options, mask)
    part = slice(0, options.micro_batch)
    logprobs = -torch.rand(rows, options.tokens)[part]
    gradients = verl_gradients(options, logprobs, advantages["agro"][part], mask[part])
    return bool(
        torch.allclose(advantages["rloo"], advantages["agro"], rtol=1e-4, atol=1e-4)
        and torch.allclose(gradients["vanilla"], gradients["agro"], rtol=1e-4, atol=1e-7)
    )


def verl_advantages(options: argparse.Namespace, mask: Tensor) -> dict[str, Tensor]:
    """(B, T) advantages of each estimator, on random rewards. mask: (B, T) bool."""
    import numpy as np
    from verl.trainer.config import AlgoConfig, KLControlConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rewards = torch.randn(mask.shape) * mask
    uids = np.repeat([f"{i:032x}" for i in range(options.prompts)], options.generations)
    config = AlgoConfig(use_kl_in_reward=True, kl_ctrl=KLControlConfig(kl_coef=BETA))
    advantages: dict[str, Tensor] = {}
    for name in ("rloo", "agro"):
        estimate = get_adv_estimator_fn(name)

        def call(estimate: Any = estimate) -> Any:
            return estimate(rewards, mask.long(), index=uids, config=config)

        advantages[name] = call()[0]
        report(f"verl advantage {name}", call, options.repetitions)
    return advantages


def verl_gradients(
    options: argparse.Namespace, logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The gradient of each loss, with the log-probabilities as the old ones too. All (b, T)."""
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    sizes = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        trainer_config = compose("ppo_trainer", overrides=sizes)
    actor = omega_conf_to_dataclass(trainer_config.actor_rollout_ref.actor)
    num_completions = options.prompts * options.generations
    actor.global_batch_info.update(dp_size=1, global_batch_size=num_completions)
    gradients: dict[str, Tensor] = {}
    for name in ("vanilla", "agro"):
        loss_of = get_policy_loss_fn(name)
        leaf = logprobs.clone().requires_grad_()

        def call(loss_of: Any = loss_of, leaf: Any = leaf) -> None:
            leaf.grad = None
            loss, _ = loss_of(
                old_log_prob=logprobs,
                log_prob=leaf,
                advantages=advantages,
                response_mask=mask.long(),
                loss_agg_mode="seq-mean-token-sum",
                config=actor,
            )
            loss.backward()

        call()
        assert leaf.grad is not None
        gradients[name] = leaf.grad
        report(f"verl loss {name}", call, options.repetitions)
    return gradients


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if verl's functions and ours do not agree."""
    parser = parser_of(__doc__)
    add_numbers(parser, prompts=128, generations=8, tokens=1024, micro_batch=32, repetitions=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    facts = timing.machine_facts()
    versions = f"verl {timing.version_or('verl', 'not installed')}"
    print(" ".join([*(facts[name] for name in ("cpu", "torch", "commit")), versions]))
    coefficients(options)
    if "not installed" in versions:
        return 0
    with warnings.catch_warnings():  # verl's and Ray's deprecations
        warnings.simplefilter("ignore")
        if not verl_functions(options):
            print("wrong: verl's functions and ours do not agree")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
