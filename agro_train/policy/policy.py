"""The policy: a causal LM whose head gives log-probabilities; sharded (FSDP2) and gathered."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from agro_kernels import ModelHead, linear_logprobs_with_stats, weighted_logprob_sum
from agro_train.data.batch import pack
from agro_train.policy.attention import packed_inputs
from agro_train.refusal import Refusal
from agro_train.transfer import upload
from agro_train.types import MicroBatch, Rollout

T = TypeVar("T")


class Policy(nn.Module):
    """A Hugging Face causal LM read through the fused head; the (n, V) logits are never stored.

    The head runs inside `forward`, so wrappers that gather weights around it (DDP, FSDP2) see it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        barred: Collection[int] = (),
        form: ModelHead | None = None,
        share_prompts: bool = True,
    ) -> None:
        """Raises Refusal for a model whose logits are not its head's of the last hidden state,
        scaled or capped.

        Args:
            barred: ids that cannot be drawn where a micro-batch is `early`.
            form: what lies between the last hidden state and the logits, as another policy of the
                same class and configuration has it; None: the model is asked, in two passes or
                more, which weights without contents cannot be.
            share_prompts: whether completions are packed behind one copy of their prompt.
        """
        super().__init__()
        try:
            if form is not None and form.declared:  # else its configuration says nothing of it
                form.check_unchanged(model)
            self.form = ModelHead.of(model) if form is None else form
        except ValueError as error:
            raise Refusal(str(error)) from error
        if barred and self.form.softcap is not None:
            raise Refusal(
                f"min_new_tokens: expected 0 for a head with a softcap, as {type(model).__name__} "
                "has, got more; with top_k, top_p or min_p it works"
            )
        self.model, self.barred = model, sorted(barred)
        # Families that are known without asking go by position_ids; weights may be elsewhere.
        asked = form is None and not ModelHead.is_told_by(model.config)
        if asked and not any(p.is_meta for p in model.parameters()):
            _check_packing(self, share_prompts)

    def forward(
        self,
        micro: MicroBatch | Callable[[PreTrainedModel], Any],
        temperature: float = 1.0,
        coefficients: Tensor | None = None,
        lse: Tensor | None = None,
        weight_grad: Tensor | None = None,
    ) -> Any:
        """Without coefficients: log-probability, entropy and lse of each target, fp32 (n,).
        With coefficients (n,): the 0-d sum of coefficient * log-probability; `lse` from an earlier
        pass over the same weights saves one product with the head, and the head adds its weight's
        gradient to `weight_grad` itself, see `head_gradient`. A function in place of a micro-batch
        is called with the model, see `with_gathered_model`. A target whose coefficient is 0 costs
        as much as any other: see `MicroBatch.predicting`.
        """
        if not isinstance(micro, MicroBatch):
            return micro(self.model)
        hidden = self.hidden_states(micro)[micro.predictors]
        head = self.model.get_output_embeddings()
        with self.form.precision(head, hidden):
            terms = self.form.terms(head, hidden)
            more = (temperature, coefficients, lse, weight_grad)
            if micro.early is None or micro.later is None:
                return self._head(micro, terms, slice(None), *more)
            first = self._head(micro, terms, micro.early, *more, ban=True)
            rest = self._head(micro, terms, micro.later, *more)
        if coefficients is not None:
            return first + rest
        return _interleaved(micro.early, micro.later, first, rest)

    def _head(
        self,
        micro: MicroBatch,
        terms: tuple[Tensor, Tensor, Tensor | None],
        rows: Tensor | slice,
        temperature: float,
        coefficients: Tensor | None,
        lse: Tensor | None,
        weight_grad: Tensor | None,
        ban: bool = False,
    ) -> Any:
        """What `forward` returns, of some of the n rows; with `ban` the barred ids have probability
        0, which a bias of -inf is for."""
        hidden, weight, bias = terms
        hidden, targets = hidden[rows], micro.targets[rows]
        if ban:
            assert self.barred, "early tokens are scored by a policy that knows what is barred"
            banned = weight.new_zeros(len(weight))
            (barred,) = upload([torch.tensor(self.barred)], weight.device)
            banned.index_fill_(0, barred, -torch.inf)
            bias = banned if bias is None else bias + banned
        options: dict[str, Any] = {
            "bias": bias,
            "compact": False,  # all rows count: no pass waits for the device to say so
            **self.form.options(temperature, targets),
            "kept_ids": None if micro.kept_ids is None else micro.kept_ids[rows],
        }
        if coefficients is None:
            return linear_logprobs_with_stats(hidden, weight, targets, **options)
        options |= {"lse": None if lse is None else lse[rows], "weight_grad": weight_grad}
        return weighted_logprob_sum(hidden, weight, targets, coefficients[rows], **options)

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """(L, D) final hidden states of a packed micro-batch."""
        inputs = packed_inputs(micro, self.model)
        output = self.model.base_model(**inputs, use_cache=False)
        hidden: Tensor = output.last_hidden_state[0, : len(micro.input_ids)]
        return hidden


