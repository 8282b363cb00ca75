"""Stages of a plan: what is sharded, what is whole, what an adapter or an engine changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2Config

from agro_train.config import TrainConfig
from agro_train.plan.advice import first_change, fits
from agro_train.plan.machine import Machine
from agro_train.plan.memory import Plan, cache_bytes, plan, product_bytes, weigh
from agro_train.policy import tiny
from agro_train.refusal import Refusal

CONFIG = TrainConfig(model="tiny", max_prompt_length=8, max_completion_length=9)
SMALL = tiny.build_config(15)
COUNT = sum(p.numel() for p in tiny.build_model(15, seed=0).parameters())


def parts(planned: Plan, name: str) -> dict[str, float]:
    (stage,) = [stage for stage in planned.stages if stage.name == name]
    found = {part.name: part.bytes for part in stage.parts}
    assert stage.total == sum(found.values())
    return found


def planned(config: TrainConfig, **machine: Any) -> Plan:
    return plan(config, Machine(**{"gpus": 1, "gpu": "h100", **machine}), SMALL)


def test_one_gpu_holds_all_of_it() -> None:
    update = parts(planned(CONFIG), "update")
    assert update["weights"] == update["reference"] == update["gradients"] == 4 * COUNT
    assert update["moments"] == 8 * COUNT
    assert "gradients on their way" not in update


def test_replicas_hold_their_gradients_twice_and_shards_a_share() -> None:
    replicated = parts(planned(CONFIG, gpus=4), "update")
    assert replicated["weights"] == replicated["gradients on their way"] == 4 * COUNT
    sharded = parts(planned(replace(CONFIG, fsdp=True), gpus=4), "update")
    assert sharded["weights"] == sharded["gradients"] == COUNT
    assert sharded["moments"] == 2 * COUNT
    sampling = parts(planned(replace(CONFIG, fsdp=True), gpus=4), "sampling")
    assert sampling["gathered weights"] == 4 * COUNT
    low = replace(CONFIG, fsdp=True, mixed_precision="bf16")
    assert parts(planned(low, gpus=4), "sampling")["gathered weights"] == 2 * COUNT


def test_what_is_read_in_shards_is_never_whole_in_the_hosts_memory() -> None:
    stored = replace(CONFIG, model="some/model")
    whole, sharded = planned(stored, gpus=4), planned(replace(stored, fsdp=True), gpus=4)
    assert whole.host_start == 4 * 2 * 4 * COUNT  # policy and reference in each of four processes
    assert whole.host_checkpoint == whole.checkpoint == 12 * COUNT
    assert sharded.host_start == 4 * sharded.weights.largest < 4 * COUNT
    assert sharded.host_checkpoint == sharded.checkpoint == 12 * COUNT  # all processes are on it
    assert (whole.in_shards, sharded.in_shards) == (False, True)
    two_nodes = planned(replace(stored, fsdp=True), gpus=4, gpus_per_node=2)
    assert two_nodes.host_checkpoint == 12 * COUNT / 2
    adapter = planned(replace(stored, fsdp=True, use_peft=True), gpus=4)
    assert adapter.host_start == 4 * adapter.weights.whole and not adapter.in_shards


def test_what_is_in_no_safetensors_files_is_loaded_whole_by_each_process(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    sharded = replace(CONFIG, fsdp=True)
    for model, whole in (
        ("tiny", True),
        ("smollm2", True),
        ("weights/model.gguf", True),
        (str(tmp_path), False),  # which a plan needs no weights of
    ):
        found = planned(replace(sharded, model=model), gpus=4)
        assert found.host_start == 4 * (8 * COUNT if whole else found.weights.largest), model
        assert found.in_shards and found.host_checkpoint == 12 * COUNT  # written in shards anyway
    (tmp_path / "pytorch_model.bin").touch()
    assert planned(replace(sharded, model=str(tmp_path)), gpus=4).host_start == 4 * 8 * COUNT
    (tmp_path / "model.safetensors").touch()
    assert planned(replace(sharded, model=str(tmp_path)), gpus=4).host_start < 4 * 8 * COUNT
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    assert planned(replace(sharded, model=str(tmp_path)), gpus=4).host_start == 4 * 8 * COUNT


def test_an_adapter_needs_no_reference_and_moments_of_itself_alone() -> None:
    config = replace(CONFIG, use_peft=True, dtype="bfloat16")
    found = planned(config)
    update, trained = parts(found, "update"), found.weights.trained_count
    assert "reference" not in update
    assert update["weights"] == 2 * COUNT + 4 * trained
    assert update["moments"] == 8 * trained
    assert found.checkpoint == 12 * trained


def test_layers_that_are_called_otherwise_are_weighed() -> None:
    gpt2 = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=40, n_positions=64)
    weights = weigh(gpt2, CONFIG)
    layer = 12 * 32**2 + 13 * 32
    assert weights.layer == 4 * layer
    assert weights.root == 4 * ((40 + 64) * 32 + 2 * 32)
    assert weights.linear_count == 3 * 12 * 32**2
    assert weights.whole == 3 * weights.layer + weights.root


@pytest.mark.parametrize(
    ("settings", "size"),
    [({}, 4), ({"mixed_precision": "bf16"}, 2), ({"dtype": "bfloat16"}, 2)],
)
def test_products_are_in_two_bytes_by_either_setting(settings: dict[str, Any], size: int) -> None:
    assert product_bytes(replace(CONFIG, **settings)) == size


def test_the_key_value_cache_is_transformers_own() -> None:
    model = tiny.build_model(15, seed=0)
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 12, dtype=torch.int64), past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(SMALL, 12, itemsize=4) == real


def test_who_samples_decides_what_sampling_takes() -> None:
    server = replace(CONFIG, use_vllm=True, vllm_mode="server")
    assert planned(server).cache_rows == 0
    colocated = replace(CONFIG, use_vllm=True)
    assert parts(planned(colocated), "update")["vLLM"] == 0.3 * 80e9
    ahead = planned(replace(CONFIG, max_staleness=2))
    assert parts(ahead, "update")["sampling process"] > 4 * COUNT
    assert ahead.sent == 2 * 4 * COUNT


@pytest.mark.parametrize(
    ("settings", "machine", "words"),
    [
        ({}, {"gpus": 12}, "gpus: expected a multiple of gpus_per_node=8, got 12"),
        ({"prompts_per_step": 3}, {"gpus": 4}, "prompts_per_step: expected one for each of 4"),
        (
            {"use_vllm": True, "vllm_tensor_parallel_size": 4},
            {"gpus": 2},
            "vllm_tensor_parallel_size: expected a divisor of the launch's 2 processes",
        ),
        (
            {"use_vllm": True, "vllm_tensor_parallel_size": 3},
            {},
            "vllm_tensor_parallel_size: expected a divisor of the model's 4 attention heads, got 3",
        ),
    ],
)
def test_a_launch_that_cannot_be_is_one_sentence(
    settings: dict[str, Any], machine: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refusal, match=words):
        planned(replace(CONFIG, **settings), **machine)


def test_the_first_change_saves_what_it_says() -> None:
    config = replace(CONFIG, token_budget=256, generation_batch_size=8)
    machine = Machine(gpus=1, gpu="cpu")
    peak = plan(config, machine, SMALL).peak
    tight = replace(machine, memory=(peak - 1) / 1e9)
    found = plan(config, tight, SMALL)
    assert not fits(found, tight)
    change = first_change(config, tight, SMALL, found)
    assert change is not None and change.fits
    assert change.settings == "gradient_checkpointing=true"
    now = plan(replace(config, gradient_checkpointing=True), tight, SMALL)
    assert change.saves == peak - now.peak > 0
    hopeless = replace(machine, memory=1e-6)
    change = first_change(config, hopeless, SMALL, found)
    assert change is not None and not change.fits and change.saves > 0
