"""Weights read from their files by rows are those of the model that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM, PreTrainedModel

from agro_train.config import TrainConfig
from agro_train.policy import tiny
from agro_train.policy.load import Loaded, fingerprint, identity, load_model, load_unread
from agro_train.policy.policy import Policy, shard
from agro_train.policy.shards import Weights, allocate, fill, local_rows, why_not
from tests.train.models import save_llama3_miniature

CPU = torch.device("cpu")


def save_tied(folder: Path) -> Path:
    config = tiny.build_config(15)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def unread(folder: Path) -> Loaded:
    return load_unread(str(folder), TrainConfig(fsdp=True), lambda text: pytest.fail(text))


@pytest.mark.parametrize("save", [save_llama3_miniature, save_tied], ids=["llama3", "tied"])
def test_model_that_is_filled_from_its_files_is_the_one_that_transformers_loads(
    save: object, tmp_path: Path
) -> None:
    assert callable(save)
    folder = save(tmp_path / "model")
    whole = load_model(str(folder), TrainConfig())
    model, weights = unread(folder)
    assert weights is not None and all(p.is_meta for p in model.parameters())
    assert fingerprint(model, weights) == fingerprint(whole)
    assert identity(model, weights) == identity(whole)
    allocate(model, CPU)
    fill(model, weights)
    assert identity(model) == identity(whole)  # weights and buffers, to the last bit
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    tied = [m.get_input_embeddings().weight is m.lm_head.weight for m in (model, whole)]
    assert tied == [save is save_tied] * 2
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("group_of_one")
def test_tied_weights_stay_one_in_shards(tmp_path: Path) -> None:
    folder = save_tied(tmp_path / "model")
    model, weights = unread(folder)
    assert weights is not None
    policy = Policy(model)
    shard(policy, "no", init_device_mesh("cpu", (1,)))
    allocate(policy, CPU)
    fill(policy.model, weights)
    whole, ids = load_model(str(folder), TrainConfig()), torch.arange(3, 13)[None]
    ours = policy(lambda inner: inner(ids).logits)
    assert torch.equal(ours, whole(ids).logits)
    ours.square().sum().backward()
    whole(ids).logits.square().sum().backward()
    tied = policy.model.lm_head.weight
    assert tied is policy.model.get_input_embeddings().weight
    torch.testing.assert_close(tied.grad.full_tensor(), whole.lm_head.weight.grad)


def test_files_in_another_precision_are_rounded_as_transformers_does(tmp_path: Path) -> None:
    folder = save_llama3_miniature(tmp_path / "model")
    config = TrainConfig(dtype="bfloat16", fsdp=True)
    model, weights = load_unread(str(folder), config, lambda text: pytest.fail(text))
    assert weights is not None
    whole = load_model(str(folder), config)
    assert identity(model, weights) == identity(whole)
    assert fingerprint(model, weights) == fingerprint(whole)


def renamed(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    weights["head.weight"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "expected lm_head.weight in its files, got no such weight"


def quantised(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    return "its weights are quantised"


def pickled(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return "expected model.safetensors, got none"


@pytest.mark.parametrize("change", [renamed, quantised, pickled])
def test_what_transformers_has_to_load_itself_is_loaded_whole_and_said(
    change: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(change)
    folder = save_llama3_miniature(tmp_path / "model")
    reason, said, asked = change(folder), list[str](), list[str]()

    def whole(source: str, config: TrainConfig) -> PreTrainedModel:
        asked.append(source)
        return tiny.build_model(15, 0)

    monkeypatch.setattr("agro_train.policy.load.load_model", whole)
    assert load_unread(str(folder), TrainConfig(fsdp=True), said.append).unread is None
    assert asked == [str(folder)] and said == [
        f"model: every process loads {folder} whole before it is sharded: {reason}"
    ]


def in_pieces(folder: Path, tensor: torch.Tensor, ends: list[int]) -> list[Path]:
    """Files as the ranks of a sharded run write them, one for each piece."""
    files = []
    for first, end in zip([0, *ends], ends, strict=False):
        places = {"w": {"saved_offsets": [first] + [0] * (tensor.dim() - 1)}}
        files.append(folder / f"{end}.safetensors")
        save_file({"w": tensor[first:end]}, files[-1], {"DCP_SHARDING_INFO": json.dumps(places)})
    return files


def test_pieces_are_put_together_and_a_missing_one_is_seen(tmp_path: Path) -> None:
    tensor = torch.arange(14.0).reshape(7, 2)
    files = in_pieces(tmp_path, tensor, [3, 5, 7])
    weights = Weights(files[::-1])
    assert torch.equal(weights.whole("w"), tensor)
    target = torch.zeros(7, 2, dtype=torch.float64)
    weights.read("w", target)
    assert torch.equal(target, tensor.double()) and local_rows(target) == (target, 0)
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(tensor)
    assert why_not(module, weights) is None
    for kept, found in (
        ([0, 2], "one with rows missing"),
        ([1, 2], "one with rows missing"),
        ([0, 1], "(5, 2)"),
    ):
        reason = why_not(module, Weights([files[i] for i in kept]))
        assert reason == f"expected w of shape (7, 2) in its files, got {found}"
