"""LogprobHead, patch_model and LinearAgroLoss: what the unpatched model gives, wherever it runs."""

import copy
import functools
import inspect
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from agro_kernels import (
    LinearAgroLoss,
    LogprobHead,
    LogprobStats,
    linear_agro_loss,
    linear_logprobs_with_stats,
    next_tokens,
    patch_model,
)
from agro_kernels.model_head import UNASKED
from tests.kernels.small_models import build, token_batch
from tests.numerics import assert_close_to_truth, head_inputs, plain_linear_logprobs

ROOT = Path(__file__).parents[2]
TEMPERATURE = 0.7

# peft asks transformers by a name that transformers has renamed.
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def objective(logprobs: Tensor, entropy: Tensor, lse: Tensor) -> Tensor:
    """A scalar that uses all three results, with another weight at each position."""
    weights = torch.linspace(-1.0, 2.0, logprobs.numel()).view_as(logprobs).to(logprobs)
    return (weights * logprobs + 0.3 * weights.flip(0) * entropy).sum() + 0.1 * lse.square().sum()


def ours(model: nn.Module, ids: Tensor, targets: Tensor, **others: Any) -> LogprobStats:
    results = model(input_ids=ids, targets=targets, temperature=TEMPERATURE, **others)
    assert isinstance(results, LogprobStats)
    return results


