"""The ops as modules, and inside a Hugging Face model: LogprobHead, patch_model, LinearAgroLoss.

The head has to run inside the model's own forward pass: DDP, FSDP and gradient checkpointing hang
on calls of modules, and a weight read from outside is sharded, stale or without its hooks. So

    patch_model(model)
    logprobs, entropy, lse = model(input_ids=input_ids, targets=next_tokens(input_ids))

gives log-probabilities wherever `model` is called, wrapped or not, and `model(input_ids=...)` is
what it was. Nothing here imports transformers.
"""

import functools
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from agro_kernels.agro_loss import linear_agro_loss
from agro_kernels.agro_options import LinearAgroKeywords
from agro_kernels.head import IGNORE_INDEX, HeadOptions, check_names, check_tensor
from agro_kernels.linear_logprobs import LogprobStats, linear_logprobs_with_stats

M = TypeVar("M", bound=nn.Module)

# model_type of the transformers architectures whose logits are lm_head(last_hidden_state); in the
# second group they are capped by final_logit_softcapping, if the configuration has it. Each is
# compared with the unpatched model in tests/kernels/test_modules.py.
PLAIN = ("gemma3", "llama", "mistral", "qwen2", "qwen3", "smollm3")
CAPPED = ("gemma2", "gemma3_text")
FAMILIES = (*PLAIN, *CAPPED)

# The options of the head ops that are not a caller's to give, because the model has its own.
OF_THE_HEAD = {"bias": "the lm_head's own bias is added"}
WHOLE_HEAD = {
    "shards": "a LogprobHead is whole; call linear_logprobs with shards= for one that is spread"
}
OF_THE_MODEL = {
    **OF_THE_HEAD,
    **WHOLE_HEAD,
    "softcap": "the configuration's final_logit_softcapping is used",
}
_TAKEN = tuple(name for name in HeadOptions.__annotations__ if name not in OF_THE_MODEL)


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
        self, hidden: Tensor, targets: Tensor | None = None, **options: Unpack[HeadOptions]
    ) -> Tensor | LogprobStats:
        """Logits (..., V) of hidden (..., D), as nn.Linear; with targets (...), their logprobs,
        and the entropy and lse, as `linear_logprobs_with_stats`, which says what the options mean.

        Bias and shards are not among the options: the head has its own bias, and is whole. Forward
        pre-hooks act on `hidden` either way; forward hooks get what is returned.
        """
        check_names("LogprobHead.forward", options)
        _refuse(options, {**OF_THE_HEAD, **WHOLE_HEAD})
        if targets is None:
            _refuse_without_targets(options)
            return super().forward(hidden)
        if hasattr(self.weight, "full_tensor"):
            raise ValueError(
                f"weight: expected a whole tensor, got a {type(self.weight).__name__} spread over "
                "ranks; call the model that FSDP wraps, or linear_logprobs with shards= for a head "
                "under tensor parallelism"
            )
        options["bias"] = self.bias
        return linear_logprobs_with_stats(hidden, self.weight, targets, **options)


def _refuse(given: Mapping[str, object], refused: Mapping[str, str]) -> None:
    """Raise where one of `refused` (option: why) has a value."""
    for name, why in refused.items():
        if given.get(name) is not None:
            raise ValueError(f"{name}: expected none, got a value; {why}")


def _refuse_without_targets(given: Mapping[str, object]) -> None:
    for name in HeadOptions.__annotations__:
        if given.get(name) is not None:
            raise ValueError(
                f"{name}: expected together with targets, got it alone; logits do not depend on it"
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
    completions only. Of targets (B, T, K), K ids a position, the logprobs are (B, T, K).
    ignore_index, round_logits, kept_ids, weight_grad and keep_logits_bytes are taken too, and mean
    what they mean to `linear_logprobs`; a softcap is the configuration's, a bias the head's. (Where
    the head is tied to the embeddings, weight_grad gets the head's share of the gradient and
    weight.grad that of the embeddings.) Other arguments go to the backbone as ever, and one that it
    does not know is a TypeError; the cache is off. Without `targets` the model's own forward runs:
    generation and evaluation do not change by a bit.

    Patch before DDP, FSDP, accelerate and torch.compile; before or after peft, whose adapters must
    leave the lm_head alone. A copy of a patched model, by deepcopy, pickle or torch.save, is
    patched.

    A forward that is not transformers' own is run once on eight tokens here, without a gradient.

    Raises ValueError for architectures other than FAMILIES, for heads that are not nn.Linear or
    have forward hooks already, and for a forward that gives other log-probabilities than the head
    makes of the last hidden state.
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
            f"model: expected an lm_head that is a torch.nn.Linear, got {_qualified(head)}; "
            "leave the head out of quantisation and of the adapter's target modules"
        )
    replaced = vars(inner).get("forward")
    if replaced is not None and getattr(replaced, "func", None) is not _forward:
        raise ValueError(
            f"model: expected {type(inner).__name__}'s own forward, got one that something else "
            "has replaced; call patch_model first, before accelerate or TRL"
        )
    if replaced is None and not type(inner).forward.__module__.startswith("transformers.models."):
        _check_logits(inner, head)
    if type(head) is nn.Linear:
        inner.set_output_embeddings(LogprobHead.from_linear(head))
    # A partial of a function of this module, because a bound method is pickled by its name alone,
    # which is the unpatched forward's. For signatures' sake it looks like the original.
    forward = functools.partial(_forward, inner, _keywords(inner))
    inner.forward = functools.update_wrapper(forward, types.MethodType(type(inner).forward, inner))
    return model


