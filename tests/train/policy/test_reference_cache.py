"""The reference's log-probabilities of recorded rollouts: right, asked once, kept whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.recorded import Recorded, RecordedFile
from agro_train.policy.policy import Policy
from agro_train.policy.reference_cache import cache_folder, check_cache_folder, with_ref_logprobs
from agro_train.types import MicroBatch, Rollout
from tests.train.models import ragged_rollouts, tiny_policy

CONFIG = TrainConfig(token_budget=20, temperature=1.3, prompts_per_step=1, num_generations=2)


class Counting(torch.nn.Module):
    """A reference that counts the targets it was asked for."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.targets = policy, 0

    def forward(self, micro: MicroBatch, temperature: float) -> object:
        self.targets += len(micro.targets)
        return self.policy(micro, temperature)


def recorded(rollouts: list[Rollout], sha256: str = "a") -> Recorded:
    groups = [[r for r in rollouts if r.group == name] for name in ("g0", "g1", "g2")]
    file = RecordedFile(Path("r.jsonl"), sha256, tuple(rollouts))
    return Recorded((file,), tuple(tuple(group) for group in groups))


def fill(
    data: Recorded,
    reference: torch.nn.Module,
    used: set[int],
    reference_id: str = "ref",
    config: TrainConfig = CONFIG,
    say: Callable[[str], None] = lambda text: None,
) -> Recorded:
    return with_ref_logprobs(
        data, used, reference, reference_id, config, Accelerator(cpu=True), say
    )


@torch.no_grad()
def truth(reference: Policy, rollout: Rollout) -> float:
    ids = torch.tensor([*rollout.prompt_ids, *rollout.completion_ids])
    logits = reference.model(input_ids=ids[None, :-1]).logits[0] / CONFIG.temperature
    logprobs = logits.log_softmax(-1).gather(-1, ids[1:, None])
    return float(logprobs[len(rollout.prompt_ids) - 1 :].sum())


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Counting(tiny_policy())


def test_values_are_the_references_and_asked_for_once(reference: Counting) -> None:
    rollouts = ragged_rollouts()
    tokens = [sum(len(r.completion_ids) for r in g) for g in recorded(rollouts).groups]
    first = fill(recorded(rollouts), reference, {0, 2})
    for number in (0, 2):
        for rollout in first.groups[number]:
            expected = truth(reference.policy, rollout)
            assert rollout.ref_logprob == pytest.approx(expected, rel=1e-6)
    assert all(rollout.ref_logprob is None for rollout in first.groups[1])  # no step visits it
    assert reference.targets == tokens[0] + tokens[2]
    again = fill(recorded(rollouts), reference, {0, 1, 2})
    assert reference.targets == sum(tokens)
    assert again.groups[0] == first.groups[0] and again.groups[2] == first.groups[2]


@pytest.mark.parametrize(
    "change",
    [{"reference_id": "other"}, {"config": replace(CONFIG, temperature=1.0)}, {"sha256": "b"}],
)
def test_another_reference_temperature_or_file_is_asked_anew(
    change: dict[str, object], reference: Counting
) -> None:
    rollouts = ragged_rollouts()
    fill(recorded(rollouts), reference, {0, 1, 2})
    asked = reference.targets
    data = recorded(rollouts, str(change.pop("sha256", "a")))
    fill(data, reference, {0, 1, 2}, **change)  # type: ignore[arg-type]
    assert reference.targets == 2 * asked


def test_completions_that_differ_in_what_was_kept_alone_have_values_of_their_own(
    reference: Counting,
) -> None:
    one = ragged_rollouts()[0]
    sets = [[token, 2, 3] for token in one.completion_ids], [[t] for t in one.completion_ids]
    rows = [replace(one, kept_ids=kept_ids.encode(kept)) for kept in sets]
    config = replace(CONFIG, top_k=3)
    (group, *_) = fill(recorded(rows), reference, {0}, config=config).groups
    narrow = replace(one, kept_ids=None)
    (whole, *_) = fill(recorded([narrow, narrow]), reference, {0}).groups
    assert group[1].ref_logprob == 0.0  # the only id that was kept
    assert 0.0 > group[0].ref_logprob > whole[0].ref_logprob  # other values, of the same file


def test_other_precision_of_products_is_asked_anew(reference: Counting) -> None:
    fill(recorded(ragged_rollouts()), reference, {0, 1, 2})
    asked, before = reference.targets, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if before == "highest" else "highest")
    try:
        fill(recorded(ragged_rollouts()), reference, {0, 1, 2})
    finally:
        torch.set_float32_matmul_precision(before)
    assert reference.targets == 2 * asked


def test_cache_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="XDG_CACHE_HOME: expected a folder .* set it to another"):
        check_cache_folder()


@pytest.mark.parametrize("cut", [0.0, 0.5, 1.0])
def test_cache_that_is_cut_short_is_computed_again_and_said_so(
    cut: float, reference: Counting
) -> None:
    data = recorded(ragged_rollouts())
    first = fill(data, reference, {0, 1, 2})
    asked = reference.targets
    (cache,) = cache_folder().iterdir()
    text = cache.read_text()
    cache.write_text(text[: int(cut * (len(text) - 1))])
    said: list[str] = []
    assert fill(data, reference, {0, 1, 2}, say=said.append) == first
    assert reference.targets == 2 * asked
    assert any("not a whole cache" in line and str(cache) in line for line in said)
    assert len(json.loads(cache.read_text())) == 9
    assert [path.name for path in cache_folder().iterdir()] == [cache.name]


def test_recorded_value_is_used_after_a_check(reference: Counting) -> None:
    rollouts = ragged_rollouts()
    exact = truth(reference.policy, rollouts[4])
    rollouts[4] = replace(rollouts[4], ref_logprob=exact + 0.01)
    filled = fill(recorded(rollouts), reference, {0, 1, 2})
    assert filled.groups[1][1].ref_logprob == exact + 0.01
    wrong = exact - 0.1 * len(rollouts[4].completion_ids)
    rollouts[4] = replace(rollouts[4], ref_logprob=wrong)
    with pytest.raises(ValueError, match="recorded: expected ref_logprob of .*rollout 5, got"):
        fill(recorded(rollouts), reference, {0, 1, 2})