def plain(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the logits that the model itself gives."""
    kept = targets != -100
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs_all = (logits / TEMPERATURE).log_softmax(-1)
    picked = logprobs_all.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    entropy = -(logprobs_all.exp() * logprobs_all).sum(-1)
    lse = (logits / TEMPERATURE).logsumexp(-1)
    zero = torch.zeros_like(picked)
    return picked.where(kept, zero), entropy.where(kept, zero), lse.where(kept, zero)


def gradients(model: nn.Module, results: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    objective(*results).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", list(UNASKED))
def test_patched_model_gives_the_unpatched_models_logprobs_and_gradients(
    family: str, tied: bool
) -> None:
    model = build(family, tied)
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    untouched, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    patched = patch_model(model)

    assert patched is model and tied == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    assert list(model.state_dict()) == list(untouched.state_dict())
    results, plain_results = ours(model, ids, targets), plain(untouched, ids, targets)
    exact_results = plain(exact, ids, targets)
    for name, result, truth, same in zip(
        LogprobStats._fields, results, exact_results, plain_results, strict=True
    ):
        assert_close_to_truth(result, truth, same, name)
        assert (result[targets == -100] == 0).all()
    ours_grads, plain_grads = gradients(model, results), gradients(untouched, plain_results)
    exact_grads = gradients(exact, exact_results)
    assert ours_grads.keys() == plain_grads.keys()
    for name, gradient in ours_grads.items():
        assert_close_to_truth(gradient, exact_grads[name], plain_grads[name], name)


@pytest.mark.parametrize("family", list(UNASKED))
def test_patched_model_generates_and_evaluates_bitwise_as_before(family: str) -> None:
    model = build(family, tied=True)
    ids, _ = token_batch()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": True}
    labels = next_tokens(ids)
    before = model(input_ids=ids, labels=labels)
    torch.manual_seed(1)
    sampled = model.generate(ids, **options)

    patch_model(model)
    after = model(input_ids=ids, labels=labels)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, **options), sampled)


def test_the_logits_are_never_stored() -> None:
    """No result of any op, in the forward or the backward pass, is as large as the logits."""
    model = patch_model(build("llama", tied=False))
    ids, _ = token_batch(batch=8, length=40)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    def largest(targets: Tensor | None) -> int:
        sizes.clear()
        with Watch():
            if targets is None:
                model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
            else:
                objective(*ours(model, ids, targets)).backward()
        return max(sizes)

    logits = ids.numel() * model.config.vocab_size
    assert largest(None) >= logits  # the watch sees them where they are
    assert largest(next_tokens(ids)) < logits


def test_packed_sequences_do_not_see_each_other() -> None:
    """position_ids go through, and no cache is made, with which transformers would lose them."""
    model = patch_model(build("llama", tied=True))
    ids, _ = token_batch(batch=2, length=6)
    apart = ours(model, ids, next_tokens(ids)).logprobs
    inside = torch.ones(2, 6, dtype=torch.bool)
    inside[:, 0] = False
    targets = next_tokens(ids.view(1, 12), inside.view(1, 12))
    packed = ours(
        model,
        ids.view(1, 12),
        targets,
        position_ids=torch.arange(6).repeat(2)[None],
        use_cache=True,
    ).logprobs
    torch.testing.assert_close(packed.view(2, 6), apart, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = patch_model(build("llama", tied=True))
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    expected = gradients(model, ours(model, ids, targets))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = gradients(model, ours(model, ids, targets))
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name


def test_head_itself_may_be_checkpointed() -> None:
    inputs = head_inputs(9, 16, 33)
    head = LogprobHead(16, 33, bias=False)
    hidden = inputs.hidden.requires_grad_()

    def run(*arguments: Tensor) -> Tensor:
        return objective(*head(*arguments))

    run(hidden, inputs.targets).backward()
    expected, hidden.grad = hidden.grad, None
    checkpoint(run, hidden, inputs.targets, use_reentrant=False).backward()
    assert expected is not None and hidden.grad is not None
    assert torch.equal(hidden.grad, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_model_gives_the_same() -> None:
    """Whole graph: nothing of the patch breaks it. The ops themselves: test_compile_mode.py."""
    model = patch_model(build("llama", tied=True))
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    expected = ours(model, ids, targets)
    wanted = gradients(model, expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    results = ours(compiled, ids, targets)
    got = gradients(model, results)
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same, rtol=1e-5, atol=1e-5)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@peft_warns
def test_lora_adapters_get_the_gradient_and_the_head_none() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    torch.manual_seed(3)
    untouched = peft.get_peft_model(build("llama", tied=True), config)
    patched_first = peft.get_peft_model(patch_model(build("llama", tied=True)), config)
    patched_first.load_state_dict(untouched.state_dict())
    patched_last = patch_model(copy.deepcopy(untouched))
    exact = copy.deepcopy(untouched).double()
    truth, same = plain(exact, ids, targets), plain(untouched, ids, targets)
    exact_grads, plain_grads = gradients(exact, truth), gradients(untouched, same)
    for model in (patched_first, patched_last):
        results = ours(model, ids, targets)
        got = gradients(model, results)
        assert got.keys() == plain_grads.keys() and all("lora" in name for name in got)
        for name, gradient in got.items():
            assert_close_to_truth(gradient, exact_grads[name], plain_grads[name], name)
        with model.disable_adapter():
            off = ours(model, ids, targets).logprobs
        assert torch.equal(off, ours(patch_model(build("llama", tied=True)), ids, targets).logprobs)


def test_two_ranks_replicated_and_sharded_give_what_one_gives(tmp_path: Path) -> None:
    """DDP and FSDP2 with two gloo processes; the asserts are in ranks_modules.py."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.ranks_modules", str(tmp_path / "store"), rank],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for rank in ranks:
        said, _ = rank.communicate(timeout=200)
        assert rank.returncode == 0, said
        for name in ("replicated", "sharded", "sharded, head apart"):
            assert f"{name}: same" in said


def test_resizing_the_vocabulary_keeps_the_head() -> None:
    model = patch_model(build("llama", tied=True))
    model.resize_token_embeddings(80, mean_resizing=False)
    ids, mask = token_batch()
    results = ours(model, ids, next_tokens(ids, mask))
    assert model.lm_head.weight.shape == (80, 32)
    torch.testing.assert_close(results.logprobs, plain(model, ids, next_tokens(ids, mask))[0])


