"""Who sees whom in a packed micro-batch, by every attention that runs here.

torch's flex attention has no backward pass on a CPU, and compiles to C++ there. Here it is traced
as on a GPU, and what was traced is run as it is: one graph is what would be one kernel.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.integrations import flex_attention as transformers_flex

from agro_train.cli import main
from agro_train.data.batch import pack
from agro_train.policy import attention
from agro_train.policy.attention import BLOCK, FLEX, block_mask, generating, packed_inputs, settle
from agro_train.refusal import Refusal
from agro_train.types import MicroBatch, Rollout
from tests.numerics import assert_close_to_truth
from tests.train.models import ragged_rollouts, rollout, small_run, tiny_policy

GRAPHS: list[Any] = []
# torch's own: of what it imports when it first traces, and of what it looks at to guard a graph.
IGNORED = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


def record(graph: Any, inputs: Any) -> Any:
    """A backend of torch.compile that runs what was traced as it is."""
    del inputs
    GRAPHS.append(graph)
    return graph.forward


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every graph that is traced, in a list."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "trains_flex", lambda: True)
    torch._dynamo.reset()
    GRAPHS.clear()
    with torch.compiler.set_stance("default", force_backend=record):
        yield GRAPHS
    torch._dynamo.reset()


def by_hand(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    """What `flex_attention` means, every score of it, without torch.compile."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    places = torch.arange(query.shape[2])
    pairs = (0, 0, places[:, None], places)
    scores = given["score_mod"](query @ key.mT * given["scale"], *pairs)
    return scores.masked_fill(~given["block_mask"].mask_mod(*pairs), -torch.inf).softmax(-1) @ value


def two_groups(lengths: tuple[int, ...] = (7, 4, 6, 3)) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 15, (count,), generator=generator).tolist()

    prompts = ids(9), ids(5)
    pairs = zip("aabb", lengths, strict=True)
    return [rollout(name, prompts[name == "b"], ids(n)) for name, n in pairs]


def one_micro_batch(rollouts: list[Rollout]) -> MicroBatch:
    (micro,) = pack(rollouts, token_budget=10_000, share_prompts=True)
    return micro


def whole_blocks(micro: MicroBatch) -> dict[str, Tensor]:
    """What `block_mask` takes of a micro-batch."""
    assert len(micro.input_ids) % BLOCK == 0, "the test's own lengths"
    return {
        "segments": micro.segments,
        "parents": micro.parents,
        "positions": micro.position_ids,
    }


@pytest.mark.parametrize("window", [None, 50])
def test_block_mask_says_what_the_dense_mask_says(window: int | None) -> None:
    micro = one_micro_batch(two_groups((141, 120, 101, 12)))
    first = None if window is None else micro.position_ids - (window - 1)
    found = block_mask(**whole_blocks(micro), first=first)
    attends = micro.attends(first)
    places = torch.arange(len(attends))
    assert torch.equal(found.mask_mod(0, 0, places[:, None], places), attends)
    blocks = attends.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((1, 3))
    assert torch.equal(found.to_dense()[0, 0], (blocks > 0).int())
    full = found.full_kv_num_blocks
    assert full is not None and torch.equal(full[0, 0], (blocks == BLOCK**2).sum(1).int())
    assert found.shape == (1, 1, len(attends), len(attends))


@pytest.mark.parametrize("window", [None, 50])
def test_a_block_mask_is_made_without_the_contents(window: int | None) -> None:
    """On the meta device, where whoever reads a tensor fails: on a GPU no one waits for it."""
    segments = torch.arange(4096, device="meta") // 300
    positions = torch.arange(4096, device="meta") % 300
    first = None if window is None else positions - (window - 1)
    found = block_mask(segments, segments, positions, first)
    assert found.kv_indices.shape == (1, 1, 32, 32) and found.kv_indices.is_meta


def test_a_block_mask_takes_as_many_operations_for_any_length() -> None:
    counts = []
    for length in (512, 16_384):
        segments = torch.arange(length, device="meta") // 300
        with Operations() as operations:
            block_mask(segments, segments, segments)
        counts.append(operations.count)
    assert counts[0] == counts[1] < 200


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_token_sees_its_sequence_no_further_back_than_the_window() -> None:
    """Counted by positions: the shared prompt is near to every one of its completions."""
    micro = one_micro_batch(two_groups((7, 4, 6, 3)))
    last = 9 + 6 + 2  # of the second completion, behind the prompt and the first one
    attends = micro.attends(micro.position_ids - 4)
    assert micro.position_ids[last] == 11
    assert attends[last].nonzero()[:, 0].tolist() == [7, 8, 15, 16, 17]


