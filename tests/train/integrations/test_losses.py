"""The code that the pages of docs/ print, run as printed, against sums written out in float64."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from agro_kernels import agro_loss, next_tokens, pack_sequences, patch_model
from tests.kernels.small_models import build, token_batch
from tests.numerics import assert_close_to_truth, head_inputs, plain_linear_logprobs

DOCS = Path(__file__).parents[3] / "docs"
BETA = 0.3


def run(page: str, word: str, **names: Any) -> dict[str, Any]:
    """Executes the one python block of a page that holds `word`; returns its names."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.S)
    (block,) = [block for block in blocks if word in block]
    exec(compile(block, page, "exec"), names)
    return names


def plain_logprobs(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """(B, T) by the logits, 0 where not counted."""
    everything = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    picked = everything.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return picked.where(targets != -100, 0.0)


def test_cross_entropy_is_torchs() -> None:
    inputs = head_inputs(24, 16, 53, ignored=True)
    cross_entropy = run("losses.md", "def cross_entropy")["cross_entropy"]
    gradients = []
    for compute, dtype in (
        (cross_entropy, torch.float32),
        (by_logits, torch.float64),
        (by_logits, torch.float32),
    ):
        hidden = inputs.hidden.nan_to_num().to(dtype).requires_grad_()
        loss = compute(hidden, inputs.weight.to(dtype), inputs.targets)
        loss.backward()
        gradients.append((loss.detach(), hidden.grad))
    for ours, truth, plain in zip(*gradients, strict=True):
        assert ours is not None and truth is not None and plain is not None
        assert_close_to_truth(ours, truth, plain)


def by_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def test_tapered_agro_is_its_formula() -> None:
    tapered = run("losses.md", "def tapered")["tapered"]
    rewards, logprobs, ref_logprobs, sampling_logprobs = torch.randn(4, 2, 4, dtype=torch.float64)
    groups = torch.arange(8) // 4
    rows = (rewards, logprobs, ref_logprobs, sampling_logprobs)
    ours = tapered(*(row.flatten() for row in rows), groups, BETA)
    regularised = rewards - BETA * (logprobs - ref_logprobs)
    deviations = regularised - regularised.mean(1, keepdim=True)
    ratios = (logprobs - sampling_logprobs).exp().clamp(max=1.0)
    weights = ratios.where(deviations < 0, 1.0)
    exact = -BETA * deviations / 3 * weights / 2  # groups of four, and two of them
    torch.testing.assert_close(ours, exact.flatten(), rtol=1e-12, atol=1e-14)
    assert 0 < int((weights < 1).sum()) < int((deviations < 0).sum())


def test_dpo_is_the_paper() -> None:
    """-log sigmoid(beta (log-ratio of chosen - of rejected)), pair by pair."""
    dpo = run("losses.md", "def dpo")["dpo"]
    logprobs = -torch.rand(6, 5, dtype=torch.float64)
    ref_logprobs = -torch.rand(6, 5, dtype=torch.float64)
    total = 0.0
    for pair in range(3):
        ratios = [float((logprobs[r] - ref_logprobs[r]).sum()) for r in (pair, pair + 3)]
        total -= float(
            torch.tensor(BETA * (ratios[0] - ratios[1]), dtype=torch.float64).sigmoid().log()
        )
    ours = dpo(logprobs.requires_grad_(), ref_logprobs, BETA)
    assert float(ours.detach()) == pytest.approx(total / 3, rel=1e-12)
    ours.backward()
    assert logprobs.grad is not None and (logprobs.grad[:3] < 0).all()
    assert (logprobs.grad[3:] > 0).all()


def test_rloo_has_agros_gradient_over_beta() -> None:
    """By hand, row by row; and beta times it is AGRO's without the likelihood-ratio term."""
    rloo = run("losses.md", "def rloo")["rloo"]
    logprobs = (-torch.rand(2, 4, 5, dtype=torch.float64)).requires_grad_()
    ref_logprobs = -torch.rand(2, 4, 5, dtype=torch.float64)
    rewards = torch.rand(2, 4, dtype=torch.float64)
    rloo(logprobs, ref_logprobs, rewards, BETA).backward()
    gradient = logprobs.grad
    assert gradient is not None
    regularised = rewards - BETA * (logprobs.detach() - ref_logprobs).sum(-1)
    for p in range(2):
        for g in range(4):
            others = [float(regularised[p, o]) for o in range(4) if o != g]
            expected = -(float(regularised[p, g]) - sum(others) / 3) / 8
            assert gradient[p, g].tolist() == pytest.approx([expected] * 5, rel=1e-12)
    logprobs.grad = None
    cu_seqlens = torch.arange(0, 41, 5)
    flat = (logprobs.reshape(-1), ref_logprobs.reshape(-1), rewards.reshape(-1))
    agro_loss(*flat, torch.arange(8) // 4, cu_seqlens, beta=BETA).backward()
    torch.testing.assert_close(logprobs.grad, BETA * gradient, rtol=1e-12, atol=1e-14)


def test_pages_first_lines_give_the_same_before_and_after() -> None:
    ids, mask = token_batch()
    names = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    model = build("llama", tied=True)
    before = run("plain-loop.md", "# before", model=model, **names)["logprobs"]
    by_hand = run("plain-loop.md", "# by hand", model=model, **names)["logprobs"]
    after = run("plain-loop.md", "# after", model=model, **names)
    kept = after["targets"][:, :-1] != -100
    torch.testing.assert_close(after["logprobs"][:, :-1][kept], before[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["logprobs"][:, :-1], by_hand, rtol=1e-5, atol=1e-5)
    patched = run("plain-loop.md", "# by hand", model=model, **names)["logprobs"]
    assert torch.equal(patched, by_hand) and not by_hand[~kept].any()


class Recording(torch.optim.SGD):
    """Keeps the gradients of the last step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def test_pages_agro_loop_has_the_gradient_of_the_whole_batchs_loss() -> None:
    ids, mask = token_batch(batch=6)
    policy, reference = patch_model(build("llama", True)), patch_model(build("llama", True, seed=1))
    groups, rewards = torch.tensor([4, 9, 4, 9, 4, 9]), torch.rand(6)
    optimizer = Recording(policy.parameters(), lr=0.1)
    names = {
        "policy": policy,
        "reference": reference,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "rewards": rewards,
        "groups": groups,
        "optimizer": optimizer,
    }
    run("plain-loop.md", "for rows in", **names)
    results = []
    for dtype in (torch.float64, torch.float32):
        model, ref = build("llama", True).to(dtype), build("llama", True, seed=1).to(dtype)
        targets = next_tokens(ids, mask)
        with torch.no_grad():
            ref_logprobs = plain_logprobs(ref, ids, targets)
        (packed, packed_ref), cu_seqlens = pack_sequences(
            targets != -100, plain_logprobs(model, ids, targets), ref_logprobs
        )
        loss = agro_loss(packed, packed_ref, rewards, groups, cu_seqlens, beta=0.05, scale=1 / 0.05)
        loss.backward()
        results.append([p.grad for p in model.parameters()])
    for ours, truth, plain in zip(optimizer.gradients, *results, strict=True):
        assert truth is not None and plain is not None
        assert_close_to_truth(ours, truth, plain)


def test_pages_accelerate_block_takes_the_step_written_out() -> None:
    ids, mask = token_batch()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    model = build("llama", tied=True)
    before = model.lm_head.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run("plain-loop.md", "Accelerator", model=model, optimizer=optimizer, **batch)
    expected = build("llama", tied=True)
    targets = next_tokens(ids, mask)
    logprobs = plain_logprobs(expected, ids, targets)
    (-logprobs.sum() / (targets != -100).sum()).backward()
    step = before - 0.1 * expected.lm_head.weight.grad
    torch.testing.assert_close(model.lm_head.weight.detach(), step, rtol=1e-5, atol=1e-5)


@pytest.mark.trl
@pytest.mark.filterwarnings("ignore")
def test_pages_lightning_block_trains() -> None:
    """Two SGD steps, against the same two written out."""
    lightning = pytest.importorskip("lightning")
    ids, mask = token_batch()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    module = run("plain-loop.md", "LightningModule")["Supervised"](build("llama", tied=True))
    lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader([batch, batch], batch_size=None))
    model, targets = build("llama", tied=True), next_tokens(ids, mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (-plain_logprobs(model, ids, targets).sum() / (targets != -100).sum()).backward()
        optimizer.step()
    for ours, same in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-5)


def rows(count: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    ids, mask = token_batch(batch=count, length=count + 6)
    labels = ids.where(mask, -100)
    return [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]


def stack(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([e[name] for e in examples]) for name in examples[0]}


def test_pages_trainer_takes_the_steps_of_transformers_trainer(tmp_path: Path) -> None:
    """Three steps of two micro-batches with different numbers of counted tokens; an evaluation."""
    found = []
    for name in ("trainer", "LogprobTrainer"):
        model, dataset = build("llama", tied=True), rows(12)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            optim="sgd",
            use_cpu=True,
            logging_steps=1,
            prediction_loss_only=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        names = {"model": model, "args": args, "dataset": dataset, "collate": stack}
        word = "trainer = Trainer(" if name == "trainer" else "class LogprobTrainer"
        trainer: Trainer = run("hf-trainer.md", word, **names)["trainer"]
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        losses.append(trainer.evaluate(dataset[:4])["eval_loss"])
        found.append((losses, model))
    (expected, theirs), (losses, ours) = found
    assert len(losses) == 4 and losses == pytest.approx(expected, rel=1e-4)
    for one, same in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)


def test_plain_logprobs_of_this_file_are_the_tests_own() -> None:
    """What the others compare with, against tests/numerics.py."""
    model = build("llama", tied=True)
    ids, mask = token_batch()
    targets = next_tokens(ids, mask)
    hidden = model.model(input_ids=ids).last_hidden_state
    flat = plain_linear_logprobs(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())[0]
    torch.testing.assert_close(plain_logprobs(model, ids, targets).flatten(), flat)