def test_a_copy_of_a_patched_model_is_its_own() -> None:
    model = patch_model(build("llama", tied=True))
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    other = copy.deepcopy(model)
    before = ours(other, ids, targets).logprobs
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(ours(other, ids, targets).logprobs, before)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def pickled(model: nn.Module) -> nn.Module:
    copied = pickle.loads(pickle.dumps(model))
    assert isinstance(copied, nn.Module)
    return copied


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved], ids=lambda way: way.__name__)
def test_a_patched_model_survives_being_copied(way: Callable[[nn.Module], nn.Module]) -> None:
    """With its own parameters, ties and forward; patching it again changes nothing."""
    model = patch_model(build("gemma2", tied=True))
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    expected, logits = ours(model, ids, targets), model(input_ids=ids).logits
    other: Any = way(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert other.lm_head.weight is other.model.embed_tokens.weight
    head = other.lm_head
    for copied in (other, patch_model(other)):
        for result, same in zip(ours(copied, ids, targets), expected, strict=True):
            assert torch.equal(result, same)
        assert torch.equal(copied(input_ids=ids).logits, logits)
        assert copied.lm_head is head
    assert inspect.signature(other.forward) == inspect.signature(type(other)(other.config).forward)


def test_a_model_that_was_pickled_before_it_was_asked_is_asked_now() -> None:
    model = build("gemma2", tied=True)
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    expected = patch_model(model)(ids, targets=targets)
    asked: Any = model.forward
    model.forward = functools.partial(asked.func, *asked.args)
    old: Any = pickled(model)
    for result, same in zip(old(ids, targets=targets), expected, strict=True):
        assert torch.equal(result, same)
    assert old.forward.keywords == asked.keywords


def test_every_option_of_the_op_is_taken_or_refused_by_name() -> None:
    model = patch_model(build("gemma2", tied=False))
    ids, _ = token_batch()
    targets = next_tokens(ids).masked_fill(ids % 5 == 0, 99)
    inputs = {"temperature": 0.7, "ignore_index": 99, "round_logits": "bf16"}
    targets = targets.masked_fill(targets == -100, 99)
    kept_ids = torch.stack([targets % 71, (targets + 7) % 71], -1)
    buffer, expected_buffer = torch.zeros(71, 32), torch.zeros(71, 32)
    results = model(input_ids=ids, targets=targets, kept_ids=kept_ids, weight_grad=buffer, **inputs)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    expected = linear_logprobs_with_stats(
        hidden,
        model.lm_head.weight,
        targets,
        softcap=model.config.final_logit_softcapping,
        kept_ids=kept_ids,
        weight_grad=expected_buffer,
        **inputs,  # type: ignore[arg-type]
    )
    for result, same in zip(results, expected, strict=True):
        assert torch.equal(result, same)
    (results.logprobs.sum() + expected.logprobs.sum()).backward()
    assert torch.equal(buffer, expected_buffer) and buffer.count_nonzero() > 0
    assert model.lm_head.weight.grad is None
    for name, value in (("bias", torch.zeros(71)), ("softcap", 3.0), ("shards", object())):
        with pytest.raises(ValueError, match=f"^{name}: expected none, got a value; "):
            model(input_ids=ids, targets=targets, **{name: value})
    for name, value in inputs.items():
        with pytest.raises(ValueError, match=f"^{name}: expected together with targets, got it"):
            model(input_ids=ids, **{name: value})
        with pytest.raises(ValueError, match=f"^{name}: expected together with targets, got it"):
            model.lm_head(hidden, **{name: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'tempereture'"):
        model.lm_head(hidden, targets, tempereture=0.7)


@pytest.mark.parametrize("family", list(UNASKED))
def test_keywords_that_the_backbone_does_not_know_are_refused(family: str) -> None:
    """Those it knows go through: its own, and what transformers hands down to the attention."""
    model = patch_model(build(family, tied=False))
    ids, _ = token_batch()
    targets = next_tokens(ids)
    expected = ours(model, ids, targets).logprobs
    known = {"attention_mask": torch.ones_like(ids), "return_dict": False, "labels": None}
    known |= {"output_attentions": False, "cu_seq_lens_q": None, "num_items_in_batch": 3}
    assert torch.equal(ours(model, ids, targets, **known).logprobs, expected)
    model.config.return_dict = False
    by_position = model(ids, targets=targets, temperature=TEMPERATURE)
    assert torch.equal(by_position.logprobs, expected)
    with pytest.raises(TypeError, match="^tempereture: expected an argument of .*Model or one of"):
        model(input_ids=ids, targets=targets, tempereture=0.5)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids, targets=targets)


class Scaled(LlamaForCausalLM):
    scale = 1.1

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.scale
        return output


class Unscaled(Scaled):
    scale = 1.0


def test_a_forward_that_changes_the_logits_is_refused_with_both_numbers() -> None:
    model = build("llama", tied=False).train()
    model.__class__ = Scaled
    message = r"^model: expected logits that are lm_head.*got Scaled\.forward.*to \d\S+ where .* \d"
    with pytest.raises(ValueError, match=message):
        patch_model(model)
    assert type(model.lm_head) is nn.Linear and all(m.training for m in model.modules())
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    model.__class__ = Unscaled
    patch_model(model)
    results = ours(model, ids, targets)
    model.__class__ = LlamaForCausalLM
    assert torch.equal(results.logprobs, ours(model, ids, targets).logprobs)
    on_meta = build("llama", tied=False).to("meta")
    on_meta.__class__ = Scaled
    with pytest.raises(ValueError, match="the meta device.*; load the weights before"):
        patch_model(on_meta)


def doubled(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (2 * args[0], *args[1:])


@pytest.mark.parametrize("first", ["hook", "patch"])
def test_pre_hooks_of_the_head_act_as_on_the_unpatched_model(first: str) -> None:
    """On logits, log-probs and gradients; a backward hook sees them, and handles still remove."""
    model = build("llama", tied=False)
    untouched, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    untouched.lm_head.register_forward_pre_hook(doubled)
    exact.lm_head.register_forward_pre_hook(doubled)
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    seen: list[Tensor] = []
    if first == "patch":
        patch_model(model)
    handle = model.lm_head.register_forward_pre_hook(doubled)
    model.lm_head.register_full_backward_hook(lambda _, inputs, outputs: seen.append(inputs[0]))
    if first == "hook":
        patch_model(model)
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)
    results, same = ours(model, ids, targets), plain(untouched, ids, targets)
    truth = plain(exact, ids, targets)
    for a, b, c in zip(results, truth, same, strict=True):
        assert_close_to_truth(a, b, c)
    got, expected = gradients(model, results), gradients(untouched, same)
    exact_grads = gradients(exact, truth)
    for name, gradient in got.items():
        assert_close_to_truth(gradient, exact_grads[name], expected[name], name)
    assert len(seen) == 1 and seen[0].shape == (*ids.shape, 32)
    handle.remove()
    plain_model = patch_model(build("llama", tied=False))
    assert torch.equal(ours(model, ids, targets).logprobs, ours(plain_model, ids, targets).logprobs)


def test_forward_hooks_of_the_head_are_refused_before_and_see_the_results_after() -> None:
    model = build("llama", tied=False)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="^lm_head: expected no forward hooks, got 1; .*after"):
        patch_model(model)
    assert type(model.lm_head) is nn.Linear
    handle.remove()
    patch_model(model)
    ids, mask = token_batch()
    seen: list[Any] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output))
    results = ours(model, ids, next_tokens(ids, mask))
    logits = model(input_ids=ids).logits
    assert seen[0] is results and seen[1] is logits
    handle.remove()
    model.lm_head.register_forward_hook(lambda _, args, output: output * 2)  # meant for logits
    with pytest.raises(ValueError, match="^lm_head: expected LogprobStats, got tuple from one"):
        ours(model, ids, next_tokens(ids, mask))
    assert torch.equal(model(input_ids=ids).logits, 2 * logits)


