"""The ops as modules, and inside a Hugging Face model: LogprobHead, patch_model, LinearAgroLoss.

The head has to run inside the model's own forward pass: DDP, FSDP and gradient checkpointing hang
on calls of modules, and a weight read from outside is sharded, stale or without its hooks. So

    patch_model(model)
    logprobs, entropy, lse = model(input_ids=input_ids, targets=next_tokens(input_ids))

gives log-probabilities wherever `model` is called, wrapped or not, and `model(input_ids=...)` is
what it was. Nothing here imports transformers.
"""

import functools
import types
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from agro_kernels.agro_loss import linear_agro_loss
from agro_kernels.agro_options import LinearAgroKeywords
from agro_kernels.head import IGNORE_INDEX, check_names
from agro_kernels.linear_logprobs import LogprobStats, linear_logprobs_with_stats

M = TypeVar("M", bound=nn.Module)

# model_type of the transformers architectures whose logits are lm_head(last_hidden_state); in the
# second group they are capped by final_logit_softcapping, if the configuration has it. Each is
# compared with the unpatched model in tests/kernels/test_modules.py.
PLAIN = ("gemma3", "llama", "mistral", "qwen2", "qwen3", "smollm3")
CAPPED = ("gemma2", "gemma3_text")
FAMILIES = (*PLAIN, *CAPPED)


class LogprobHead(nn.Linear):
    """An lm_head that gives logits, or, told the targets, log-probabilities without any logits.

    A plain nn.Linear to everything that looks at one: the same parameters by the same names, tied
    to the embeddings or not.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "LogprobHead":
        """A head over the very parameters of `linear`: no copy, ties stay tied, hooks stay on.

        Raises ValueError where `linear` has forward hooks or a forward that something else has
        put there: with targets there are no logits for them to see.
        """
        if "forward" in vars(linear):
            raise ValueError(
                "lm_head: expected torch.nn.Linear's own forward, got one that something else has "
                "replaced; call patch_model first, before accelerate"
            )
        if linear._forward_hooks:
            raise ValueError(
                f"lm_head: expected no forward hooks, got {len(linear._forward_hooks)}; with "
                "targets there are no logits for them to see: remove them, or register them after "
                "patch_model, for what a LogprobHead returns"
            )
        head = cls.__new__(cls)  # __init__ would make parameters, and another set of hooks
        vars(head).update(vars(linear))
        return head

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> Tensor | LogprobStats:
        """Logits (..., V) of hidden (..., D), as nn.Linear; with targets (...), their logprobs,
        and the entropy and lse, as `linear_logprobs_with_stats`, which says what the options mean.

        Forward pre-hooks act on `hidden` either way; forward hooks get what is returned.
        """
        if targets is None:
            return super().forward(hidden)
        if hasattr(self.weight, "full_tensor"):
            raise ValueError(
                f"weight: expected a whole tensor, got a {type(self.weight).__name__} spread over "
                "ranks; call the model that FSDP wraps, or linear_logprobs with shards= for a head "
                "under tensor parallelism"
            )
        return linear_logprobs_with_stats(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature,
            softcap=softcap,
            ignore_index=ignore_index,
        )


def patch_model(model: M) -> M:
    """Teach a Hugging Face causal LM to give log-probabilities; in place, and returned.

    Afterwards

        logprobs, entropy, lse = model(input_ids=..., targets=targets, temperature=1.0, ...)

    is, all (B, T) fp32 and differentiable, what the unpatched model's logits (B, T, V) give as

        logprobs_all = (logits.float() / temperature).log_softmax(-1)
        logprobs_all.gather(-1, targets[..., None]).squeeze(-1)

    without storing them. targets[b, t] is the token that position t predicts (`next_tokens` makes
    them of input_ids); positions with -100 cost nothing and give exact zeros, so ask for the
    completions only. Other arguments go to the backbone as ever; the cache is off. Without
    `targets` the model's own forward runs: generation and evaluation do not change by a bit.

    Patch before DDP, FSDP, accelerate and torch.compile; before or after peft, whose adapters must
    leave the lm_head alone.

    Raises ValueError for architectures other than FAMILIES and for heads that are not nn.Linear or
    have forward hooks already.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # a peft model
        inner = inner.get_base_model()
    family = getattr(getattr(inner, "config", None), "model_type", None)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if family not in FAMILIES or head is None:
        raise ValueError(
            f"model: expected a transformers causal LM with model_type among "
            f"{', '.join(FAMILIES)}, got {type(inner).__name__} with {family}; compute its hidden "
            "states yourself and call linear_logprobs with the weight of its head"
        )
    if type(head) not in (nn.Linear, LogprobHead):
        raise ValueError(
            f"model: expected an lm_head that is a torch.nn.Linear, got {type(head).__name__}; "
            "leave the head out of quantisation and of the adapter's target modules"
        )
    replaced = vars(inner).get("forward")
    if replaced is not None and not hasattr(replaced, "gives_logprobs"):
        raise ValueError(
            f"model: expected {type(inner).__name__}'s own forward, got one that something else "
            "has replaced; call patch_model first, before accelerate or TRL"
        )
    if type(head) is nn.Linear:
        inner.set_output_embeddings(LogprobHead.from_linear(head))
    inner.forward = types.MethodType(_with_targets(type(inner).forward), inner)
    return model


