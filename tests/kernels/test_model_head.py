"""How logits follow from the head: scales, caps, adapters on it, its dtype; asked of the model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agro_kernels import LogprobHead, LogprobStats, ModelHead, next_tokens, patch_model
from agro_kernels.head_modules import head_terms
from tests.kernels import architectures
from tests.kernels.small_models import build, token_batch
from tests.numerics import assert_close_to_truth

TEMPERATURE = 0.7

# peft asks transformers by a name that transformers has renamed.
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def plain(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy and lse from the logits that the model itself gives."""
    kept = targets != -100
    logits = model(input_ids=ids, use_cache=False).logits
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / TEMPERATURE
    all_logprobs = logits.log_softmax(-1)
    picked = all_logprobs.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    zero = torch.zeros_like(picked)
    return tuple(x.where(kept, zero) for x in (picked, entropy, logits.logsumexp(-1)))  # type: ignore[return-value]


def gradients(model: nn.Module, results: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Of a sum of all three results, with another weight at each position."""
    logprobs, entropy, lse = results
    weights = torch.linspace(-1.0, 2.0, logprobs.numel()).view_as(logprobs).to(logprobs)
    model.zero_grad(set_to_none=True)
    ((weights * logprobs + 0.3 * weights * entropy).sum() + 0.1 * lse.square().sum()).backward()
    return {
        # modules that patch_model has put in keep the names
        name: p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def assert_as_unpatched(patched: nn.Module, untouched: nn.Module) -> None:
    """Values and gradients, by the tolerance law."""
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    exact = copy.deepcopy(untouched).double()
    results = patched(input_ids=ids, targets=targets, temperature=TEMPERATURE)
    same, truth = plain(untouched, ids, targets), plain(exact, ids, targets)
    for name, a, b, c in zip(LogprobStats._fields, results, truth, same, strict=True):
        assert_close_to_truth(a, b, c, name)
    got, expected = gradients(patched, results), gradients(untouched, same)
    exact_gradients = gradients(exact, truth)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert_close_to_truth(gradient, exact_gradients[name], expected[name], name)


# --- Scales and caps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "scale"),
    [("cohere", 0.25), ("granite", 4.0), ("hyperclovax", 0.25), ("minicpm3", 0.25)],
)
def test_a_scaled_model_gives_its_own_logprobs_and_gradients(family: str, scale: float) -> None:
    model = architectures.build(family)
    untouched = copy.deepcopy(model)
    form = ModelHead.of(model)
    assert form.scale == scale and form.before == 1.0 and form.softcap is None
    assert_as_unpatched(patch_model(model), untouched)


def test_one_name_divides_in_one_family_and_multiplies_in_another() -> None:
    for family, scale in (("granite", 1 / 3.0), ("hyperclovax", 3.0)):
        model = architectures.build(family)
        model.config.logits_scaling = 3.0
        assert ModelHead.of(model).scale == scale


def test_a_scale_of_one_is_plain_until_the_configuration_changes() -> None:
    model = architectures.build("granite")
    model.config.logits_scaling = 1.0
    patch_model(model)
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    model(input_ids=ids, targets=targets)
    model.config.logits_scaling = 5.0
    with pytest.raises(ValueError, match="model: expected a configuration with .*call patch_model"):
        model(input_ids=ids, targets=targets)
    untouched = copy.deepcopy(model)
    untouched.forward = type(model).forward.__get__(untouched)
    assert_as_unpatched(patch_model(model), untouched)


class Wild(LlamaForCausalLM):
    """A scale before the head, a bias, a scale after, a cap: whatever the configuration has."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        config: Any = self.config
        logits = self.lm_head(hidden / getattr(config, "logits_scaling", 1.0))
        logits = logits * getattr(config, "logit_scale", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None and not getattr(config, "cap_is_off", False):
            logits = cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(logits=logits)


def wild(bias: bool = False, **numbers: Any) -> PreTrainedModel:
    model: Any = build("llama", tied=False)
    model.__class__ = Wild
    if bias:
        model.lm_head.bias = nn.Parameter(torch.linspace(-2.0, 2.0, 71))
    for name, number in numbers.items():
        setattr(model.config, name, number)
    return model  # type: ignore[no-any-return]


def form_of(patched: Any) -> ModelHead:
    return patched.forward.keywords["_form"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("numbers", "before", "scale", "softcap"),
    [
        ({"logits_scaling": 4.0}, 0.25, 1.0, None),
        ({"logit_scale": 0.3}, 1.0, 0.3, None),
        ({"logit_scale": 0.3, "final_logit_softcapping": 1.5}, 1.0, 0.3, 1.5),
        ({"logits_scaling": 4.0, "final_logit_softcapping": 1.5}, 0.25, 1.0, 1.5),
    ],
)
def test_scale_then_cap_then_temperature(
    numbers: dict[str, float], before: float, scale: float, softcap: float | None, bias: bool
) -> None:
    model = wild(bias, **numbers)
    untouched = copy.deepcopy(model)
    patch_model(model)
    # Without a bias before and after the head are the same.
    assert form_of(model)[:3] == (
        (before, scale, softcap) if bias else (1.0, before * scale, softcap)
    )
    assert_as_unpatched(model, untouched)


@pytest.mark.parametrize("off", [False, True])
def test_a_cap_that_small_logits_do_not_show_is_found(off: bool) -> None:
    """As of bf16 weights before training; a large hidden state tells."""
    model = wild(final_logit_softcapping=30.0, cap_is_off=off)
    model.lm_head.weight.data *= 0.01
    model.to(torch.bfloat16)
    assert ModelHead.of(model).softcap == (None if off else 30.0)


@pytest.mark.parametrize(
    ("numbers", "before", "scale"),
    [({"logits_scaling": 4.0}, 0.25, 1.0), ({"logit_scale": 0.3}, 1.0, 0.3)],
)
def test_a_bias_of_zeros_is_served_as_it_will_be_trained(
    numbers: dict[str, float], before: float, scale: float
) -> None:
    model = wild(bias=True, **numbers)
    bias = model.lm_head.bias
    bias.data.zero_()
    patch_model(model)
    assert form_of(model)[:3] == (before, scale, None)
    assert not model.lm_head._forward_hooks
    bias.data.copy_(torch.linspace(-2.0, 2.0, 71))
    untouched = wild(bias=True, **numbers)
    assert_as_unpatched(model, untouched)


@pytest.mark.parametrize(
    ("family", "name", "scale"),
    [
        ("granite", "logits_scaling", 1 / 1.01),
        ("hyperclovax", "logits_scaling", 1.01),
        ("cohere", "logit_scale", 1.01),
        ("llama", "logit_scale", 1.0),  # which has no such thing
    ],
)
def test_a_scale_near_one_in_16_bits(family: str, name: str, scale: float) -> None:
    model: Any = build(family, tied=True) if family == "llama" else architectures.build(family)
    owner = model if hasattr(model, name) else model.config  # Cohere's model has a copy
    setattr(owner, name, 1.01)
    assert ModelHead.of(model.to(torch.bfloat16)).scale == scale


def refusing(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("FlashAttention only support fp16 and bf16 data type")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_that_does_not_run_here_yet(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash-attn, of a model that is still on the CPU and in fp32."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "refusing", refusing)
    model = build(family, tied=True)
    config = model.config
    wanted = {"": "refusing"}
    if family == "gemma3":
        wanted |= {"text_config": "refusing", "vision_config": "sdpa"}
    config._attn_implementation = wanted
    patch_model(model)
    configs = [config if name == "" else getattr(config, name) for name in wanted]
    assert [each._attn_implementation for each in configs] == list(wanted.values())
    ids, _ = token_batch()
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        model(input_ids=ids)


def test_logits_of_zeros_show_no_scale() -> None:
    model = architectures.build("granite")
    model.lm_head.weight.data.zero_()
    with pytest.raises(ValueError, match="got zeros; load the weights before patch_model"):
        patch_model(model)


def test_asking_leaves_nothing_behind() -> None:
    model = build("gemma2", tied=True).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.enable_grad():
        ModelHead.of(model)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_weights_that_are_not_there_are_refused_outside_the_known_families() -> None:
    on_meta = architectures.build("granite").to("meta")
    with pytest.raises(ValueError, match="load the weights before patch_model .only gemma2, "):
        patch_model(on_meta)
    assert ModelHead.of(build("gemma2", tied=True).to("meta")).softcap == 2.0
    assert ModelHead.of(build("llama", tied=True).to("meta"))[:3] == (1.0, 1.0, None)
    sharded: Any = build("llama", tied=False)
    sharded.lm_head.weight.full_tensor = lambda: None
    with pytest.raises(ValueError, match="expected whole weights, .* before FSDP"):
        patch_model(sharded)


# --- Adapters on the head -------------------------------------------------------------------------


def lora(model: nn.Module, seed: int = 3, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "lm_head"], **options}
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


@peft_warns
@pytest.mark.parametrize("bias", [False, True], ids=["", "lora_bias"])
def test_lora_on_the_head_is_part_of_it(bias: bool) -> None:
    """Values and gradients as peft's own, patched before or after; off, the plain model."""
    options: dict[str, Any] = {"init_lora_weights": False, "lora_bias": bias}
    if bias:  # peft warns of layers without one of their own
        options["target_modules"] = ["lm_head"]
    untouched = lora(wild(bias), **options)
    first = lora(patch_model(wild(bias)), **options)
    first.load_state_dict(untouched.state_dict())
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    for patched in (first, patch_model(copy.deepcopy(untouched)), copy.deepcopy(first)):
        assert_as_unpatched(patched, untouched)
        trained = {name for name, p in patched.named_parameters() if p.grad is not None}
        assert sum("lm_head.lora" in name for name in trained) == 2 + bias
        assert torch.equal(patched(input_ids=ids).logits, untouched(input_ids=ids).logits)
        with patched.disable_adapter(), untouched.disable_adapter():
            off = patched(input_ids=ids, targets=targets, temperature=TEMPERATURE)
            expected = plain(untouched, ids, targets)
        torch.testing.assert_close(off.logprobs, expected[0])


@peft_warns
@pytest.mark.parametrize("rank", [2, 8, 11])
def test_rows_with_an_adapter_begin_at_multiples_of_16_bytes(rank: int) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["lm_head"], "init_lora_weights": False}
    model = build("llama", tied=False).to(torch.bfloat16)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, **options), autocast_adapter_dtype=False
    )
    head = adapted.get_output_embeddings()
    hidden = torch.randn(5, 32, dtype=torch.bfloat16)
    terms = head_terms(head, hidden)
    assert terms.weight.shape == (71, 40 if rank < 9 else 48)
    assert terms.hidden.shape == (5, terms.weight.shape[1])
    product = terms.hidden.float() @ terms.weight.float().T
    torch.testing.assert_close(product, head(hidden).float(), rtol=2e-2, atol=2e-2)