def test_patching_twice_is_patching_once() -> None:
    model = patch_model(build("qwen3", tied=False))
    head = model.lm_head
    assert patch_model(model).lm_head is head


def test_head_is_a_linear_without_targets_and_the_op_with_them() -> None:
    inputs = head_inputs(11, 16, 37, bias=True, ignored=True)
    head = LogprobHead(16, 37)
    head.weight, head.bias = nn.Parameter(inputs.weight), nn.Parameter(inputs.bias)
    kept = inputs.hidden.nan_to_num()
    assert torch.equal(head(kept), F.linear(kept, inputs.weight, inputs.bias))
    results = head(inputs.hidden, inputs.targets, temperature=0.5, softcap=4.0)
    expected = linear_logprobs_with_stats(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        bias=inputs.bias,
        temperature=0.5,
        softcap=4.0,
    )
    truth = plain_linear_logprobs(
        inputs.hidden.double(),
        inputs.weight.double(),
        inputs.targets,
        bias=inputs.bias.double() if inputs.bias is not None else None,
        temperature=0.5,
        softcap=4.0,
    )[0]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert_close_to_truth(results.logprobs, truth, truth.float(), "logprobs")


def test_next_tokens_shifts_and_masks() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_tokens(ids).tolist() == [[6, 7, 8, -100]]
    mask = torch.tensor([[0, 0, 1, 1]])
    assert next_tokens(ids, mask).tolist() == [[-100, 7, 8, -100]]


