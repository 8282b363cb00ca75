"""What a training pass of a micro-batch holds, found by running it on tensors without contents.

The policy's own forward and backward run with the run's attention, autocast, gradient
checkpointing and adapter. Each tensor's bytes are counted from when it is made to when it is freed.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from agro_kernels import ModelHead
from agro_train.config import TrainConfig
from agro_train.plan.architecture import attention_of, build, shortened
from agro_train.plan.machine import Machine
from agro_train.policy.attention import padded_length
from agro_train.policy.policy import Policy, layers_of
from agro_train.refusal import Refusal
from agro_train.settings import MOST_KEPT
from agro_train.types import MicroBatch

# Our names among transformers' attentions, for those of theirs that need a package or a device.
PLANNED = {"flash_attention_2": "agro_planned", "flex_attention": "agro_planned_by_blocks"}
# The head's own buffers: agro_kernels._triton.head_gradients and csrc/README.md say why.
DLOGITS_BYTES, TOKEN_CHUNK, COLUMN_CHUNK = 528 * 2**20, 32768, 33792
# The statistics of a token and part of the vocabulary: numbers of 4 bytes, 3 for each of 128 parts.
FORWARD_CHUNK, FORWARD_BYTES = 16384, 12 * 128
CPU_CHUNK, CPU_SUMS = 2048, 4


class Pass(NamedTuple):
    """Bytes beyond weights, gradients of all weights, and moments."""

    kept: float  # what the forward pass of the update leaves for its backward
    forward: float  # the most that this forward pass holds
    backward: float  # and its backward, with what it was left
    scoring: float  # the most that a pass without gradients holds

    @property
    def beyond(self) -> float:
        """What is held besides `kept`, at the worst moment of the update."""
        return max(self.forward, self.backward) - self.kept


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, but for those that it is told not to.

    Args:
        inside: the bytes of an op's own buffers, given the op and its arguments.
    """

    def __init__(self, held: Iterable[Tensor], inside: Callable[[Any, Any], float]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in held}
        self.inside = inside
        self.now = self.peak = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        grouped = func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)
        result = (_grouped_products if grouped else func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.now + self.inside(func, args))
        return result

    def _count(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.now += size
            weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def _grouped_products(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """What a layer of experts makes of its tokens, unwritten. Torch's own rule for the shape knows
    bfloat16 alone; its products take other dtypes, too."""
    del bias
    shape = [a.shape[-2], b.shape[-1]]
    if a.dim() == b.dim():
        shape.insert(0, a.shape[0] if offs is None else offs.shape[0])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def trace(
    architecture: Any, config: TrainConfig, machine: Machine, tokens: int, predicted: int
) -> Pass:
    """Of a micro-batch of `tokens` tokens, `predicted` of them completions'.

    Layers are alike, so two and three of them say what any number holds. Raises Refusal for a model
    whose pass depends on what its tensors hold.
    """
    layers = architecture.get_text_config().num_hidden_layers
    # Of all layers, since the first ones may be of fewer kinds.
    attention: Any = attention_of(architecture, config, machine)
    config = replace(config, attn_implementation=attention)
    try:
        if layers <= 3:
            return _traced(architecture, config, machine, tokens, predicted)
        two, three = (
            _traced(shortened(architecture, n), config, machine, tokens, predicted) for n in (2, 3)
        )
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    ) as error:
        reason = " ".join(str(error).split())
        raise Refusal(
            f"model: expected one whose pass can be planned, got {type(architecture).__name__}, "
            f"whose shapes depend on its tensors' contents: {reason[:200]}"
        ) from error
    return Pass(*(a + (b - a) * (layers - 2) for a, b in zip(two, three, strict=True)))


def _traced(
    architecture: Any, config: TrainConfig, machine: Machine, tokens: int, predicted: int
) -> Pass:
    attention = config.attn_implementation
    model = build(architecture, config, PLANNED.get(attention, attention))
    if attention == "flex_attention":
        tokens = padded_length(tokens)
    with FakeTensorMode():
        gathered_low = config.fsdp and config.mixed_precision == "bf16"
        onto_cpu(model, torch.bfloat16 if gathered_low else None)
        # A form is found by running a model on contents. None takes memory worth counting.
        policy = (MasklessPolicy if attention in PLANNED else Policy)(model, form=ModelHead())
        micro = micro_batch(config, tokens, predicted)
        head = model.get_output_embeddings().weight
        weight_grad = _prepare_gradients(policy, head, config, machine)
        coefficients, lse = torch.empty(predicted), torch.empty(predicted)
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        held = [*policy.parameters(), *policy.buffers(), *gradients, coefficients, lse]
        held += micro.tensors().values()

        def inside(func: Any, args: Any) -> float:
            return head_buffers(func, args, machine, in_place=weight_grad is not None)

        def precision() -> AbstractContextManager[Any]:
            low = config.mixed_precision == "bf16" and not config.fsdp
            return torch.autocast("cpu", torch.bfloat16) if low else nullcontext()

        with torch.no_grad(), Live(held, inside) as scoring, precision():
            policy(micro, config.temperature)
        policy.train(config.gradient_checkpointing)
        with Live(held, inside) as update:
            with precision():
                total = policy(micro, config.temperature, coefficients, lse, weight_grad)
            kept, forward = update.now, update.peak
            update.peak = kept
            total.backward()
    return Pass(kept, forward, update.peak, scoring.peak)


def onto_cpu(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Gives a model on the meta device weights that say they are on a CPU. dtype: None keeps each
    weight's own."""
    made: dict[int, Any] = {}  # tied weights stay one

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new.to(dtype or tensor.dtype), tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    originals = [*model.parameters(), *model.buffers()]  # alive, so that no id recurs
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else fake(tensor)
    del originals


def _prepare_gradients(
    policy: Policy, head: Tensor, config: TrainConfig, machine: Machine
) -> Tensor | None:
    """Gradients as an earlier micro-batch has left them: whole and in place, or, sharded, gone from
    each layer as soon as they are made. Returns what the head adds to by itself, if it does."""
    layers = {id(p) for p in layers_of(policy.model).parameters()}
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            continue
        if not config.fsdp:
            parameter.grad = torch.empty_like(parameter)
        elif id(parameter) in layers:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    alone = not config.fsdp and machine.gpus == 1
    return head.grad if alone and head.dtype in (torch.float32, torch.float64) else None


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def micro_batch(config: TrainConfig, tokens: int, predicted: int) -> MicroBatch:
    """One of these sizes, with arbitrary contents."""
    places = torch.zeros(tokens, dtype=torch.int64)
    ends = torch.zeros(2, dtype=torch.int32)
    kept_ids = None
    if config.truncates:
        kept_ids = torch.zeros(predicted, config.top_k or MOST_KEPT, dtype=torch.int32)
    return MicroBatch(
        input_ids=places,
        position_ids=places.clone(),
        segments=places.clone(),
        parents=places.clone(),
        cu_inputs=ends,
        predictors=torch.zeros(predicted, dtype=torch.int64),
        targets=torch.zeros(predicted, dtype=torch.int64),
        sampling_logprobs=torch.zeros(predicted),
        cu_seqlens=ends.clone(),
        rows=torch.zeros(1, dtype=torch.int64),
        longest=tokens,
        kept_ids=kept_ids,
    )


def head_buffers(func: Any, args: Any, machine: Machine, *, in_place: bool) -> float:
    """Bytes that a head op takes for itself while it runs; 0 for any other op.

    Args:
        in_place: whether the weight's gradient is added where it lies.
    """
    if func.namespace != "agro" or "linear_logprobs" not in func.__name__:
        return 0.0
    # By name: operators have gained arguments before, and pass their last ones or not.
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False))
    backward, hidden, weight = "output_mask" in given, given["hidden"], given["weight"]
    rows, size, itemsize = int(hidden.shape[0]), int(hidden.shape[1]), int(hidden.element_size())
    wants_weight = backward and (in_place or given["output_mask"][1])
    if not machine.cuda:
        if not backward:
            return 4.0 * size * min(rows, CPU_CHUNK)
        # Hidden packed once or twice, and the sums of its gradient that threads share.
        return 4.0 * rows * size * (1 + wants_weight + min(torch.get_num_threads(), CPU_SUMS))
    copied = rows * size * itemsize  # the policy keeps all rows: zeros go where one does not count
    if not backward:
        return FORWARD_BYTES * min(rows, FORWARD_CHUNK) + 16.0 * rows + copied
    at_once = min(rows, TOKEN_CHUNK)
    columns = min(DLOGITS_BYTES // (at_once * itemsize), COLUMN_CHUNK, len(weight))
    # The sum of one chunk of tokens is rounded by its product; those of several add up in fp32.
    summed = wants_weight and not in_place and itemsize < 4 and rows > TOKEN_CHUNK
    sums = 4 * columns * size if summed else 0
    rounded = 4 * rows * size if itemsize < 4 else 0
    return float(at_once * columns * itemsize + rounded + sums + copied)


class MasklessPolicy(Policy):
    """A policy whose attention reads boundaries, or which blocks to read, in place of a mask: a few
    numbers for each block of tokens, which are not counted."""

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        output = self.model.base_model(
            input_ids=micro.input_ids[None],
            position_ids=micro.position_ids[None],
            attention_mask=torch.empty(1, 1, 1, 1, dtype=torch.bool),  # so that none is made
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


class _Fused(torch.autograd.Function):
    """What flash and flex attention keep: their three inputs, their result, and lse."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
        result = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    del module, attention_mask, options
    parts = (part.transpose(1, 2).contiguous() for part in (query, key, value))
    return _Fused.apply(*_as_autocast(parts)), None


def _flex(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    del module, attention_mask, options
    heads = query.shape[1]
    if heads & (heads - 1):  # transformers repeats keys and values for such a number
        key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
    result: Tensor = _Fused.apply(*_as_autocast((query, key, value)))
    return result.transpose(1, 2).contiguous(), None


def _as_autocast(parts: Iterable[Tensor]) -> list[Tensor]:
    low = torch.is_autocast_enabled("cpu")
    return [part.to(torch.bfloat16) if low else part for part in parts]


AttentionInterface.register(PLANNED["flash_attention_2"], _flash)
AttentionInterface.register(PLANNED["flex_attention"], _flex)
