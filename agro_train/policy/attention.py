"""Which attention a model computes with, and what its layers are told of packed sequences: a dense
mask, a block mask, or where sequences begin.

A layer may see the tokens of its own sequence before it, the shared prompt's among them, and of
these no more than its window. sdpa and eager take that as a mask of L x L, flex attention as one
bit for each pair of blocks and a function for the pairs in between: no L x L anywhere.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask
from transformers.utils.generic import is_flash_attention_requested

from agro_train.refusal import Refusal
from agro_train.types import MicroBatch

# Our name among transformers' attentions: theirs, with one dtype for query, key and value.
FLEX = "agro_flex_attention"
BLOCK = 128  # tokens: the size of a block on both sides, torch's own
PADDING = 2**31 - 1  # its segment, behind all others
FULL, SLIDING = "full_attention", "sliding_attention"
WIDTHS = ("head_dim", "qk_head_dim", "v_head_dim")  # what attention modules call it
# Kernels of one process: with and without gradients, for each width of heads, for keys that an
# adapter leaves without one. torch's own limit is 8, and beyond it there would be L x L scores.
MOST_KERNELS = 64
NARROWEST = 16  # numbers of a head, below which torch's flex kernels do not compile
# They say that they take block masks, and do not: the two of transformers 5.23's causal LMs.
WITH_DENSE_MASKS = ("doge", "lfm2")
OLDEST = (8, 0)  # the compute capability of the first GPUs that `auto` takes flex attention on

MaskMod = Callable[[Any, Any, Tensor, Tensor], Tensor]


# Which attention.


def name_at_load(name: str) -> str | None:
    """What transformers is told of the setting while it loads a model; None: its own choice, until
    `settle`."""
    return None if name in ("auto", "flex_attention") else name


def settle(model: PreTrainedModel, name: str) -> None:
    """Gives a model that is loaded the attention of the setting. `auto` is flex attention on a GPU
    where the model goes with it, else what transformers has chosen: sdpa, mostly.

    Raises Refusal where the attention needs a package or a device that is not there, or does not
    go with the model.
    """
    if name == "auto":
        if gpu_has_flex() and why_not_flex(model) is None:
            _set(model, FLEX)
    elif name != "flex_attention":
        if model.config._attn_implementation != name:
            _set(model, name)
    elif (reason := why_not_flex(model)) is None:
        _set(model, FLEX)
    else:
        raise Refusal(
            f"attn_implementation: expected one for {type(model).__name__}, got {name}: {reason}; "
            "set attn_implementation=auto"
        )


def _set(model: PreTrainedModel, name: str) -> None:
    if name == FLEX:
        # Of the process: to set it around each call costs half a millisecond a layer.
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, MOST_KERNELS
        )
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(
            f"attn_implementation: expected one that works here, got {name}: {reason[:400]}"
        ) from error


def setting_of(model: PreTrainedModel) -> str:
    """The attention that a model computes with, as the setting calls it."""
    name: str = model.config._attn_implementation
    return "flex_attention" if name == FLEX else name


def check_attention(name: str) -> None:
    """Raises Refusal for an attention whose package or device is not there, before there is a
    model to try it on."""
    missing = None
    if name == "flash_attention_2":
        if not any(map(importlib.util.find_spec, ("flash_attn", "kernels"))):
            how = "pip install --no-build-isolation flash-attn"  # its build imports torch
            missing = f"the package flash-attn is not installed: {how}"
        elif not torch.cuda.is_available():
            missing = "there is no GPU that torch sees"
    elif name == "flex_attention" and not trains_flex():
        missing = "torch has its backward pass on GPUs alone, and sees none"
    if missing is not None:
        raise Refusal(
            f"attn_implementation: expected one that works here, got {name}: {missing}, or set "
            "attn_implementation=sdpa"
        )


def trains_flex() -> bool:
    """Whether torch's flex attention has a backward pass on this machine."""
    return torch.cuda.is_available()


def gpu_has_flex() -> bool:
    """Whether `auto` takes flex attention on this machine."""
    return trains_flex() and torch.cuda.get_device_capability() >= OLDEST


