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
from agro_kernels.arguments import check_tensor
from agro_kernels.head import IGNORE_INDEX, HeadOptions, check_names
from agro_kernels.head_modules import (
    checked_head_dtype,
    head_linears,
    head_precision,
    head_terms,
    is_lora,
    is_saved_copy,
    qualified,
)
from agro_kernels.linear_logprobs import LogprobStats, linear_logprobs_with_stats
from agro_kernels.model_head import ModelHead, backbone

M = TypeVar("M", bound=nn.Module)

# The options of the head ops that are not a caller's to give, because the model has its own.
OF_THE_HEAD = {"bias": "the lm_head's own bias is added"}
WHOLE_HEAD = {
    "shards": "a LogprobHead is whole; call linear_logprobs with shards= for one that is spread"
}
OF_THE_MODEL = {
    **OF_THE_HEAD,
    **WHOLE_HEAD,
    "softcap": "the configuration's own is used",
}
_TAKEN = tuple(name for name in HeadOptions.__annotations__ if name not in OF_THE_MODEL)


class LogprobHead(nn.Linear):
    """An lm_head that gives logits, or, told the targets, log-probabilities without any logits.

    A plain nn.Linear to everything that looks at one: the same parameters by the same names, tied
    to the embeddings or not.

    Args: those of nn.Linear, and
        head_dtype: "float32", say, computes in it whatever the hidden states and the weight are in,
            under autocast, too, and gives logits in it; gradients come back in the dtypes of the
            two. None: in the weight's own.
    """

    head_dtype: torch.dtype | None = None

    def __init__(
        self, *args: Any, head_dtype: str | torch.dtype | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_dtype = checked_head_dtype(head_dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, head_dtype: str | torch.dtype | None = None
    ) -> "LogprobHead":
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
        head.head_dtype = checked_head_dtype(head_dtype)
        return head

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, **options: Unpack[HeadOptions]
    ) -> Tensor | LogprobStats:
        """Logits (..., V) of hidden (..., D), as nn.Linear; with targets (...), their logprobs,
        and the entropy and lse, as `linear_logprobs_with_stats`, which says what the options mean.

        Bias and shards are not among the options: the head has its own bias, and is whole. Forward
        pre-hooks act on `hidden` either way; forward hooks get what is returned.
        """
        if targets is not None:
            return _logprobs(self, hidden, targets, **options)
        check_names("LogprobHead.forward", options)
        _refuse(options, {**OF_THE_HEAD, **WHOLE_HEAD})
        _refuse_without_targets(options)
        if self.head_dtype is None:
            return super().forward(hidden)
        with head_precision(self, hidden):
            return nn.functional.linear(*head_terms(self, hidden))

    def extra_repr(self) -> str:
        more = "" if self.head_dtype is None else f", head_dtype={self.head_dtype}"
        return super().extra_repr() + more


def _logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, **options: Unpack[HeadOptions]
) -> LogprobStats:
    """What a head's module gives with targets: a LogprobHead, or LoRA around one."""
    check_names("LogprobHead.forward", options)
    _refuse(options, {**OF_THE_HEAD, **WHOLE_HEAD})
    if is_lora(head) and options.get("weight_grad") is not None:
        raise ValueError(
            "weight_grad: expected None for a head with an adapter, whose weight is frozen, got a "
            "buffer; leave it out"
        )
    linear: Any = head.base_layer if is_lora(head) else head
    if hasattr(linear.weight, "full_tensor"):
        raise ValueError(
            f"weight: expected a whole tensor, got a {type(linear.weight).__name__} spread over "
            "ranks; call the model that FSDP wraps, or linear_logprobs with shards= for a head "
            "under tensor parallelism"
        )
    with head_precision(head, hidden):
        terms = head_terms(head, hidden)
        options["bias"] = terms.bias
        return linear_logprobs_with_stats(terms.hidden, terms.weight, targets, **options)


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