def test_loss_module_is_the_function() -> None:
    inputs = head_inputs(10, 8, 21)
    hidden = inputs.hidden.requires_grad_()
    arguments = (
        hidden,
        inputs.weight,
        inputs.targets,
        -torch.rand(10),
        torch.tensor([1.0, 0.0, 0.5, 0.25]),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0, 3, 5, 8, 10]),
    )
    options = {"beta": 0.1, "lr_weight": 0.5, "lr_cap": True, "lr_baseline": 0.25, "scale": 3.0}
    on_policy = torch.tensor([True, True, False, True])
    loss = LinearAgroLoss(**options, temperature=0.8)
    got = loss(*arguments, on_policy=on_policy)
    got.backward()
    gradient, hidden.grad = hidden.grad, None
    expected = linear_agro_loss(*arguments, **options, temperature=0.8, on_policy=on_policy)
    expected.backward()
    assert torch.equal(got, expected) and gradient is not None
    assert torch.equal(gradient, hidden.grad)
    assert "beta=0.1" in repr(loss)


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": "mamba"})()


def test_what_cannot_be_patched_is_refused_in_one_sentence() -> None:
    for model in (Elsewhere(), nn.Linear(2, 2), build("llama", tied=False).model):
        with pytest.raises(
            ValueError, match="^model: expected a transformers causal LM.*call linear"
        ):
            patch_model(model)
    quantised = build("llama", tied=False)
    quantised.lm_head = type("Linear4bit", (nn.Linear,), {})(32, 71, bias=False)
    with pytest.raises(
        ValueError, match=r"torch.nn.Linear, with.* got tests\.\S+\.Linear4bit; leave"
    ):
        patch_model(quantised)
    aligned = build("llama", tied=False)
    aligned.lm_head.forward = aligned.lm_head.forward  # as accelerate's device map does
    with pytest.raises(ValueError, match="^lm_head: expected torch.nn.Linear's own forward"):
        patch_model(aligned)
    taken = build("llama", tied=False)
    taken.forward = taken.forward
    with pytest.raises(ValueError, match="call patch_model first"):
        patch_model(taken)


def test_bad_calls_are_refused_in_one_sentence() -> None:
    model = patch_model(build("llama", tied=True))
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    with pytest.raises(ValueError, match="^labels: expected None together with targets"):
        model(input_ids=ids, targets=targets, labels=ids)
    with pytest.raises(ValueError, match="^logits_to_keep: expected None"):
        model(input_ids=ids, targets=targets, logits_to_keep=2)
    with pytest.raises(ValueError, match="^temperature: expected together with targets"):
        model(input_ids=ids, temperature=0.5)
    with pytest.raises(ValueError, match="^targets: expected shape"):
        model(input_ids=ids, targets=targets[:, :-1])
    model.set_output_embeddings(nn.Linear(32, 71, bias=False))
    with pytest.raises(ValueError, match="call patch_model after what replaces the lm_head"):
        model(input_ids=ids, targets=targets)