def _qualified(value: object) -> str:
    """The full name of a value's type: an adapter's Linear is called Linear, too."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _keywords(inner: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """What a causal LM takes by position, in order, and what its backbone takes by keyword.

    A backbone's **kwargs go down to the attention, and what nothing there knows is dropped without
    a word. transformers names those that are known in a TypedDict.
    """
    positional = tuple(
        name
        for name, parameter in inspect.signature(type(inner).forward).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )
    known = {"return_dict"}  # taken by a decorator
    for name, parameter in inspect.signature(type(inner.base_model).forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for unpacked in typing.get_args(parameter.annotation):
                known |= unpacked.__annotations__.keys()
        else:
            known.add(name)
    return positional[1:], frozenset(known)


def _softcap(inner: Any) -> float | None:
    """The cap of a model's logits."""
    capped = inner.config.model_type in CAPPED
    return inner.config.final_logit_softcapping if capped else None


@torch.no_grad()
def _check_logits(inner: Any, head: nn.Module) -> None:
    """Raise where a forward gives other log-probs than head(last hidden state), as ours will be."""
    name = f"{type(inner).__name__}.forward"
    embeddings = inner.get_input_embeddings().weight
    if embeddings.is_meta:
        raise ValueError(
            f"model: expected weights that {name}, which is not transformers' own, can be checked "
            "with, got the meta device; load the weights before patch_model"
        )
    ids = torch.arange(8, device=embeddings.device)[None] % embeddings.shape[0]
    training = [module for module in inner.modules() if module.training]
    inner.eval()  # dropout would differ between the two passes
    try:
        own = inner(input_ids=ids)[0]
        hidden = inner.base_model(input_ids=ids, return_dict=True).last_hidden_state
        logits = head(hidden)
    finally:
        for module in training:
            module.training = True
    softcap = _softcap(inner)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    rounding = 2 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    ours, theirs = (values.float().log_softmax(-1).flatten() for values in (logits, own))
    worst = int((ours - theirs).abs().nan_to_num(torch.inf).argmax())
    a, b = float(ours[worst]), float(theirs[worst])
    if not abs(a - b) <= rounding:
        raise ValueError(
            f"model: expected logits that are lm_head(last hidden state), got {name}, which is not "
            f"transformers' own and gives a token the log-probability {b:.6g} where the head gives "
            f"{a:.6g}; patch the model without that forward, or compute its hidden states yourself "
            "and call linear_logprobs"
        )


# The class is asked again on each call for its forward, and a copy of a patched model for its own:
# FSDP2 changes the class of a module.
def _forward(
    model: Any,
    names: tuple[tuple[str, ...], frozenset[str]],
    /,
    *args: Any,
    targets: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The forward of a patched model; `names` are `_keywords` of it."""
    if targets is None:
        _refuse_without_targets(kwargs)
        return type(model).forward(model, *args, **kwargs)
    positional, known = names
    for name, value in zip(positional, args, strict=False):
        if name in kwargs:
            raise TypeError(f"forward() got multiple values for argument {name!r}")
        kwargs[name] = value
    for name in ("labels", "logits_to_keep"):
        if kwargs.pop(name, None) is not None:
            raise ValueError(
                f"{name}: expected None together with targets, got a value; say with targets "
                "which positions count, -100 elsewhere"
            )
    _refuse(kwargs, OF_THE_MODEL)
    options = {name: kwargs.pop(name) for name in HeadOptions.__annotations__ if name in kwargs}
    for name in kwargs:
        if name not in known:
            raise TypeError(
                f"{name}: expected an argument of {type(model.base_model).__name__} or one of "
                f"{', '.join(_TAKEN)} together with targets, got an unknown one; check its spelling"
            )
    head = model.get_output_embeddings()
    if not isinstance(head, LogprobHead):
        raise ValueError(
            f"model: expected the LogprobHead that patch_model put in, got {_qualified(head)}; "
            "call patch_model after what replaces the lm_head, and keep adapters off it"
        )
    # A cache is of no use here, and with one transformers lets packed sequences see each other.
    kwargs |= {"use_cache": False, "return_dict": True}
    hidden = model.base_model(**kwargs).last_hidden_state
    if options.get("temperature") is None:
        options["temperature"] = 1.0
    # By keyword: a pre-hook that puts another `hidden` in the arguments' place keeps the rest.
    results = head(hidden, targets=targets, **{**options, "softcap": _softcap(model)})
    if not isinstance(results, LogprobStats):
        raise ValueError(
            f"lm_head: expected LogprobStats, got {type(results).__name__} from one of its "
            "hooks; with targets there are no logits, so let the hook pass LogprobStats through"
        )
    return results


def next_tokens(input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Targets of a causal LM: the shift by one position, in one place.

    Args:
        input_ids: (..., T) int64. Hugging Face's `labels` serve as well.
        mask: (..., T) bool or 0/1, which tokens count as targets: the completions. None: all. In a
            packed row the first token of each sequence must not count: nothing predicts it.

    Returns:
        (..., T): at t the token at t + 1, or -100 where that is not counted and at the end.
    """
    check_tensor("input_ids", input_ids)
    if mask is not None:
        check_tensor("mask", mask)
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