@peft_warns
def test_an_adapter_that_does_nothing_yet_changes_no_bit() -> None:
    model = patch_model(lora(build("llama", tied=False)))
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    on = model(input_ids=ids, targets=targets)
    with model.disable_adapter():
        off = model(input_ids=ids, targets=targets)
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))


@peft_warns
def test_merged_and_several_adapters_on_the_head() -> None:
    peft = pytest.importorskip("peft")
    untouched = lora(build("llama", tied=False), init_lora_weights=False)
    more = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    untouched.add_adapter("more", more)
    untouched.base_model.set_adapter(["default", "more"])
    patched = patch_model(copy.deepcopy(untouched))
    assert_as_unpatched(patched, untouched)
    for model in (patched, untouched):
        model.merge_adapter()
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    ours = patched(input_ids=ids, targets=targets, temperature=TEMPERATURE)
    torch.testing.assert_close(ours.logprobs, plain(untouched, ids, targets)[0])


@peft_warns
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_among_modules_to_save_trains_its_copy(tied: bool) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    untouched = lora(build("llama", tied), init_lora_weights=False, **options)
    first = lora(patch_model(build("llama", tied)), init_lora_weights=False, **options)
    first.load_state_dict(untouched.state_dict())
    for patched in (first, patch_model(copy.deepcopy(untouched))):
        assert_as_unpatched(patched, untouched)
        trained = {name for name, p in patched.named_parameters() if p.grad is not None}
        assert any("lm_head.modules_to_save" in name for name in trained)