def _check_packing(policy: Policy, share_prompts: bool) -> None:
    """Raises Refusal for a model to which a sequence packed behind another is not what it is alone.

    The decoders of Bart number tokens by where they stand, whatever position_ids they are given; a
    recurrent model carries its state from one sequence into the next.
    """
    model = policy.model
    try:
        differ, allowed = _moved_by_packing(policy, share_prompts)
        unshared = differ > allowed and share_prompts and _is_unmoved(policy)
    except Exception as error:
        raise Refusal(
            "model: expected one that takes sequences packed end to end, with position_ids and a "
            f"mask, got {type(model).__name__}, which raises {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}; take a model of another family"
        ) from error
    if differ <= allowed:
        return
    if unshared:
        raise Refusal(
            "share_prompts: expected a model that goes by position_ids alone, got "
            f"{type(model).__name__}, to which a token's place counts as well; set "
            "share_prompts=false"
        )
    raise Refusal(
        "model: expected one that goes by position_ids and the mask, so that sequences can be "
        f"packed, got {type(model).__name__}, to which a sequence behind another is not what it is "
        f"alone (its hidden states differ by {100 * differ:.2g} %): it numbers tokens by where "
        "they stand, or carries a state from one to the next; take a model of another family"
    )


def _is_unmoved(policy: Policy) -> bool:
    differ, allowed = _moved_by_packing(policy, share_prompts=False)
    return differ <= allowed


