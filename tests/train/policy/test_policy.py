"""The policy's head is the model's own, and a model it would misread is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agro_kernels import ModelHead
from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.batch import pack
from agro_train.data.rows import read_jsonl
from agro_train.policy import load
from agro_train.policy.attention import FLEX
from agro_train.policy.load import fingerprint, identity, set_matmul_precision
from agro_train.policy.policy import Policy, layers_of
from agro_train.refusal import Refusal
from agro_train.types import Rollout
from tests.train.models import SIZES, ragged_rollouts, tiny_policy

pytestmark = pytest.mark.usefixtures("no_curves")

SMALL = {
    "vocab_size": 15,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_softcapped_head_gives_the_models_own_distribution(temperature: float) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)
    model = Gemma2ForCausalLM(config).eval()
    rollouts = ragged_rollouts()
    (micro,) = pack(rollouts[:1], token_budget=100, share_prompts=False)
    ours = Policy(model)(micro, temperature)
    logits = model(input_ids=micro.input_ids[None]).logits[0] / temperature
    expected = logits.log_softmax(-1)[micro.predictors]
    logprobs = expected.gather(-1, micro.targets[:, None]).squeeze(-1)
    torch.testing.assert_close(ours.logprobs, logprobs)
    entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(ours.entropy, entropy)


KEPT = [[2, 7], [1], list(range(15)), [4, 3, 14]]  # each with other ids than the target alone


def kept_and_plain() -> tuple[list[Rollout], list[list[Any]]]:
    """Rollouts of which the first two groups say what was kept, and those sets for each target."""
    rollouts, sets = [], []
    for one in ragged_rollouts():
        kept = [[token, *KEPT[i % 4]] for i, token in enumerate(one.completion_ids)]
        named = one.group != "g2"
        rollouts.append(replace(one, kept_ids=kept_ids.encode(kept) if named else None))
        sets += kept if named else [range(15)] * len(kept)
    return rollouts, sets


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("early", [0, 2])
def test_scores_are_the_log_softmax_over_the_ids_kept(temperature: float, early: int) -> None:
    """In float64: log-probability, entropy, lse and the gradient of a weighted sum, by hand."""
    barred = {3, 11}
    policy = Policy(tiny_policy().model, barred)
    rollouts, sets = kept_and_plain()
    (micro,) = pack(rollouts, token_budget=1000, share_prompts=True, min_new_tokens=early)
    hidden = policy.hidden_states(micro)[micro.predictors]
    logits = policy.model.lm_head(hidden) / temperature
    places = torch.cat([torch.arange(n) for n in micro.cu_seqlens.diff().tolist()])
    tokens = [(sets[i], places[i] < early and len(sets[i]) == 15) for i in range(len(sets))]
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for row, (kept, first) in enumerate(tokens):
        allowed[row, torch.tensor(list(kept))] = True
        if first and isinstance(kept, range):
            allowed[row, torch.tensor(sorted(barred))] = False
    assert bool(allowed.all()) is False
    expected = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    logprobs = expected.gather(-1, micro.targets[:, None])[:, 0]
    outside = micro.targets[:, None] == torch.tensor(sorted(barred))
    sound = logprobs.isfinite()
    assert bool((~sound <= outside.any(1)).all())
    ours = policy(micro, temperature)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(ours.logprobs, logprobs, **exact)
    entropy = -(expected.exp() * expected.clamp_min(-1e30)).sum(-1)
    torch.testing.assert_close(ours.entropy, entropy, **exact)
    lse = logits.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(ours.lse, lse, **exact)

    coefficients = torch.randn(len(logprobs), dtype=torch.float64).where(sound, 0.0)
    wanted = (coefficients * logprobs.where(sound, 0.0)).sum()
    total = policy(micro, temperature, coefficients, ours.lse.detach())
    torch.testing.assert_close(total, wanted, **exact)
    parameters = list(policy.parameters())
    found = torch.autograd.grad(total, parameters)
    for a, b in zip(found, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("early", [0, 2])
@pytest.mark.parametrize("which", [[0, 3, 4, 8], []])
def test_completions_not_predicted_are_as_those_with_coefficient_0(
    which: list[int], early: int, dtype: torch.dtype
) -> None:
    """Bitwise."""
    policy = Policy(tiny_policy(dtype=dtype).model, {3, 11})
    rollouts, _ = kept_and_plain()
    (micro,) = pack(rollouts, token_budget=1000, share_prompts=True, min_new_tokens=early)
    scores = policy(micro)
    some = torch.zeros(len(micro.rows), dtype=torch.bool)
    some[which] = True
    part, places = micro.predicting(some)
    assert part.rows.tolist() == which
    assert torch.equal(part.token_rows(), micro.token_rows()[places])
    assert part.cu_seqlens.dtype == micro.cu_seqlens.dtype
    coefficients = torch.randn(len(micro.targets), dtype=dtype).where(scores.logprobs > -9e9, 0.0)
    lse = scores.lse.detach()
    ours = policy(part, 1.0, coefficients[places], lse[places])
    theirs = policy(micro, 1.0, coefficients * some[micro.token_rows()], lse)
    parameters = list(policy.parameters())
    found, expected = (torch.autograd.grad(total, parameters) for total in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(gradient.any() for gradient in found) == bool(which)


def test_without_kept_ids_or_first_tokens_the_head_is_called_as_ever() -> None:
    (micro,) = pack(ragged_rollouts(), token_budget=1000, share_prompts=True)
    assert micro.kept_ids is None and micro.early is None
    policy = tiny_policy(dtype=torch.float32)
    every = [
        replace(r, kept_ids=kept_ids.encode([range(15)] * len(r.completion_ids)))
        for r in ragged_rollouts()
    ]
    (whole,) = pack(every, token_budget=1000, share_prompts=True)
    torch.testing.assert_close(policy(whole).logprobs, policy(micro).logprobs)


def test_softcapped_head_has_no_first_tokens_of_their_own() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5))
    with pytest.raises(ValueError, match="min_new_tokens: expected 0 for a head with a softcap"):
        Policy(model, {1})


def test_flash_attention_is_told_where_sequences_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what its variable-length kernel computes in its place, a sequence at a time."""

    def varlen(
        _module: Any,
        query: torch.Tensor,  # (1, heads, L, D / heads)
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None
        bounds = kwargs["cu_seq_lens_q"]
        assert bounds.dtype == torch.int32 and torch.equal(bounds, kwargs["cu_seq_lens_k"])
        lengths = bounds.diff().tolist()
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths)
        calls.append(lengths)
        copies = query.shape[1] // key.shape[1]
        whole = (query, *(part.repeat_interleave(copies, 1) for part in (key, value)))
        alone = zip(*(part.split(lengths, dim=2) for part in whole), strict=True)
        scale = kwargs["scaling"]
        outputs = [scaled_dot_product_attention(*a, is_causal=True, scale=scale) for a in alone]
        return torch.cat(outputs, 2).transpose(1, 2), None

    calls: list[list[int]] = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    policy, other = tiny_policy(), tiny_policy()
    other.model.config._attn_implementation = "flash_attention_2"
    (micro,) = pack(ragged_rollouts(), token_budget=1000, share_prompts=False)
    expected, found = policy(micro).logprobs, other(micro).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == policy.model.config.num_hidden_layers and len(calls[0]) == 9


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scaled_head_gives_the_models_own_distribution_and_gradients(temperature: float) -> None:
    model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.1)).eval()
    (micro,) = pack(ragged_rollouts()[:1], token_budget=100, share_prompts=False)
    policy = Policy(model)
    ours = policy(micro, temperature)
    logits = model(input_ids=micro.input_ids[None]).logits[0] / temperature
    logprobs = logits.log_softmax(-1)[micro.predictors].gather(-1, micro.targets[:, None])[:, 0]
    torch.testing.assert_close(ours.logprobs, logprobs)
    torch.testing.assert_close(ours.lse, logits.logsumexp(-1)[micro.predictors])
    total = policy(micro, temperature, torch.ones_like(logprobs), ours.lse.detach())
    parameters = list(model.parameters())
    found = torch.autograd.grad(total, parameters)
    for a, b in zip(found, torch.autograd.grad(logprobs.sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_head_in_float32_multiplies_in_it_under_autocast() -> None:
    config = TrainConfig(head_dtype="float32")
    policy = tiny_policy(dtype=torch.float32)
    load.prepare(policy.model, config)
    policy.model.to(torch.bfloat16)
    (micro,) = pack(ragged_rollouts(), token_budget=1000, share_prompts=True)
    weight = policy.model.get_output_embeddings().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = policy.hidden_states(micro)[micro.predictors]
        ours = policy(micro)
        generated = policy.model(input_ids=micro.input_ids[None]).logits
    logits = hidden.float() @ weight.float().T
    expected = logits.log_softmax(-1).gather(-1, micro.targets[:, None])[:, 0]
    torch.testing.assert_close(ours.logprobs, expected, rtol=1e-5, atol=1e-5)
    assert hidden.dtype == weight.dtype == torch.bfloat16 and generated.dtype == torch.float32


def test_a_reference_takes_the_form_of_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)
    policy, base = Policy(Gemma2ForCausalLM(config)), Gemma2ForCausalLM(config)
    monkeypatch.setattr(base, "forward", None)  # it is not run
    assert Policy(base, (), policy.form).form == policy.form
    base.config.final_logit_softcapping = 0.7
    with pytest.raises(Refusal, match="model: expected a configuration with"):
        Policy(base, (), policy.form)


def test_logits_that_are_no_heads_are_refused() -> None:
    model = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).eval()
    with pytest.raises(Refusal, match="model: expected logits that are lm_head.*differ.* up to"):
        Policy(model)


