"""LoRA: an adapter is all that is trained, and switched off it is the reference."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.config import load as load_config
from agro_train.data.rows import read_jsonl
from agro_train.models import place_on_devices
from agro_train.policy.adapter import (
    AdapterOff,
    adapter_off,
    add_adapter,
    base_name,
    has_adapter,
    merged_weights,
    save,
)
from agro_train.policy.load import check_4bit, load_model
from agro_train.refusal import Refusal
from agro_train.step import score_batch
from tests.calls import Calls
from tests.train.gradients import LORA, assert_equal, gradient_of, lora_policy, ragged_batch
from tests.train.models import save_llama3_miniature, tiny_policy

pytestmark = pytest.mark.usefixtures("no_curves")


def adapter_names(policy: nn.Module) -> set[str]:
    return {name for name, _ in policy.named_parameters() if ".lora_" in name}


def test_only_the_adapter_trains() -> None:
    policy = lora_policy()
    names = adapter_names(policy)
    layers = policy.model.config.num_hidden_layers
    assert len(names) == 2 * 7 * layers  # A and B of seven products a layer, none of the head
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == names
    batch = ragged_batch(token_budget=30)
    change, metrics = gradient_of(policy, AdapterOff(policy), batch, LORA)
    assert {name for name, delta in change.items() if delta.any()} == names
    assert metrics["kl"] != 0.0


def test_gradient_is_that_of_the_plain_model_with_the_same_weights() -> None:
    """For W + s B A, the chain rule: dB = s dW A^T and dA = s B^T dW, with dW of full training."""
    policy = lora_policy()
    batch = ragged_batch(token_budget=30)
    plain = tiny_policy()
    plain.model.load_state_dict(dict(merged_weights(policy.model)), strict=False)
    whole, _ = gradient_of(plain, tiny_policy().requires_grad_(False), batch)
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    ours, _ = gradient_of(policy, AdapterOff(policy), batch, LORA)
    expected = {}
    for name in adapter_names(policy):
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            dense = whole[name.replace(".lora_A.default", "")]
            expected[name] = 2.0 * weights[other].T @ dense
            expected[other] = 2.0 * dense @ weights[name].T
    assert expected.keys() == adapter_names(policy)
    assert_equal(ours, expected, tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_log_ratio_is_exactly_zero_before_the_first_step(dtype: torch.dtype) -> None:
    policy = lora_policy(dtype=dtype, trained=False)
    batch = ragged_batch(token_budget=20)
    off = AdapterOff(policy)
    scores, _ = score_batch(policy, off, batch, batch.micro, LORA, torch.device("cpu"))
    assert scores.logprobs.all() and torch.equal(scores.logprobs, scores.ref_logprobs)


def test_log_ratio_is_exactly_zero_under_autocast() -> None:
    config = replace(LORA, mixed_precision="bf16")
    model = lora_policy(dtype=torch.float32, trained=False).model
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    policy, reference = place_on_devices(model, model, config, accelerator)
    batch = ragged_batch(token_budget=20)
    scores, _ = score_batch(policy, reference, batch, batch.micro, config, accelerator.device)
    assert scores.logprobs.all() and torch.equal(scores.logprobs, scores.ref_logprobs)


def test_reference_is_the_model_without_the_adapter_and_owns_no_weights() -> None:
    policy = lora_policy()
    base = tiny_policy()
    reference = AdapterOff(policy)
    owned = {p.data_ptr() for p in policy.parameters()}
    assert {p.data_ptr() for p in reference.parameters()} == owned
    batch = ragged_batch(token_budget=20)
    with torch.no_grad():
        for micro in batch.micro:
            expected = base(micro).logprobs
            assert torch.equal(reference(micro).logprobs, expected)
            assert not torch.equal(policy(micro).logprobs, expected)
    with pytest.raises(AssertionError, match="without gradients"):
        reference(batch.micro[0])


def test_switch_leaves_no_trace_when_a_pass_fails() -> None:
    policy = lora_policy()
    micro = ragged_batch(token_budget=20).micro[0]
    before = policy(micro).logprobs
    with pytest.raises(RuntimeError, match="stop"), adapter_off(policy):
        raise RuntimeError("stop")
    assert torch.equal(policy(micro).logprobs, before)
    assert all(p.requires_grad for n, p in policy.named_parameters() if ".lora_" in n)


def test_setup_keeps_one_copy_of_the_weights() -> None:
    """The run's policy and reference together hold the model once."""
    model = tiny_policy(dtype=torch.float32).model
    size = sum(p.numel() for p in model.parameters())
    add_adapter(model, LORA, None)
    policy, reference = place_on_devices(model, model, LORA, Accelerator(cpu=True))
    held = {p.data_ptr(): p.numel() for m in (policy, reference) for p in m.parameters()}
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(held.values()) == size + adapters and 0 < adapters < size / 2