@torch.no_grad()
def _moved_by_packing(policy: Policy, share_prompts: bool) -> tuple[float, float]:
    """How far a completion's hidden states behind another one are from those alone, over their
    size, and how far rounding may bring them."""
    model = policy.model
    embeddings = model.get_input_embeddings().weight
    # Far enough behind that neighbouring places, which a trained model hardly tells apart, are not
    # what is compared.
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 64
    ids = [(token + 10) % len(embeddings) for token in range(8 + min(32, room // 2))]
    prompt, second, first = tuple(ids[:4]), tuple(ids[4:8]), tuple(ids[8:])
    with ModelHead.asking(model):
        behind, alone = (
            _states(policy, prompt, completions, share_prompts, embeddings.device)
            for completions in ((first, second), (second,))
        )
    # The prompt comes first in both, so rounding alone moves it.
    noise = _apart(behind[: len(prompt)], alone[: len(prompt)])
    read = len(second) - 1
    differ = _apart(behind[-read:], alone[-read:])
    return differ, max(4 * noise, 8 * torch.finfo(model.dtype).eps, 1e-4)


def _states(
    policy: Policy,
    prompt: tuple[int, ...],
    completions: Sequence[tuple[int, ...]],
    share_prompts: bool,
    device: torch.device,
) -> Tensor:
    rollouts = [_unscored(prompt, each) for each in completions]
    (micro,) = pack(rollouts, token_budget=99, share_prompts=share_prompts)
    return policy.hidden_states(micro.to(device)).float()


def _apart(states: Tensor, others: Tensor) -> float:
    """How far (tokens, D) hidden states are from others, over their mean size. The median of the
    tokens, since rounding may send one of them to another expert."""
    return float((states - others).norm(dim=-1).median() / others.norm(dim=-1).mean())


def _unscored(prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> Rollout:
    return Rollout("", "", prompt_ids, "", completion_ids, "stop", None)


def _interleaved(first: Tensor, rest: Tensor, of_first: Any, of_rest: Any) -> Any:
    """One record of (n,) tensors from that of the rows `first`, int64, and that of the rest."""
    whole = []
    for a, b in zip(of_first, of_rest, strict=True):
        values = a.new_empty(len(first) + len(rest))
        values[first], values[rest] = a, b
        whole.append(values)
    return type(of_first)(*whole)


def head_gradient(policy: nn.Module) -> Tensor | None:
    """The gradient of the head's weight (V, D), zeros so far, which the head adds to by itself.

    So there is never a second (V, D) gradient in memory, waiting for autograd to add it; for a tied
    weight that wait lasts until the embedding's gradient comes, at the end of the backward pass.

    None where that cannot be: the weight is frozen; its gradient is not of the dtype that sums are
    kept in; or a wrapper (DDP, FSDP2, torch.compile) has to see the gradient come from autograd.
    """
    if type(policy) is not Policy:  # FSDP2 changes the class
        return None
    weight = policy.model.get_output_embeddings().weight
    if not weight.requires_grad or weight.dtype not in (torch.float32, torch.float64):
        return None
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    weight.grad = gradient
    return gradient


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """A model's layers, whatever its family calls them (`layers`, `h`, `decoder.layers`).

    Raises Refusal for a model that has no list of as many modules as its configuration has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    as_long = [each for each in lists if len(each) == count]
    if not as_long:
        raise Refusal(
            f"model: expected one with a list of its {count} layers, got {type(model).__name__}, "
            f"whose lists have {sorted({len(each) for each in lists})} modules; take a model of "
            "another family"
        )
    # A layer may have a list of as many experts; it is inside, so it is smaller.
    return max(as_long, key=lambda each: sum(p.numel() for p in each.parameters()))


def shard(policy: Policy, mixed_precision: str, mesh: DeviceMesh) -> None:
    """Shards weights, gradients and with them the optimiser over the ranks, layer by layer (FSDP2).

    Gradients are summed in float32 or better, and the root's inputs stay as they are: coefficients
    and lse must not become bfloat16.
    """
    param_dtype = torch.bfloat16 if mixed_precision == "bf16" else None
    reduce_dtype = torch.promote_types(policy.model.dtype, torch.float32)
    policy_of_layers = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for layer in layers_of(policy.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy_of_layers)
    root = replace(policy_of_layers, cast_forward_inputs=False)
    fully_shard(policy, mesh=mesh, mp_policy=root)


def settle_buckets(policy: nn.Module, gradient_checkpointing: bool) -> None:
    """A pass without effect, for a policy that DDP replicates on CPUs; every rank calls it.

    DDP packs gradients anew after its first backward pass, in the order in which they came. The sum
    over three ranks or more is rounded by a number's place in its pack. So without this pass the
    first step after a resumption would be another than that of the run left alone.
    """
    if not isinstance(policy, DistributedDataParallel) or policy.device_type != "cpu":
        return
    if dist.get_world_size() < 3:
        return
    # Sequences enough that a model with experts hardly leaves one without a token.
    count = len(unwrap(policy).model.get_input_embeddings().weight)
    ids = [tuple((n + token) % count for token in range(4)) for n in range(0, 128, 4)]
    rollouts = [_unscored(each[:1], each[1:]) for each in ids]
    (micro,) = pack(rollouts, token_budget=128, share_prompts=False)
    policy.train(gradient_checkpointing)  # as an update does
    policy(micro, 1.0, torch.zeros(len(micro.targets))).backward()
    policy.zero_grad(set_to_none=True)
    policy.eval()


def with_gathered_model(
    policy: nn.Module, accelerator: Any, function: Callable[[PreTrainedModel], T]
) -> T:
    """function(the transformers model), for generation, in the precision that training uses.

    Sharded weights are gathered once and stay until it returns, so that ranks may call the model
    as often as each needs to.
    """
    with accelerator.autocast():
        if not isinstance(policy, FSDPModule):
            return function(unwrap(policy).model)
        policy.set_reshard_after_forward(False)
        try:
            result: T = policy(function)
        finally:
            policy.set_reshard_after_forward(True)
            # FSDP2's default for the root: after a forward pass its weights stay gathered, because
            # the backward pass needs them first.
            policy.set_reshard_after_forward(False, recurse=False)
            for module in policy.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return result


def unwrap(policy: nn.Module) -> Policy:
    """The policy inside a data-parallel wrapper."""
    inner = policy.module if isinstance(policy, DistributedDataParallel) else policy
    assert isinstance(inner, Policy), f"expected a Policy, got {type(inner).__name__}"
    return inner