def _with_targets(original: Any) -> Any:
    """The forward of a patched model; for signatures' sake it looks like the original."""

    # The class is asked again on each call, never `original`: FSDP2 changes the class of a module,
    # and a copy of a patched model must not run the forward of the one it was copied from.
    @functools.wraps(original)
    def forward(
        self: Any,
        *args: Any,
        targets: Tensor | None = None,
        temperature: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if targets is None:
            if temperature is not None:
                raise ValueError("temperature: expected together with targets, got it alone")
            return type(self).forward(self, *args, **kwargs)
        for name in ("labels", "logits_to_keep"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None together with targets, got a value; say with targets "
                    "which positions count, -100 elsewhere"
                )
        head = self.get_output_embeddings()
        if not isinstance(head, LogprobHead):
            raise ValueError(
                f"model: expected the LogprobHead that patch_model put in, got "
                f"{type(head).__name__}; call patch_model after what replaces the lm_head, and "
                "keep adapters off it"
            )
        # A cache is of no use here, and with one transformers lets packed sequences see each other.
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        capped = self.config.model_type in CAPPED
        softcap = self.config.final_logit_softcapping if capped else None
        temperature = 1.0 if temperature is None else temperature
        # By keyword: a pre-hook that puts another `hidden` in the arguments' place keeps the rest.
        results = head(hidden, targets=targets, temperature=temperature, softcap=softcap)
        if not isinstance(results, LogprobStats):
            raise ValueError(
                f"lm_head: expected LogprobStats, got {type(results).__name__} from one of its "
                "hooks; with targets there are no logits, so let the hook pass LogprobStats through"
            )
        return results

    forward.gives_logprobs = True  # type: ignore[attr-defined]
    return forward


def next_tokens(input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Targets of a causal LM: the shift by one position, in one place.

    Args:
        input_ids: (..., T) int64. Hugging Face's `labels` serve as well.
        mask: (..., T) bool or 0/1, which tokens count as targets: the completions. None: all. In a
            packed row the first token of each sequence must not count: nothing predicts it.

    Returns:
        (..., T): at t the token at t + 1, or -100 where that is not counted and at the end.
    """
    if mask is not None:
        input_ids = input_ids.where(mask.bool(), IGNORE_INDEX)
    return torch.cat([input_ids[..., 1:], torch.full_like(input_ids[..., :1], IGNORE_INDEX)], -1)


class LinearAgroLoss(nn.Module):
    """`linear_agro_loss` with its options held by a module; it has no parameters of its own.

    Args: those of `linear_agro_loss` that hold for every batch: beta, and any of lr_weight, lr_cap,
    lr_baseline, scale, taper, temperature, softcap, ignore_index.
    """

    def __init__(self, **options: Unpack[LinearAgroKeywords]) -> None:
        super().__init__()
        check_names("LinearAgroLoss", options, LinearAgroKeywords)
        self.options: dict[str, Any] = dict(options)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ref_logprobs: Tensor,
        rewards: Tensor,
        groups: Tensor,
        cu_seqlens: Tensor,
        **per_batch: Any,
    ) -> Tensor:
        """0-d loss. per_batch: bias, on_policy, importance_weights, sampling_logprobs, num_groups,
        or an option that this batch has its own value of."""
        return linear_agro_loss(
            hidden,
            weight,
            targets,
            ref_logprobs,
            rewards,
            groups,
            cu_seqlens,
            **{**self.options, **per_batch},
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