def test_frozen_head_computes_no_weight_gradient() -> None:
    policy = lora_policy()
    with Calls("linear_logprobs_bwd") as calls:
        gradient_of(policy, AdapterOff(policy), ragged_batch(token_budget=1000), LORA)
    asked = [arguments[-3] for arguments in calls.arguments]  # before the kept logits
    assert asked == [[True, False, False]]  # of hidden states, weight, bias


def test_no_dropout_anywhere() -> None:
    policy = lora_policy().train()
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for m in policy.modules())
    micro = ragged_batch(token_budget=1000).micro[0]
    assert torch.equal(policy(micro).logprobs, policy(micro).logprobs)


def test_gradient_checkpointing_changes_no_bit() -> None:
    batch = ragged_batch(token_budget=30)
    plain = lora_policy()
    expected, _ = gradient_of(plain, AdapterOff(plain), batch, LORA)
    policy = lora_policy()
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    config = replace(LORA, gradient_checkpointing=True)
    ours, _ = gradient_of(policy, AdapterOff(policy), batch, config)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_adapter_of_a_bfloat16_model_is_float32_and_moves_by_small_steps() -> None:
    policy = lora_policy(dtype=torch.bfloat16)
    dtypes = {n: p.dtype for n, p in policy.named_parameters()}
    assert {dtypes[n] for n in adapter_names(policy)} == {torch.float32}
    assert {t for n, t in dtypes.items() if ".lora_" not in n} == {torch.bfloat16}
    change, _ = gradient_of(policy, AdapterOff(policy), ragged_batch(token_budget=30), LORA)
    assert all(change[n].any() and change[n].isfinite().all() for n in adapter_names(policy))


def test_same_seed_gives_the_same_adapter_whatever_was_drawn_before() -> None:
    one = lora_policy(trained=False)
    torch.randn(3)
    other, third = lora_policy(trained=False), lora_policy(replace(LORA, seed=1), trained=False)
    a = "model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    weights = [dict(p.named_parameters())[a] for p in (one, other, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nope"], "lora_target_modules: expected names of linear layers, got .'nope'.: Target"),
        (["q_proj", "embed_tokens"], "lora_target_modules: .* covers the input embeddings"),
        (
            ["norm"],
            "lora_target_modules: expected names of linear layers, got .'norm'.: .*not supported",
        ),
    ],
)
def test_targets_that_cannot_work_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_policy(replace(LORA, lora_target_modules=targets))