@peft_warns
def test_adapters_that_are_not_plain_lora_are_refused_on_the_head() -> None:
    with pytest.raises(ValueError, match="lm_head: expected plain LoRA, got DoraLinearVariant"):
        patch_model(lora(build("llama", tied=False), use_dora=True))
    peft = pytest.importorskip("peft")
    ia3 = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"a torch\.nn\.Linear, with .* got peft\.tuners\.ia3"):
        patch_model(peft.get_peft_model(build("llama", tied=False), ia3))
    model = patch_model(lora(build("llama", tied=False)))
    ids, mask = token_batch()
    with pytest.raises(ValueError, match="weight_grad: expected None for a head with an adapter"):
        model(input_ids=ids, targets=next_tokens(ids, mask), weight_grad=torch.zeros(71, 32))


# --- The head's dtype -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_fp32_on_a_bf16_model(tied: bool) -> None:
    """As hidden.float() @ weight.float().T: logits, log-probabilities, gradients of both."""
    model = patch_model(build("llama", tied).to(torch.bfloat16), head_dtype="float32")
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    weight = model.get_output_embeddings().weight
    assert tied == (weight is model.get_input_embeddings().weight)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = hidden.float() @ weight.float().T
    assert torch.equal(model(input_ids=ids).logits, logits)
    results = model(input_ids=ids, targets=targets, temperature=TEMPERATURE)
    picked = (logits / TEMPERATURE).log_softmax(-1)
    picked = picked.gather(-1, targets.clamp_min(0)[..., None])[..., 0].where(targets != -100, 0.0)
    torch.testing.assert_close(results.logprobs, picked, rtol=1e-5, atol=1e-5)
    picked.sum().backward()
    expected, weight.grad = weight.grad, None
    results.logprobs.sum().backward()
    assert expected is not None and weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, expected, rtol=2e-2, atol=2e-3)