def patch_model(model: M, head_dtype: str | torch.dtype | None = None) -> M:
    """Teach a Hugging Face causal LM to give log-probabilities; in place, and returned.

    Afterwards

        logprobs, entropy, lse = model(input_ids=..., targets=targets, temperature=1.0, ...)

    is, all (B, T) fp32 and differentiable, what the unpatched model's logits (B, T, V) give as

        logprobs_all = (logits.float() / temperature).log_softmax(-1)
        logprobs_all.gather(-1, targets[..., None]).squeeze(-1)

    without storing them. targets[b, t] is the token that position t predicts (`next_tokens` makes
    them of input_ids); positions with -100 cost nothing and give exact zeros, so ask for the
    completions only. Of targets (B, T, K), K ids a position, the logprobs are (B, T, K).
    ignore_index, round_logits, kept_ids, weight_grad, keep_logits_bytes and compact are taken too,
    and mean what they mean to `linear_logprobs`; the scale and the cap of the logits are the
    configuration's (scale, then cap, then temperature; round_logits before all three), a bias the
    head's. (Where the head is tied to the embeddings, weight_grad gets the head's share of the
    gradient and weight.grad that of the embeddings.) Other arguments go to the backbone as ever,
    and one that it does not know is a TypeError; the cache is off. Without `targets` the model's
    own forward runs: generation and evaluation do not change by a bit.

    head_dtype="float32" computes the head in fp32, tied or not, with and without targets, as
    LogprobHead says.

    Any model is served whose logits are its lm_head's of the last hidden state, scaled and capped
    as its configuration says: each is run on eight tokens here, without a gradient, and asked
    (`ModelHead.of`). LoRA and modules_to_save of peft may be on the lm_head, too.

    Patch before DDP, FSDP, accelerate and torch.compile; before or after peft. A copy of a patched
    model, by deepcopy, pickle or torch.save, is patched.

    Raises ValueError for logits that are something else, for heads that are not nn.Linear or have
    forward hooks already, for sharded weights, and for weights that are not there (the meta device,
    ZeRO-3) except in a few architectures that are known without them.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # a peft model
        inner = inner.get_base_model()
    dtype = checked_head_dtype(head_dtype)
    replaced = vars(inner).get("forward")
    if replaced is not None and not _is_ours(replaced, _forward):
        raise ValueError(
            f"model: expected {type(inner).__name__}'s own forward, got one that something else "
            "has replaced; call patch_model first, before accelerate or TRL"
        )
    form = ModelHead.of(inner)
    _take_targets(inner, dtype)
    # A partial of a function of this module, because a bound method is pickled by its name alone,
    # which is the unpatched forward's. For signatures' sake it looks like the original.
    forward = functools.partial(_forward, inner, _keywords(inner), _form=form)
    inner.forward = functools.update_wrapper(forward, types.MethodType(type(inner).forward, inner))
    return model


def _take_targets(inner: Any, head_dtype: torch.dtype | None = None) -> None:
    """Make a model's head one that takes targets, wherever peft has put it."""
    head = inner.get_output_embeddings()
    for holder, name, linear in list(head_linears(head)):
        if isinstance(linear, LogprobHead):
            linear.head_dtype = head_dtype or linear.head_dtype
            continue
        made = LogprobHead.from_linear(linear, head_dtype)
        if holder is None:
            inner.set_output_embeddings(made)
        elif isinstance(holder, nn.ModuleDict):
            holder[name] = made
        else:
            setattr(holder, name, made)
    if is_lora(head) and not _is_ours(vars(head).get("forward"), _adapted):
        if head._forward_hooks or "forward" in vars(head):
            raise ValueError(
                "lm_head: expected an adapter's own forward without hooks, got another; call "
                "patch_model before what replaces it"
            )
        head.forward = functools.partial(_adapted, head)


def _is_ours(forward: object, function: object) -> bool:
    return getattr(forward, "func", None) is function


def _takes_targets(head: nn.Module) -> bool:
    if is_lora(head):
        return _is_ours(vars(head).get("forward"), _adapted)
    linears = [linear for _, _, linear in head_linears(head)]
    return all(isinstance(linear, LogprobHead) for linear in linears)


def _adapted(
    layer: Any, hidden: Tensor, *args: Any, targets: Tensor | None = None, **options: Any
) -> Any:
    """The forward of LoRA around a LogprobHead."""
    if targets is None:
        return type(layer).forward(layer, hidden, *args, **options)
    return _logprobs(layer, hidden, targets, **options)


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
    parameters = inspect.signature(type(backbone(inner)).forward).parameters
    if {p.kind for p in list(parameters.values())[1:]} == {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }:  # Bart's wrapper of its decoder
        return positional[1:], frozenset(known.union(positional))
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for unpacked in typing.get_args(parameter.annotation):
                known |= unpacked.__annotations__.keys()
        else:
            known.add(name)
    return positional[1:], frozenset(known)


# The class is asked again on each call for its forward, and a copy of a patched model for its own:
# FSDP2 changes the class of a module.
def _forward(
    model: Any,
    names: tuple[tuple[str, ...], frozenset[str]],
    /,
    *args: Any,
    targets: Tensor | None = None,
    _form: ModelHead | None = None,
    **kwargs: Any,
) -> Any:
    """The forward of a patched model; `names` are `_keywords` of it, `_form` its `ModelHead`.

    Models that were pickled before there was a `ModelHead` have none: they are asked now.
    """
    if targets is None:
        _refuse_without_targets(kwargs)
        return type(model).forward(model, *args, **kwargs)
    if _form is None:
        return patch_model(model).forward(*args, targets=targets, **kwargs)
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
                f"{name}: expected an argument of {type(backbone(model)).__name__} or one of "
                f"{', '.join(_TAKEN)} together with targets, got an unknown one; check its spelling"
            )
    _form.check_unchanged(model)
    head = model.get_output_embeddings()
    if not _takes_targets(head):
        if not is_lora(head) and not is_saved_copy(head):
            raise ValueError(
                f"model: expected the LogprobHead that patch_model put in, got "
                f"{qualified(type(head))}; call patch_model after what replaces the lm_head"
            )
        _take_targets(model)  # an adapter that has come since
    # A cache is of no use here, and with one transformers lets packed sequences see each other.
    kwargs |= {"use_cache": False, "return_dict": True}
    hidden = backbone(model)(**kwargs).last_hidden_state
    temperature = options.get("temperature")
    options |= _form.options(1.0 if temperature is None else temperature, targets)
    # By keyword: a pre-hook that puts another `hidden` in the arguments' place keeps the rest.
    results = head(_form.scaled(hidden), targets=targets, **options)
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

    def forward(self, *tensors: Tensor, **per_batch: Any) -> Tensor:
        """0-d loss of the tensors of `linear_agro_loss`, by position or by name.

        per_batch also: bias, on_policy, importance_weights, sampling_logprobs, num_groups, or an
        option that this batch has its own value of.
        """
        return linear_agro_loss(*tensors, **{**self.options, **per_batch})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())