def bart() -> PreTrainedModel:
    layers = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = BartConfig(vocab_size=15, d_model=32, **layers, is_decoder=True, **BART_IDS)
    return AutoModelForCausalLM.from_config(config).eval()


def opt() -> PreTrainedModel:
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "vocab_size": 15}
    return OPTForCausalLM(OPTConfig(**sizes, **SIZES, attention_dropout=0.5)).train()


def mamba() -> PreTrainedModel:
    sizes = {"vocab_size": 15, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def jamba() -> PreTrainedModel:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4}
    config = JambaConfig(**SMALL, **layers, num_experts=2, use_mamba_kernels=False)
    return JambaForCausalLM(config).eval()


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=15, intermediate_size=48, **SIZES)).eval()


def mixtral() -> PreTrainedModel:
    sizes = {**SMALL, "num_local_experts": 4, "sliding_window": 3, "max_position_embeddings": 24}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def qwen3_moe() -> PreTrainedModel:
    """Its pad, whose embedding is zero, is the first token that is read, and sees itself alone."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**SMALL, **experts, head_dim=8, pad_token_id=10)
    return Qwen3MoeForCausalLM(config).eval()


def mpt() -> PreTrainedModel:
    """Its ALiBi goes by where a token stands; a sequence that is whole behind another does not
    notice, a completion that is not next to its prompt does."""
    return MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=15)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [opt, neox, mixtral, qwen3_moe])
def test_models_that_go_by_position_ids_are_served(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    assert Policy(make().to(dtype)).form == ModelHead()


def test_a_model_that_goes_by_places_inside_a_sequence_does_not_share_prompts() -> None:
    torch.manual_seed(0)
    with pytest.raises(Refusal, match="^share_prompts: expected a model .*MptFor.*share_prompts=f"):
        Policy(mpt())
    Policy(mpt(), share_prompts=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLEX])
def test_a_model_that_goes_by_position_ids_is_served_and_left_as_it_was(attention: str) -> None:
    model = opt()
    model.config._attn_implementation = attention
    before = torch.get_rng_state()
    assert Policy(model).form == ModelHead()
    assert model.config._attn_implementation == attention
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLEX])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_position_ids_is_refused(attention: str, dtype: torch.dtype) -> None:
    model = bart().to(dtype)
    model.config._attn_implementation = attention
    with pytest.raises(Refusal, match="^model: expected one that goes by position_ids.*BartFor"):
        Policy(model)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (mamba, "takes sequences packed .* MambaForCausalLM, which raises RuntimeError"),
        (jamba, "goes by position_ids .* JambaForCausalLM, .* carries a state from one"),
    ],
)
def test_a_model_that_carries_a_state_is_refused(
    make: Callable[[], PreTrainedModel], words: str
) -> None:
    """Its state goes from one packed sequence into the next."""
    torch.manual_seed(0)
    with pytest.raises(Refusal, match=f"^model: expected one that {words}"):
        Policy(make())


BART_IDS = {
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "is_encoder_decoder": False,
    "max_position_embeddings": 64,
}


def test_fingerprint_tells_weights_apart() -> None:
    one, same, other = (tiny_policy(seed).model for seed in (0, 0, 1))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_identity_is_of_every_weight_and_of_the_configuration() -> None:
    one, same, weight, rope = (tiny_policy().model for _ in range(4))
    next(weight.parameters()).data.flatten()[1] += 1e-3  # which the sampled fingerprint passes over
    rope.config.rope_parameters["rope_theta"] *= 2
    same.config._name_or_path = "elsewhere"
    assert identity(one) == identity(same)
    assert len({identity(model) for model in (one, weight, rope)}) == 3


def test_medium_precision_is_for_cpus_where_it_stays_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "_has_amx", lambda: True)
    before = torch.get_float32_matmul_precision()
    try:
        assert set_matmul_precision("auto") == "highest"
        assert set_matmul_precision("medium") == torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_smollm2_trains_on_math_from_its_gguf_file(tmp_path: Path) -> None:
    """The real model and its real vocabulary, one step of the shipped configuration cut short."""
    rows = [
        {"problem": f"Compute ${i} + 1$.", "solution": rf"It is $\boxed{{{i + 1}}}$."}
        for i in range(6)
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["steps=1", "prompts_per_step=2", "num_generations=2", "max_completion_length=24"]
    arguments = [f"data={tmp_path / 'math.jsonl'}", f"output_dir={tmp_path / 'run'}"]
    assert main(["train", "smollm2-math", *arguments, *short, "eval_prompts=1", "beta=0.1"]) == 0
    (row,) = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    assert row["kl"] == 0.0 and not row["skipped"] and row["groups"] == 2
    assert 0.5 < row["entropy"] < 5  # nats: a language model that knows what it says
    texts = [r["completion"] for r in read_jsonl(tmp_path / "run/rollouts/step-000001.jsonl")]
    assert all(text.isprintable() or "\n" in text for text in texts) and any(texts)


def test_layers_are_found_whatever_they_are_called() -> None:
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99))
        of_opt = OPTConfig(word_embed_proj_dim=32, ffn_dim=48, vocab_size=99, **SIZES)
        opt = OPTForCausalLM(of_opt)
    assert layers_of(gpt2) is gpt2.transformer.h
    assert layers_of(opt) is opt.model.decoder.layers
    gpt2.config.num_hidden_layers = 3
    with pytest.raises(Refusal, match=r"expected one with a list of its 3 layers, got GPT2LMHead"):
        layers_of(gpt2)