def test_adapter_on_the_head_trains_saves_and_loads(tmp_path: Path) -> None:
    """In float64, against the model's own logits with peft's forward."""
    config = replace(LORA, lora_target_modules=["q_proj", "lm_head"])
    policy = lora_policy(config)
    micro = ragged_batch(token_budget=1000).micro[0]
    hidden = policy.hidden_states(micro)[micro.predictors]
    logprobs_all = policy.model.lm_head(hidden).log_softmax(-1)
    expected = logprobs_all.gather(-1, micro.targets[:, None])[:, 0]
    results = policy(micro)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(results.logprobs, expected, **exact)
    adapter = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert sum("lm_head.lora" in name for name in adapter) == 2
    total = policy(micro, 1.0, torch.ones_like(expected), results.lse.detach())
    found = torch.autograd.grad(total, list(adapter.values()))
    wanted = torch.autograd.grad(expected.sum(), list(adapter.values()))
    for name, a, b in zip(adapter, found, wanted, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
    save(policy.model, tmp_path, policy.model.state_dict())
    again = tiny_policy()
    add_adapter(again.model, config, tmp_path)
    torch.testing.assert_close(again(micro).logprobs, results.logprobs, rtol=1e-5, atol=1e-6)
    plain = tiny_policy()
    plain.model.load_state_dict(dict(merged_weights(policy.model)), strict=False)
    torch.testing.assert_close(plain(micro).logprobs, results.logprobs, **exact)


def test_adapter_on_the_head_changes_no_bit_before_the_first_step() -> None:
    config = replace(LORA, lora_target_modules=["lm_head"])
    policy = lora_policy(config, dtype=torch.float32, trained=False)
    micro = ragged_batch(token_budget=1000).micro[0]
    with torch.no_grad():
        assert torch.equal(policy(micro).logprobs, AdapterOff(policy)(micro).logprobs)


def test_adapter_on_a_tied_head_is_refused() -> None:
    model = tiny_policy().model
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(Refusal, match="model that ties the two, got .*merged into one would"):
        add_adapter(model, replace(LORA, lora_target_modules=["lm_head"]), None)


def test_settings_that_cannot_work_are_refused() -> None:
    for change, message in (
        ({"lora_r": 0}, "lora_r: expected at least 1, got 0"),
        ({"lora_target_modules": []}, "lora_target_modules: expected all-linear or names"),
        ({"fsdp": True, "dtype": "bfloat16"}, "dtype: expected float32 with use_peft and fsdp"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(LORA, **change).check()  # type: ignore[arg-type]


# Whole runs.

SHORT = """
    use_peft=true lora_r=4 lora_target_modules=[q_proj,v_proj,down_proj]
    reward=tests.train.reward_functions:even_share prompts_per_step=2 num_generations=3
    max_completion_length=8 learning_rate=0.01 warmup_steps=0 lr_scheduler_type=constant
    save_every=1 eval_every=2 eval_prompts=4
""".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama3_miniature(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the miniature of Llama-3."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = [f"model={base}", f"output_dir={folder}", "steps=2", *SHORT]
    assert main(["train", "tiny-arithmetic", *arguments]) == 0
    return folder


def test_run_starts_at_the_reference_and_moves_away(finished: Path) -> None:
    first, second = (r for r in read_jsonl(finished / "metrics.jsonl") if "reward" in r)
    assert first["kl"] == 0.0 and first["agro/logratio_abs_max"] == 0.0
    assert second["kl"] != 0.0 and first["grad_norm"] > 0


def test_checkpoint_is_an_adapter_that_peft_loads(finished: Path, base: Path) -> None:
    folder = finished / "checkpoint-2"
    assert not (folder / "model.safetensors").exists()
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base) and saved["r"] == 4
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(2, 30)[None]
    before = plain(ids).logits
    with warnings.catch_warnings():  # peft asks transformers by a name that is to go
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), str(folder)).eval()
    ours = load_model(str(folder), TrainConfig())
    assert not has_adapter(ours)
    with torch.no_grad():
        logits = theirs(ids).logits
        assert not torch.allclose(logits, before, atol=1e-3)
        torch.testing.assert_close(ours(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_resumed_run_is_bitwise_that_of_an_uninterrupted_one(
    finished: Path, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [f"model={base}", f"output_dir={folder}", "steps=1", *SHORT]
    assert main(["train", "tiny-arithmetic", *arguments]) == 0
    assert main(["train", "--resume", str(folder), "steps=2"]) == 0
    ours, theirs = (
        load_file(f / "checkpoint-2" / "adapter_model.safetensors") for f in (folder, finished)
    )
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 3 * 2
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moments, expected = (
        torch.load(f / "checkpoint-2" / "optimizer.pt", weights_only=True)["optimizer"]
        for f in (folder, finished)
    )
    torch.testing.assert_close(moments["state"], expected["state"], rtol=0, atol=0)


def test_checkpoint_of_another_adapter_is_refused(finished: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="--resume: expected an adapter of lora_r=4 on .'o_proj'."):
        config = replace(LORA, lora_target_modules=["o_proj"])
        add_adapter(model, config, finished / "checkpoint-2")


def test_checkpoint_is_evaluated_sampled_and_trained_on(finished: Path, tmp_path: Path) -> None:
    assert main(["eval", str(finished), "eval_generations=1"]) == 0
    (results,) = finished.glob("evaluations/*/results.json")
    assert json.loads(results.read_text())["step"] == 2
    data = tmp_path / "rollouts.jsonl"
    few = [
        "num_generations=2",
        "max_completion_length=4",
        "reward=tests.train.reward_functions:even_share",
    ]
    model = f"model={finished}"
    assert (
        main(["rollout", "tiny-arithmetic", model, *few, "--output", str(data), "--prompts", "2"])
        == 0
    )
    assert {row["step"] for row in read_jsonl(data)} == {2}


def test_full_training_goes_on_from_an_adapter(finished: Path, tmp_path: Path) -> None:
    """A run's folder stands for its newest checkpoint, and the merged weights train."""
    short = [setting for setting in SHORT if not setting.startswith(("use_peft", "lora"))]
    folder = tmp_path / "full"
    arguments = [f"model={finished}", f"output_dir={folder}", "steps=1", "eval_every=0", *short]
    assert main(["train", "tiny-arithmetic", *arguments]) == 0
    assert load_config(folder / "config.yaml").model == str(finished / "checkpoint-2")
    (row,) = (row for row in read_jsonl(folder / "metrics.jsonl") if "reward" in row)
    assert row["kl"] == 0.0 and row["grad_norm"] > 0
    merged = dict(load_model(str(finished / "checkpoint-2"), TrainConfig()).named_parameters())
    trained = load_file(folder / "checkpoint-1" / "model.safetensors")
    assert trained.keys() == merged.keys()
    moved = sum(not torch.equal(trained[name], merged[name]) for name in trained)
    assert moved == len(trained)
    assert main(["train", "--resume", str(folder), "steps=2"]) == 0


def test_adapter_on_top_of_another_is_one_that_peft_loads_by_itself(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "second"
    arguments = [f"model={finished}", f"output_dir={folder}", "steps=1", "eval_every=0", *SHORT]
    assert main(["train", "tiny-arithmetic", *arguments]) == 0
    saved = json.loads((folder / "checkpoint-1" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(folder / "base_model")
    with warnings.catch_warnings():  # as above
        warnings.simplefilter("ignore", FutureWarning)
        theirs = AutoPeftModelForCausalLM.from_pretrained(str(folder / "checkpoint-1")).eval()
    ours = load_model(str(folder / "checkpoint-1"), TrainConfig())
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["train", "--resume", str(folder), "steps=2"]) == 0


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny", "base_model"),
        ("smollm2", "base_model"),
        ("some/file.gguf", "base_model"),
        ("org/name", None),
    ],
)
def test_base_of_an_adapter_has_a_name_that_transformers_loads(
    model: str, name: str | None, tmp_path: Path
) -> None:
    config = TrainConfig(model=model, output_dir=str(tmp_path))
    assert base_name(config, new=True) == (str(tmp_path / name) if name else model)
    assert base_name(config, new=False) != str(tmp_path / "base_model")  # an older run kept none
    (tmp_path / "base_model").mkdir()
    assert base_name(config, new=False) == base_name(config, new=True)


def test_adapter_on_a_4_bit_model_trains_and_resumes(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    folder = tmp_path / "run"
    short = [*SHORT, "load_in_4bit=true", "eval_every=0"]
    arguments = [f"model={base}", f"output_dir={folder}", "steps=1", *short]
    assert main(["train", "tiny-arithmetic", *arguments]) == 0
    assert main(["train", "--resume", str(folder), "steps=2"]) == 0
    first, second = read_jsonl(folder / "metrics.jsonl")
    assert first["kl"] == 0.0 and first["agro/logratio_abs_max"] == 0.0
    assert first["grad_norm"] > 0 and second["kl"] != 0.0
    weights = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
    assert len(weights) == 2 * 3 * 2 and all(weight.any() for weight in weights.values())
    quantised = load_model(str(base), TrainConfig(use_peft=True, load_in_4bit=True))
    stored = {p.dtype for n, p in quantised.named_parameters() if n.endswith("_proj.weight")}
    assert stored == {torch.uint8}
    assert quantised.lm_head.weight.dtype == torch.float32  # the fused head reads it itself
    merged = load_model(str(folder / "checkpoint-2"), TrainConfig(load_in_4bit=True))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": False}, "load_in_4bit: expected it with use_peft=true, .* got use_peft=fals"),
        ({"fsdp": True}, "load_in_4bit: expected it with .* got fsdp=true"),
        ({"use_vllm": True}, "load_in_4bit: expected it with .* got use_vllm=true"),
    ],
)
def test_4_bits_go_with_an_adapter_alone(changes: dict[str, bool], message: str) -> None:
    config = TrainConfig(load_in_4bit=True, use_peft=True)
    config.check()
    with pytest.raises(Refusal, match=message):
        replace(config, **changes).check()  # type: ignore[arg-type]


def test_4_bits_need_their_package_and_a_saved_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(load_in_4bit=True, use_peft=True, model="tiny")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refusal, match="load_in_4bit: expected the package bitsandbytes, got none"):
        check_4bit(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(Refusal, match="load_in_4bit: expected a model of a folder .*, got 'tiny'"):
        check_4bit(config)
    check_4bit(replace(config, model="org/name"))


def test_tiny_run_finds_its_base_model_where_the_run_has_gone(tmp_path: Path) -> None:
    arguments = [f"output_dir={tmp_path / 'run'}", "steps=1", "warm_start_steps=3", *SHORT]
    assert main(["train", "tiny-arithmetic", *arguments]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["eval", str(tmp_path / "moved"), "eval_prompts=2", "eval_generations=1"]) == 0
    assert main(["train", "--resume", str(tmp_path / "moved"), "steps=2"]) == 0


def test_merged_weights_are_those_of_a_plain_model_that_computes_the_same() -> None:
    policy = lora_policy()
    plain = tiny_policy()
    weights = dict(merged_weights(policy.model))
    assert weights.keys() == dict(plain.model.named_parameters()).keys()
    plain.model.load_state_dict(weights, strict=False)  # a tied head comes once
    for micro in ragged_batch(token_budget=30).micro:
        torch.testing.assert_close(
            plain(micro).logprobs, policy(micro).logprobs, rtol=1e-12, atol=1e-12
        )
    untouched = dict(merged_weights(tiny_policy().model))
    assert all(torch.equal(untouched[n], p) for n, p in tiny_policy().model.named_parameters())