def why_not_flex(model: PreTrainedModel) -> str | None:
    """Why a model cannot have flex attention on any device; None: it can."""
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not all(module._supports_flex_attn for module in inside):
        return "transformers has no flex attention for it"
    if model.config.model_type in WITH_DENSE_MASKS:
        return "its layers compute with the mask's numbers, which a block mask does not have"
    if others := sorted(set(_kinds(model.config.get_text_config())) - {FULL, SLIDING}):
        return f"some of its layers are of the kind {others[0]}, which takes no block mask"
    # Of its modules: in a configuration it may differ from layer to layer, and be no one number.
    widths = [getattr(m, name, None) for m in model.modules() for name in WIDTHS]
    narrowest = min((each for each in widths if isinstance(each, int)), default=NARROWEST)
    if narrowest < NARROWEST:
        return f"its heads have {narrowest} numbers, and torch's kernels take {NARROWEST} or more"
    return None


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model with flex attention has another one: a token at a time it would compile and
    make a block mask for every length."""
    if model.config._attn_implementation != FLEX:
        yield
        return
    _set(model, "sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        _set(model, FLEX)


def _flex(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' flex attention. Under autocast it casts as sdpa does, which is on torch's list
    of such ops: a norm of queries and keys with float32 weights leaves them in float32."""
    if torch.is_autocast_enabled(device := query.device.type):
        low = torch.get_autocast_dtype(device)
        query, key, value = query.to(low), key.to(low), value.to(low)
    found: tuple[Tensor, Tensor | None] = flex_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return found


AttentionInterface.register(FLEX, _flex)
# For whoever calls the model with plain ids; without it there would be no mask at all.
AttentionMaskInterface.register(FLEX, flex_attention_mask)


# What its layers are told.