SIZES = {
    "vocab_size": 15,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
BOTH = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **IDS),
    "three heads": LlamaConfig(**{**SIZES, "num_attention_heads": 6, "hidden_size": 96}, **IDS),
    "mistral": MistralConfig(**SIZES, sliding_window=4, **IDS),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=4, attn_logit_softcapping=2.0, **IDS
    ),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=4, layer_types=BOTH, **IDS),
    "qwen3": Qwen3Config(
        **SIZES, head_dim=16, use_sliding_window=True, sliding_window=4, layer_types=BOTH, **IDS
    ),
}


def model_of(config: Any) -> PreTrainedModel:
    """Random, its weights large enough that every token seen shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def packed_hidden(model: PreTrainedModel, micro: MicroBatch) -> Tensor:
    """(n, D): the states that predict the completions' tokens."""
    inputs = packed_inputs(micro, model)
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    return hidden[micro.predictors]


@torch.no_grad()
def alone_hidden(model: PreTrainedModel, rollouts: list[Rollout]) -> Tensor:
    """The same of each sequence by itself, masked by the model."""
    parts = []
    for one in rollouts:
        ids = torch.tensor([*one.prompt_ids, *one.completion_ids[:-1]])[None]
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        parts.append(hidden[len(one.prompt_ids) - 1 :])
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["eager", "sdpa", FLEX])
def test_layers_see_of_a_packed_sequence_what_they_see_of_it_alone(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and capped scores included, with sequences longer than a window."""
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", flex_by_hand)
    model = model_of(FAMILIES[family])
    if name == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers refuses it")
    rollouts = two_groups()
    model.set_attn_implementation("eager")
    plain = alone_hidden(model, rollouts)
    truth = alone_hidden(model.double(), rollouts).double()
    model.float().set_attn_implementation(name)
    ours = packed_hidden(model, one_micro_batch(rollouts))
    assert_close_to_truth(ours, truth, plain, family)
    if attention.has_windows(model.config):
        model.config.sliding_window = None
        blind = packed_hidden(model, one_micro_batch(rollouts))
        with pytest.raises(AssertionError, match="largest error"):
            assert_close_to_truth(blind, truth, plain, family)


def flex_by_hand(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    assert query.dtype == key.dtype == value.dtype, "flex attention takes one dtype"
    assert query.shape[2] % BLOCK == 0
    return by_hand(query, key, value, **given)


def test_under_autocast_norms_in_float32_change_no_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", flex_by_hand)
    model = model_of(FAMILIES["qwen3"])
    model.set_attn_implementation(FLEX)
    micro = one_micro_batch(two_groups())
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_hidden(model, micro).isfinite().all()


@IGNORED
def test_flex_attention_is_sdpas_equal_and_compiled_once(flex_on_cpu: list[Any]) -> None:
    """In float64, grouped queries and shared prompts: log-probabilities and every gradient; for
    micro-batches of other contents and lengths by the same graphs."""
    ours, plain = tiny_policy(), tiny_policy()
    settle(ours.model, "flex_attention")
    assert ours.model.config._attn_implementation == FLEX

    def lengths(*them: int) -> MicroBatch:
        return one_micro_batch(two_groups(them))  # type: ignore[arg-type]

    short, long, longest = lengths(7, 4, 6, 3), lengths(50, 60, 9, 30), lengths(90, 99, 80, 7)
    assert [len(m.input_ids) // BLOCK + 1 for m in (short, long, longest)] == [1, 2, 3]
    again, other = lengths(2, 3, 4, 5), one_micro_batch(ragged_rollouts())
    counts = []
    for micro in (short, long, longest, again, other):
        with torch.no_grad():
            torch.testing.assert_close(
                ours(micro).logprobs, plain(micro).logprobs, rtol=1e-12, atol=1e-12
            )
        counts.append(len(flex_on_cpu))
    # Two blocks at least, so one block is not traced apart: torch traces one for the first length,
    # and one for any others.
    assert counts == [1, 1, 2, 2, 2]
    for micro in (longest, short, long):
        coefficients = torch.randn(len(micro.targets), dtype=torch.float64)
        for policy in (ours, plain):
            policy.zero_grad()
            policy(micro, 1.0, coefficients, policy(micro).lse.detach()).backward()
        scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12 * scale)
        counts.append(len(flex_on_cpu))
    assert counts[-3:] == [3, 3, 3], "one more with gradients"
    assert torch._dynamo.config.recompile_limit >= attention.MOST_KERNELS


@IGNORED
def test_a_run_with_flex_attention_takes_the_steps_of_one_with_sdpa(
    flex_on_cpu: list[Any], tmp_path: Path
) -> None:
    weights = {}
    for name in ("sdpa", "flex_attention"):
        folder = tmp_path / name
        settings = ["steps=1", "warm_start_steps=1", "eval_every=0", f"attn_implementation={name}"]
        assert main(small_run(Path("tiny"), folder, *settings)) == 0
        weights[name] = load_file(folder / "checkpoint-1" / "model.safetensors")
        assert "attn" not in (folder / "checkpoint-1" / "config.json").read_text()
    assert flex_on_cpu, "nothing was traced"
    rows = [
        (tmp_path / name / "rollouts" / "step-000001.jsonl").read_text().splitlines()
        for name in weights
    ]
    drawn = [[json.loads(row)["completion_ids"] for row in log] for log in rows]
    assert drawn[0] == drawn[1], "both sample by sdpa"
    start = load_file(tmp_path / "sdpa" / "base_model" / "model.safetensors")
    for tensor, other in weights["flex_attention"].items():
        # AdamW's first step is as large as the learning rate wherever a gradient is not zero, so
        # one that is all rounding may go the other way.
        moved = (weights["sdpa"][tensor] - start[tensor]).abs().max()
        apart = (weights["sdpa"][tensor] - other).abs()
        assert float((apart > 0.01 * moved).float().mean()) < 0.01, tensor


def test_generation_is_by_another_attention_and_back(flex_on_cpu: list[Any]) -> None:
    del flex_on_cpu
    model = tiny_policy().model
    with generating(model):
        assert model.config._attn_implementation == "sdpa"
    settle(model, "flex_attention")
    with pytest.raises(KeyboardInterrupt), generating(model):
        assert model.config._attn_implementation == "sdpa"
        raise KeyboardInterrupt
    assert model.config._attn_implementation == FLEX
    gemma = model_of(FAMILIES["gemma2"])
    settle(gemma, "flex_attention")
    with generating(gemma):
        assert gemma.config._attn_implementation == "eager"


NARROW = LlamaConfig(**{**SIZES, "hidden_size": 32}, **IDS)
REFUSED = {
    "no flex attention": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=15, **IDS),
    "heads have 8 numbers": NARROW,
    "kind conv": Lfm2MoeConfig(**SIZES, layer_types=["conv", "full_attention"], **IDS),
    "mask's numbers": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"], **IDS),
}


@pytest.mark.parametrize("words", REFUSED)
def test_models_without_flex_attention_are_refused_or_keep_sdpa(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "gpu_has_flex", lambda: True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(REFUSED[words])
    settle(model, "auto")
    assert attention.setting_of(model) == "sdpa"
    with pytest.raises(Refusal, match=rf"^attn_implementation: expected one for .*{words}.*auto"):
        settle(model, "flex_attention")


def test_auto_is_flex_attention_on_a_gpu_and_transformers_choice_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"]))
        gemma = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["gemma2"]))
    monkeypatch.setattr(attention, "gpu_has_flex", lambda: False)
    for each, name in ((model, "sdpa"), (gemma, "eager")):
        settle(each, "auto")
        assert attention.setting_of(each) == name
    monkeypatch.setattr(attention, "gpu_has_flex", lambda: True)
    for each in (model, gemma):
        settle(each, "auto")
        assert attention.setting_of(each) == "flex_attention"
    settle(model, "eager")
    assert attention.setting_of(model) == "eager"
    assert attention.name_at_load("sdpa") == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is served there")
def test_flex_attention_is_refused_without_a_gpu() -> None:
    with pytest.raises(Refusal) as refused:
        attention.check_attention("flex_attention")
    assert str(refused.value) == (
        "attn_implementation: expected one that works here, got flex_attention: torch has its "
        "backward pass on GPUs alone, and sees none, or set attn_implementation=sdpa"
    )
    attention.check_attention("auto")