def test_a_head_in_fp32_stays_so_under_autocast_and_with_an_fp32_weight() -> None:
    head = LogprobHead(16, 37, bias=True, head_dtype="float32")
    hidden = torch.randn(5, 16).bfloat16()
    targets = torch.arange(5)
    expected = torch.nn.functional.linear(hidden.float(), head.weight, head.bias)
    assert torch.equal(head(hidden), expected)
    logprobs = expected.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden), expected)
        torch.testing.assert_close(head(hidden, targets).logprobs, logprobs)
    assert "head_dtype=torch.float32" in repr(head)
    with pytest.raises(ValueError, match='head_dtype: expected "float32", .* got .float31.'):
        LogprobHead(4, 4, head_dtype="float31")
    with pytest.raises(ValueError, match="head_dtype: expected"):
        patch_model(build("llama", tied=True), head_dtype=torch.int32)


@peft_warns
def test_lora_on_a_head_in_fp32() -> None:
    model = patch_model(lora(build("llama", tied=False), init_lora_weights=False), "float32")
    model.to(torch.bfloat16)
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    ours = model(input_ids=ids, targets=targets, temperature=TEMPERATURE)
    torch.testing.assert_close(ours.logprobs, plain(model, ids, targets)[0], rtol=1e-2, atol=1e-2)
