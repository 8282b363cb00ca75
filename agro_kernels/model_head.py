"""How a transformers causal LM makes logits of its last hidden state: found by asking the model.

    logits = cap(scale * head(hidden))

for most of them, the scale 1 and no cap for most of those. Which, the configuration says, in one of
a few names; what a name means differs between architectures (Granite divides by `logits_scaling`,
HyperCLOVA X multiplies by it), and at its default of 1.0 it means nothing. So the model is run once
on eight tokens, as configured, and each meaning is compared with its own logits. Nothing here
imports transformers or peft.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agro_kernels.arguments import as_number, checked_temperature
from agro_kernels.head_modules import HeadTerms, head_linears, head_precision, head_terms

# Where configurations keep a number that the logits are multiplied with or divided by, and a cap.
SCALES = (
    "logit_scale",
    "logits_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "output_multiplier",
)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Architectures (model_type: which of CAPS) that are served without having been asked, where there
# are no weights to ask with. Each is compared with the unpatched model in the tests.
UNASKED: dict[str, str | None] = {
    "gemma2": "final_logit_softcapping",
    "gemma3": None,
    "gemma3_text": "final_logit_softcapping",
    "llama": None,
    "mistral": None,
    "qwen2": None,
    "qwen3": None,
    "smollm3": None,
}

_TOKENS = 8  # of the run that asks
_RUNS_ANYWHERE = (None, "eager", "sdpa")  # attention that takes any device and dtype
# The same steps in the same dtype differ by nothing; a cap or a scale in fp32 by their roundings.
_ROUNDINGS = 2
_OUTSIDE = "compute its hidden states yourself and call linear_logprobs"


class ModelHead(NamedTuple):
    """What a model does between its last hidden state and its logits."""

    before: float = 1.0
    """Multiplies the hidden states; 1.0 unless the head has a bias, which it leaves alone."""
    scale: float = 1.0
    """Multiplies what the head gives."""
    softcap: float | None = None
    """Caps that: softcap * tanh(logits / softcap)."""
    declared: tuple[tuple[str, float], ...] = ()
    """The numbers that the model had in the names above when it was asked."""

    @staticmethod
    def of(model: Any) -> "ModelHead":
        """Ask a causal LM; it is left as it was.

        Costs two passes of eight tokens and, where they leave a doubt, up to three more; without
        a gradient, on the model's device and in its dtype. Attention other than sdpa is computed
        eagerly meanwhile, for flash-attn refuses a CPU and fp32. Dropout is off, no cache is kept;
        random states, training modes and the configuration are put back. Hooks of the model's
        modules see these passes.

        Raises ValueError for a model whose logits are something else, that cannot be run on token
        ids alone, or whose weights are sharded; and for one without weights (on the meta device,
        or ZeRO-3's) unless its architecture is one of UNASKED.
        """
        check_causal_lm(model)
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError(
                "model: expected whole weights, got some that are spread over ranks; call "
                "patch_model before FSDP or tensor parallelism"
            )
        for _ in head_linears(model.get_output_embeddings()):
            pass  # raises for heads of other kinds
        if any(p.is_meta or p.numel() == 0 for p in model.parameters()):
            return _unasked(model)
        return _asked(model)

    @staticmethod
    def is_told_by(config: Any) -> bool:
        """Whether a transformers configuration says it, so that no weights have to be asked."""
        return getattr(config, "model_type", None) in UNASKED

    @staticmethod
    @contextmanager
    def asking(model: nn.Module) -> Iterator[None]:
        """Inside, a model can be run to see what it computes; it is left as it was.

        Dropout is off, and attention other than sdpa is computed eagerly.
        """
        with _undisturbed(model), _attending_anywhere(model):
            yield

    def check_unchanged(self, model: Any) -> None:
        """Raises ValueError where the numbers in a model's configuration are others by now."""
        declared = _declared(model)
        if declared != self.declared:
            raise ValueError(
                f"model: expected a configuration with {dict(self.declared)} as when it was "
                f"patched, got {dict(declared)}; call patch_model again"
            )

    @staticmethod
    def precision(head: nn.Module, hidden: Tensor) -> AbstractContextManager[object]:
        """The context to call `terms` and the head ops in; see `head_precision`."""
        return head_precision(head, hidden)

    def terms(self, head: nn.Module, hidden: Tensor) -> HeadTerms:
        """`head_terms` of the hidden states (..., D) as the model gives them to its head."""
        return head_terms(head, self.scaled(hidden))

    def scaled(self, hidden: Tensor) -> Tensor:
        """The hidden states (..., D) that go into the head."""
        return hidden if self.before == 1.0 else hidden * self.before

    def options(self, temperature: float | Tensor, targets: Tensor) -> dict[str, Any]:
        """The temperature and the softcap to give the head ops for the model's logits divided by
        `temperature`: cap(scale * x) / t is scale * cap'(x) / t, whose cap' is cap / scale."""
        if self.scale == 1.0:
            return {"temperature": temperature, "softcap": self.softcap}
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {
            "temperature": checked_temperature(temperature, targets) / self.scale,
            "softcap": softcap,
        }


# --- Asking ---------------------------------------------------------------------------------------


def check_causal_lm(model: Any) -> None:
    """Raises ValueError for what has no config, no backbone or no head."""
    config = getattr(model, "config", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or backbone(model) is None:
        raise ValueError(
            f"model: expected a transformers causal LM (a backbone as base_model, an lm_head), got "
            f"{type(model).__name__} with model_type {getattr(config, 'model_type', None)}; "
            f"{_OUTSIDE} with the weight of its head"
        )


def backbone(model: Any) -> Any:
    """The module that a causal LM's last hidden state comes from; None where there is none."""
    found = getattr(model, "base_model", None)
    if found is not None and found is not model:
        return found
    # Llama 4's text model is called otherwise than its class says.
    found = getattr(model, "model", None)
    return found if isinstance(found, nn.Module) else None


def _configs(model: Any) -> list[Any]:
    whole = model.config
    text = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    return [whole] if text is whole else [text, whole]


def _declared(model: Any) -> tuple[tuple[str, float], ...]:
    """Each number in one of the names, wherever the model may read it: (name, number)."""
    found: dict[tuple[str, float], None] = {}
    for owner in (*_configs(model), model, backbone(model)):
        for name in (*SCALES, *CAPS):
            value = getattr(owner, name, None)
            # In tests of quantised models and in CLIP it is a parameter, which no option can be.
            number = None if value is None or isinstance(value, Tensor) else as_number(value)
            if number is not None and 0.0 < number < math.inf:
                found[name, number] = None
        size, base = getattr(owner, "hidden_size", None), getattr(owner, "dim_model_base", None)
        if as_number(size) and as_number(base):  # MiniCPM's own code
            found["hidden_size / dim_model_base", size / base] = None  # type: ignore[operator]
    return tuple(found)


def _unasked(model: Any) -> ModelHead:
    family = getattr(model.config, "model_type", None)
    known = type(model).forward.__module__.startswith("transformers.models.")
    if family not in UNASKED or not known:
        raise ValueError(
            f"model: expected weights that {type(model).__name__}.forward can be checked with, got "
            f"none (the meta device, or sharded away); load the weights before patch_model (only "
            f"{', '.join(UNASKED)} of transformers are known without them)"
        )
    declared = _declared(model)
    cap = UNASKED[family]
    caps = [number for name, number in declared if name == cap]
    return ModelHead(softcap=caps[0] if caps else None, declared=declared)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; training modes and random states put back."""
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device for p in model.parameters()} - {torch.device("cpu")}, key=str)
    states = [torch.get_rng_state()]
    backends = [getattr(torch, device.type) for device in devices]
    states_there = [b.get_rng_state(d) for b, d in zip(backends, devices, strict=True)]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(states[0])
        for backend, device, state in zip(backends, devices, states_there, strict=True):
            backend.set_rng_state(state, device)


@contextmanager
def _attending_anywhere(model: nn.Module) -> Iterator[None]:
    """Inside, "eager" is the attention of what does not run on every device and in every dtype.

    flash-attn refuses a model that is still on the CPU, or in fp32 outside autocast. For the head
    it does not matter which attention made the hidden states.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        for config in _with_sub_configs(getattr(module, "config", None)):
            found[id(config)] = config
    # Parents first: what is set in a configuration is set in those below it, too.
    before = [
        (config, config._attn_implementation)
        for config in found.values()
        if hasattr(config, "_attn_implementation")
    ]
    if all(name in _RUNS_ANYWHERE for _, name in before):
        yield
        return
    try:
        for config, name in before:
            config._attn_implementation = name if name in _RUNS_ANYWHERE else "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _with_sub_configs(config: Any) -> Iterator[Any]:
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", ()):
        yield from _with_sub_configs(getattr(config, name, None))


@torch.no_grad()
def _asked(model: Any) -> ModelHead:
    embeddings = model.get_input_embeddings().weight
    ids = (torch.arange(_TOKENS, device=embeddings.device)[None] + 10) % embeddings.shape[0]
    head = model.get_output_embeddings()
    with ModelHead.asking(model):
        try:
            own = _own_logits(model, ids)
            hidden = _hidden(model, ids)
        except Exception as error:
            raise ValueError(
                f"model: expected a causal LM that runs on token ids alone, got "
                f"{type(model).__name__}, which raises {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}; {_OUTSIDE}"
            ) from error
        width = next(head_linears(head))[2].weight.shape[1]
        if hidden.shape[-1] != width:
            raise ValueError(
                f"model: expected a last hidden state of the {width} numbers that the lm_head "
                f"takes, got {hidden.shape[-1]} from {type(backbone(model)).__name__}; {_OUTSIDE}"
            )
        plain = head(hidden)
        if plain.shape != own.shape:
            raise ValueError(
                f"model: expected logits of the shape {tuple(plain.shape)} that the lm_head gives, "
                f"got {tuple(own.shape)} from {type(model).__name__}.forward; {_OUTSIDE}"
            )
        declared, noise = _declared(model), 0.0
        found = _fitting(declared, head, hidden, own, noise)
        if not found.fits:  # a device that sums in any order: two runs differ
            noise = 2 * _largest(head(_hidden(model, ids)) - plain)
            found = _fitting(declared, head, hidden, own, noise)
        if len(found.fits) > 1 and _largest(plain - head(torch.zeros_like(hidden))) == 0.0:
            raise ValueError(
                "model: expected logits that show how they are scaled and capped, got zeros; load "
                "the weights before patch_model"
            )
        if len({fit.before for fit in found.fits}) > 1:
            # A bias of zeros does not show whether it is scaled, until it is trained.
            bias = torch.linspace(-1.0, 1.0, plain.shape[-1]) * _largest(plain)
            with _added_bias(head, bias.to(plain)):
                shown = _fitting(declared, head, hidden, _own_logits(model, ids), noise)
            found = shown._replace(fits=[fit for fit in shown.fits if fit in found.fits])
        if not found.fits:
            raise ValueError(
                f"model: expected logits that are lm_head(last hidden state), scaled and capped as "
                f"the configuration says, got {type(model).__name__}.forward, whose logits differ "
                f"from that by up to {found.difference:.3g} where rounding allows "
                f"{found.allowed:.3g}; patch the model without that forward, or {_OUTSIDE}"
            )
        return _one_of(found.fits, model, ids, own)._replace(declared=declared)


@contextmanager
def _added_bias(head: nn.Module, bias: Tensor) -> Iterator[None]:
    """Inside, a head adds bias (V,) to its logits."""
    handle = head.register_forward_hook(lambda module, args, logits: logits + bias)
    try:
        yield
    finally:
        handle.remove()


class _Fitting(NamedTuple):
    fits: list[ModelHead]
    """The meanings that give the model's logits: the nearest scale first, and with it a cap."""
    difference: float
    """The largest one of the meaning that comes nearest."""
    allowed: float
    """What it may be."""


def _fitting(
    declared: tuple[tuple[str, float], ...],
    head: nn.Module,
    hidden: Tensor,
    own: Tensor,
    noise: float,
) -> _Fitting:
    """Each meaning that the declared numbers may have, compared with the model's own logits."""
    caps = sorted({number for name, number in declared if name in CAPS})
    numbers = sorted({number for name, number in declared if name not in CAPS} - {1.0})
    scales = tuple(dict.fromkeys((*numbers, *(1 / number for number in numbers))))
    meanings = [ModelHead(scale=scale) for scale in (*scales, 1.0)]
    if head_terms(head, hidden).bias is not None:  # else before and after the head are the same
        meanings += [ModelHead(before=scale) for scale in scales]
    fits, nearest = [], (math.inf, 0.0)
    distances: dict[tuple[float, float], float] = {}
    for meaning in meanings:
        scaled = head(meaning.scaled(hidden)) * meaning.scale
        for softcap in (*caps, None):
            logits = scaled if softcap is None else softcap * (scaled / softcap).tanh()
            eps = max(torch.finfo(dtype).eps for dtype in (logits.dtype, own.dtype))
            allowed = _ROUNDINGS * eps * _largest(logits) + noise
            apart = logits.to(own.dtype) - own
            difference = _largest(apart)
            nearest = min(nearest, (difference, allowed))
            if difference <= allowed:
                fits.append(meaning._replace(softcap=softcap))
                scale, mean = meaning[:2], float(apart.float().abs().mean())
                distances[scale] = min(distances.get(scale, mean), mean)
    # 16 bits round a scale near 1.0 away in single logits, hardly in the mean of all. Where they
    # do, a declared number comes before its inverse, and both before 1.0.
    order = [meaning[:2] for meaning in meanings]
    order.sort(key=lambda scale: (distances.get(scale, math.inf), scale == (1.0, 1.0)))
    fits.sort(key=lambda fit: order.index(fit[:2]))
    return _Fitting(fits, *nearest)


def _largest(values: Tensor) -> float:
    return float(values.float().abs().nan_to_num(torch.inf, torch.inf).max())


def _one_of(fits: list[ModelHead], model: Any, ids: Tensor, own: Tensor) -> ModelHead:
    """The meaning of those that fit, with a cap if it has one: small logits do not show it."""
    fits = [fit for fit in fits if fit[:2] == fits[0][:2]]
    if len(fits) == 1:
        return fits[0]
    caps = [fit.softcap for fit in fits if fit.softcap is not None]
    # Hidden states so large that without a cap the logits would be four times the largest one.
    factor = 4 * max(caps) / _largest(own)

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = output.last_hidden_state * factor
        return output

    handle = backbone(model).register_forward_hook(enlarge)
    try:
        reached = _largest(_own_logits(model, ids))
    finally:
        handle.remove()
    caps = [cap for cap in caps if reached <= 1.01 * cap]
    return fits[0]._replace(softcap=min(caps, default=None))


def _own_logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits


def _hidden(model: Any, ids: Tensor) -> Tensor:
    hidden: Tensor = backbone(model)(
        input_ids=ids, use_cache=False, return_dict=True
    ).last_hidden_state
    return hidden
