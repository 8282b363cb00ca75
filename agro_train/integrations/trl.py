"""TRL 1.16: `AGROTrainer`, and `agro_logprobs` for its stock GRPO, RLOO, SFT, DPO and KTO trainers.

TRL's RLOO already has everything AGRO needs but the coefficients: it samples whole groups, scores
them under policy and reference, and multiplies the sum of a completion's log-probabilities with one
number. `AGROTrainer` puts `agro_coefficients` in that number's place, before TRL shuffles the rows
and cuts them into micro-batches, so that neither changes the gradient.

How it differs from the RLOOTrainer it is made of:

* the loss is linear in the log-probabilities: no ratio, nothing to clip;
* the advantage is AGRO's, from whole groups, in float64; a completion without a reward, or one that
  `mask_truncated_completions` masks, is left out of its group;
* log-probabilities come from `linear_logprobs`;
* with `taper`, vLLM's own log-probabilities, which RLOO throws away, say how far a completion may
  be pushed down.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from agro_kernels import AgroStats, agro_coefficients, linear_logprobs, linear_logprobs_with_entropy

for _name in ("_ChunkedLogProbFunction", "_use_triton"):
    if not hasattr(utils, _name):
        raise ImportError(
            f"trl: expected 1.16, whose fused head goes by {_name}, got {trl.__version__}; "
            "pip install 'trl>=1.16,<1.17'"
        )


@contextmanager
def agro_logprobs(*, keep_logits_bytes: int | str = 0) -> Iterator[None]:
    """Inside, every TRL trainer takes its log-probabilities from `linear_logprobs`.

        with agro_logprobs():
            trainer.train()

    keep_logits_bytes: as `linear_logprobs`, for each micro-batch; "auto" or a number of bytes makes
    the backward pass faster.

    Serves the trainers that call TRL's fused head: GRPO, RLOO, SFT, DPO and KTO. Same values and
    gradients, the logits kept in fp32. Token accuracy and mean logits, which SFT, DPO and KTO log,
    are still computed by TRL, at one product with the head a pass. Not with DeepSpeed ZeRO-3.
    """
    replaced = utils._ChunkedLogProbFunction, utils._use_triton
    # On a CPU TRL would score prompts and padding too; the name decides nothing else in `utils`.
    utils._ChunkedLogProbFunction, utils._use_triton = _Head(keep_logits_bytes), _only_what_counts
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = replaced


def _only_what_counts(device: torch.device) -> bool:
    return True


@dataclass(frozen=True)
class _Head:
    """Stands where TRL's fused head computes, with its arguments and results."""

    keep_logits_bytes: int | str = 0

    def __post_init__(self) -> None:
        nothing = torch.zeros(0, 1)  # the op checks its own option
        options: dict[str, Any] = {"keep_logits_bytes": self.keep_logits_bytes}
        linear_logprobs(nothing, torch.zeros(1, 1), nothing[:, 0].long(), **options)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """hidden (N, D), weight (V, D), targets (N,) -> logprobs, entropy, log_sum_sq_probs,
        mean_logits, is_top1, each (N,) or None where `outputs` does not name it.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "weight: expected a whole tensor, got one that DeepSpeed ZeRO-3 takes back before "
                "the backward pass; use stage 2 or FSDP2"
            )
        # TRL multiplies the logits with a scale before it caps them.
        options: dict[str, Any] = {
            "bias": None if bias is None else bias.to(hidden.dtype),
            "temperature": temperature / logit_scale,
            "softcap": None if softcap is None else softcap / logit_scale,
            "keep_logits_bytes": self.keep_logits_bytes,
        }
        arguments = hidden, weight.to(hidden.dtype), targets
        logprobs, entropy = (
            linear_logprobs_with_entropy(*arguments, **options)
            if "entropy" in outputs
            else (linear_logprobs(*arguments, **options), None)
        )
        rest = tuple(name for name in outputs if name not in ("log_probs", "entropy"))
        if not rest:
            return logprobs, entropy, None, None, None
        with torch.no_grad():
            metrics = ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, rest
            )
        return logprobs, entropy, *metrics[2:]


@dataclass
class AGROConfig(RLOOConfig):  # type: ignore[misc]
    """RLOOConfig with AGRO's options. `beta` is AGRO's, in units of reward.

    `epsilon` and `epsilon_high` have no meaning. The gradient is divided by beta, so that learning
    rates are those of a policy gradient.
    """

    lr_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the likelihood-ratio term; 1.0 is the exact on-policy gradient. "
            "Read the warning of agro_kernels.agro_coefficients before using it."
        },
    )
    lr_cap: bool = field(
        default=False,
        metadata={"help": "Lower lr_weight, group by group, to where it makes no wrong turns."},
    )
    lr_baseline: float | None = field(
        default=None,
        metadata={"help": "Baseline of the likelihood-ratio term, in [0, 1]. None: by group size."},
    )
    taper: float = field(
        default=0.0,
        metadata={
            "help": "With use_vllm: a completion whose probability is to fall is pushed down by "
            "min(1, policy / vLLM) to this power of what AGRO says. 0: AGRO as it stands."
        },
    )
    # None is there for transformers' HfArgumentParser: of `int | str` it takes numbers alone, of
    # this any string.
    keep_logits_bytes: int | str | None = field(
        default=0,
        metadata={
            "help": "Memory in bytes for logits that the forward pass keeps for the backward pass, "
            "a micro-batch, see agro_kernels.linear_logprobs: a number or auto. 0: none are kept."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_advantages:
            raise ValueError(
                "normalize_advantages: expected False, got True; AGRO does not divide by the "
                "standard deviation"
            )
        accumulation, generation = self.gradient_accumulation_steps, self.steps_per_generation
        if self.num_iterations != 1 or accumulation % generation:
            raise ValueError(
                f"num_iterations, steps_per_generation: expected one optimiser step on each batch "
                f"of generations, got num_iterations={self.num_iterations} and "
                f"steps_per_generation={generation} with gradient_accumulation_steps="
                f"{accumulation}; AGRO's coefficients are those of the policy as it was scored, so "
                "set num_iterations=1 and leave steps_per_generation out"
            )
        nothing = torch.zeros(2)  # the op checks its own options
        agro_coefficients(nothing, nothing, nothing, nothing.long(), **self.agro_options())
        keep = self.keep_logits_bytes
        if isinstance(keep, str) and keep.isdecimal():  # of a command line
            keep = int(keep)
        self.keep_logits_bytes = 0 if keep is None else keep
        _Head(self.keep_logits_bytes)
        if self.taper > 0 and not self.use_vllm:
            raise ValueError(
                f"taper: expected 0 without use_vllm, got {self.taper}; transformers' generate "
                "samples from the policy itself and does not say with what probability, so set "
                "taper=0"
            )

    def agro_options(self) -> dict[str, Any]:
        """The options of `agro_coefficients`."""
        return {
            "beta": self.beta,
            "lr_weight": self.lr_weight,
            "lr_cap": self.lr_cap,
            "lr_baseline": "auto" if self.lr_baseline is None else self.lr_baseline,
            "taper": self.taper,
            "scale": 1.0 / self.beta if self.beta > 0 else 1.0,
        }


class AGROTrainer(RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer with AGRO's gradient. Arguments as RLOOTrainer, `args` an AGROConfig."""

    _tag_names = ["trl", "agro"]  # noqa: RUF012  (as TRL's trainers have it)
    _name = "AGRO"
    _paper = {"title": "RL-finetuning LLMs from on- and off-policy data", "id": "2503.19612"}  # noqa: RUF012

    def __init__(
        self, model: Any, reward_funcs: Any, args: AGROConfig | None = None, **others: Any
    ) -> None:
        args = AGROConfig("agro-trl") if args is None else args
        if not isinstance(args, AGROConfig):
            raise TypeError(f"args: expected an AGROConfig, got {type(args).__name__}; it has beta")
        self._passes: list[Tensor] = []  # (B, C) log-probs of the scoring passes, in TRL's order
        self._rewards_per_func = torch.empty(0)
        self._sampled: list[list[float | None]] = []  # vLLM's log-probs of this rank's completions
        super().__init__(model, reward_funcs, args, **others)
        if self.aux_loss_enabled:
            raise ValueError(
                "router_aux_loss_coef: expected 0 for a mixture of experts, got "
                f"{self.router_aux_loss_coef}; AGROTrainer has no auxiliary loss"
            )
        if args.taper > 0:
            self._keep_sampling_logprobs()

    def _keep_sampling_logprobs(self) -> None:
        """Has vLLM return the log-probability of each token it samples: RLOOTrainer asks for none,
        and drops what `generate` returns beside the tokens.
        """
        engine = self.vllm_generation
        if self.vllm_mode == "server" and self.accelerator.is_main_process:
            got = engine.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if got != "processed_logprobs":
                raise ValueError(
                    "taper: expected a vLLM server with --logprobs-mode processed_logprobs, got "
                    f"{got}, which leaves the temperature out; restart the server or set taper=0"
                )
        generate = engine.generate

        def keeping(*args: Any, **kwargs: Any) -> Any:
            results = generate(*args, **kwargs)
            # By rank of probability; with 0 asked for, the sampled token alone.
            self._sampled = [[token[0] for token in tokens] for tokens in results[2]]
            return results

        engine.logprobs, engine.generate = 0, keeping

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with agro_logprobs(keep_logits_bytes=self.args.keep_logits_bytes):
            results = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not torch.is_grad_enabled():
            self._passes.append(results[0])
        return results

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of this rank, the advantages replaced.

        TRL averages advantage * logprob over all rows of all ranks that the batch holds.
        """
        self._passes.clear()
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        policy, reference = self._passes
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        per_token = [policy, reference]
        if self.args.taper > 0:
            per_token.append(padded_rows(self._sampled, like=policy))
        sums = completion_sums(torch.stack(per_token), output["completion_mask"])
        logprobs, ref_logprobs, *sampling = self.accelerator.gather(sums.T.contiguous()).T
        rows = len(logprobs)
        coefficients, stats = agro_coefficients(
            self._rewards(),
            logprobs,
            ref_logprobs,
            torch.arange(rows, device=logprobs.device) // group_size,
            sampling_logprobs=sampling[0] if sampling else None,
            **self.args.agro_options(),
        )
        first = self.accelerator.process_index * len(inputs)
        advantages = -rows * coefficients[first : first + len(inputs)]
        output["advantages"] = advantages.to(output["advantages"].dtype)
        self._log_stats(stats, mode)
        return output

    def _rewards(self) -> Tensor:
        """(world * B,) float64 weighted sums, as TRL forms them; NaN where no function gave one."""
        per_func = self._rewards_per_func.double()
        rewards: Tensor = (per_func * self.reward_weights.to(per_func)).nansum(1)
        if self.reward_clip_range:
            rewards = rewards.clamp(*self.reward_clip_range)
        return rewards.masked_fill(per_func.isnan().all(1), float("nan"))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The mean over rows of -advantage * logprob of the completion."""
        mask = inputs["completion_mask"]
        text = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        others = {
            name: value
            for name, value in inputs.items()
            if name not in (*text, "advantages", "old_logps")
        }
        logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], mask], 1),
            mask.size(1),
            compute_entropy=True,
            **others,
        )
        entropy = torch.stack([(entropies * mask).sum().detach(), mask.sum().float()])
        total, count = self.accelerator.reduce(entropy, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"].append(total / max(count, 1.0))
        per_sequence = logprobs.where(mask.bool(), 0.0).sum(1)
        loss: Tensor = -(inputs["advantages"] * per_sequence).mean()
        return loss

    def _log_stats(self, stats: AgroStats, mode: str) -> None:
        metrics = self._metrics[mode]
        metrics["agro/loss"].append(float(stats.variance) / (2 * self.beta))
        metrics["agro/variance"].append(float(stats.variance))
        metrics["agro/kl_to_optimum"].append(float(stats.kl_to_optimum))
        metrics["agro/lr_dominance"].append(float(stats.lr_dominance))
        metrics["agro/kl_seq"].append(float(stats.log_ratio))
        metrics["agro/dropped"].append(float(stats.num_dropped))
        if self.args.taper > 0:
            metrics["agro/taper_weight"].append(float(stats.taper_weight))
            metrics["agro/sampler_log_ratio"].append(float(stats.sampler_log_ratio))


def completion_sums(per_token: Tensor, mask: Tensor) -> Tensor:
    """(..., B, C), (B, C) -> (..., B) float64 sums over the counted tokens; NaN where none is."""
    counted = mask.bool()
    sums = per_token.double().where(counted, 0.0).sum(-1)
    return sums.masked_fill(~counted.any(-1), float("nan"))


def padded_rows(rows: list[list[float | None]], like: Tensor) -> Tensor:
    """Rows of any lengths as one (B, C) tensor like `like`; NaN for None and where a row ends."""
    padded = torch.full(like.shape, float("nan"))
    for row, values in zip(padded, rows, strict=True):
        known = [float("nan") if value is None else value for value in values]
        row[: len(values)] = torch.tensor(known)
    return padded.to(like)