def packed_inputs(micro: MicroBatch, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of the base model for a pass over a micro-batch. With flex attention there may
    be more tokens than the micro-batch has, behind its own, which see each other alone.

    The mask or the sequence boundaries are always given explicitly: with a cache and no mask,
    transformers lets tokens attend across packed sequences.
    """
    text, implementation = model.config.get_text_config(), model.config._attn_implementation
    inputs: dict[str, Any] = {
        "input_ids": micro.input_ids[None],
        "position_ids": micro.position_ids[None],
    }
    if implementation == FLEX:
        return _with_block_masks(micro, text)
    if is_flash_attention_requested(requested_attention_implementation=implementation):
        return inputs | {
            "cu_seq_lens_q": micro.cu_inputs,
            "cu_seq_lens_k": micro.cu_inputs,
            "max_length_q": micro.longest,
            "max_length_k": micro.longest,
        }

    def dense(first: Tensor | None) -> Tensor:
        attends = micro.attends(first)
        if implementation != "eager":
            return attends[None, None]
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros_like(attends, dtype=model.dtype)
        return mask.masked_fill(~attends, lowest)[None, None]

    return inputs | {"attention_mask": _by_kind(text, micro.position_ids, dense)}


def padded_length(tokens: int) -> int:
    """How many tokens flex attention computes with: whole blocks, so that kernels compiled for one
    length serve the others, and two or more, since torch compiles one block apart."""
    return max(2, -(-tokens // BLOCK)) * BLOCK


def _with_block_masks(micro: MicroBatch, text: Any) -> dict[str, Any]:
    """The padding is one more sequence."""
    tokens = len(micro.input_ids)
    more = padded_length(tokens) - tokens
    input_ids = pad(micro.input_ids, (0, more))
    segments, parents = (pad(t, (0, more), value=PADDING) for t in (micro.segments, micro.parents))
    positions = torch.cat([micro.position_ids, torch.arange(more, device=input_ids.device)])

    def blocks(first: Tensor | None) -> BlockMask:
        return block_mask(segments, parents, positions, first)

    return {
        "input_ids": input_ids[None],
        "position_ids": positions[None],
        "attention_mask": _by_kind(text, positions, blocks),
    }


def has_windows(config: Any) -> bool:
    """Whether some layers of a model with this configuration see the last tokens only."""
    return SLIDING in _kinds(config.get_text_config())


def _kinds(text: Any) -> list[str]:
    """What kinds of layers a model has, by transformers' names."""
    named = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    return sorted(set(named)) if named else [FULL if window is None else SLIDING]


def _by_kind(text: Any, positions: Tensor, make: Callable[[Tensor | None], Any]) -> Any:
    """What `make` makes for the layers; where they are of several kinds, for each by its name.

    Layers that do not attend, as those of a recurrence, get what the others do.
    """
    kinds = _kinds(text)
    if len(kinds) == 1 or set(kinds) - {FULL, SLIDING}:
        return make(_first_seen(kinds[0] if len(kinds) == 1 else FULL, text, positions))
    return {kind: make(_first_seen(kind, text, positions)) for kind in kinds}


def _first_seen(kind: str, text: Any, positions: Tensor) -> Tensor | None:
    """(L,) int64: the least position of its sequence that a token may see in such a layer. None:
    it sees its sequence from the beginning."""
    window = text.sliding_window if kind == SLIDING else None
    return None if window is None else positions - (window - 1)


def block_mask(
    segments: Tensor, parents: Tensor, positions: Tensor, first: Tensor | None = None
) -> BlockMask:
    """`MicroBatch.attends` as flex attention takes it, for L tokens, a multiple of BLOCK.

    Every mask has the same function over tensors of its own, so a kernel is compiled once for all.
    What a token sees is a run of its own segment and one of its parent's, so the blocks are counted
    from where runs begin and end: L x L / BLOCK numbers for a moment, as many operations for any L,
    and no wait for the device. torch's `create_block_mask` makes one L x L mask for a moment.

    Args:
        segments, parents, positions: (L,) int64, as those of a MicroBatch: segments in ascending
            order, and positions that go up by 1 inside each.
        first: (L,) int64, the least position that each token may see; None: 0.
    """
    # Also where no layer has a window, so that there is one function and one kernel.
    least = torch.zeros_like(positions) if first is None else first
    own = _seen_in_blocks(segments, segments, positions, least)
    shared = _seen_in_blocks(segments, parents, positions, least, parents != segments)
    seen = own + shared
    full = seen == BLOCK**2
    return BlockMask.from_kv_blocks(
        *_numbered((seen > 0) & ~full),
        *_numbered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=_who_sees(segments, parents, positions, least),
        seq_lengths=(len(segments), len(segments)),
    )


def _seen_in_blocks(
    segments: Tensor,
    others: Tensor,
    positions: Tensor,
    least: Tensor,
    counted: Tensor | None = None,
) -> Tensor:
    """(L / BLOCK, L / BLOCK) int32: how many pairs of a token of the row's block and one of the
    column's are such that the first sees the second, and that one is of the segment `others` (L,).

    Args:
        counted: (L,) bool, which rows count; None: all.
    """
    places = torch.arange(len(segments), device=segments.device)
    begin = torch.searchsorted(segments, others)
    end = torch.searchsorted(segments, others, right=True)
    end = torch.minimum(end, places + 1)
    begin = begin + (least - positions[begin]).clamp(min=0)
    if counted is not None:
        end = end.where(counted, begin)
    begin, end, edges = (t.to(torch.int32) for t in (begin, end, places[::BLOCK]))
    found = torch.minimum(end[:, None], edges + BLOCK)
    found -= torch.maximum(begin[:, None], edges)
    found = found.clamp_(min=0).view(-1, BLOCK, len(edges))
    return found.sum(1, dtype=torch.int32)


def _numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of (n, n) bool, as a BlockMask has it: how many there are in a row, and the columns of these,
    then of the others, int32."""
    which = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], which.int()[None, None]


def _who_sees(segments: Tensor, parents: Tensor, positions: Tensor, least: Tensor) -> MaskMod:
    """Whether the token at `query` may see the one at `key`."""

    def sees(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        of_key = segments[key]
        related = (segments[query] == of_key) | (parents[query] == of_key)
        return related & (query >= key) & (positions[key] >= least[query])

    return sees
