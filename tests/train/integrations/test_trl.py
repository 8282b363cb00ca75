"""TRL 1.16 in earnest: AGROTrainer's gradient is ours, stock trainers' with our head is their own.

Run by `make test-trl`, in an environment with TRL.
"""

import re
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import HfArgumentParser, LlamaForCausalLM, TrainerCallback  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

from agro_kernels import AgroStats, next_tokens, patch_model  # noqa: E402
from agro_train.algorithm import coefficients  # noqa: E402
from agro_train.config import TrainConfig  # noqa: E402
from agro_train.integrations.trl import (  # noqa: E402
    AGROConfig,
    AGROTrainer,
    _Head,
    agro_logprobs,
    completion_sums,
)
from agro_train.policy import tiny  # noqa: E402
from agro_train.types import Scores  # noqa: E402
from benchmarks.trainer import curves_trl  # noqa: E402
from tests.numerics import assert_close_to_truth, head_inputs  # noqa: E402
from tests.train.integrations import OLD_NAMES  # noqa: E402
from tests.train.torchrun import on_two_ranks  # noqa: E402

pytestmark = [pytest.mark.trl, *OLD_NAMES]

DOCS = Path(__file__).parents[3] / "docs"
GENERATIONS = 3
PROMPTS = [{"prompt": text} for text in ("17+25=", "38+44=", "29+13=", "56+37=")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with random weights, saved: TRL reads its reference from there."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(len(tokenizer), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def policy(folder: Path) -> LlamaForCausalLM:
    """Away from the reference, so that the log-ratio counts."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def share_of_small_digits(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """A reward that varies; none for one in four sums of tokens."""
    return [
        None if sum(ids) % 4 == 0 else sum(2 <= token <= 6 for token in ids) / len(ids)
        for ids in completion_ids
    ]


def length(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if sum(ids) % 4 == 0 else len(ids) / 8 for ids in completion_ids]


class Recorder(TrainerCallback):
    """The gradient that the first optimiser step sees, and nothing is changed by it."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.grad is not None:
                    self.gradients[name.removeprefix("module.")] = parameter.grad.clone()


def common(output_dir: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,  # no clipping
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }


def rollouts(**options: Any) -> dict[str, Any]:
    return {
        "num_generations": GENERATIONS,
        "max_completion_length": 8,
        "temperature": 0.8,
        **options,
    }


class Spying(AGROTrainer):
    """Keeps the batch as scored, before it is shuffled and cut."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.scored = {**output, "rewards": self._rewards()}
        return output


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.3},
        {"beta": 0.3, "lr_weight": 1.0},
        {"beta": 0.1, "lr_weight": 1.0, "lr_cap": True, "lr_baseline": 0.25},
        {"beta": 0.3, "mask_truncated_completions": True, "reward_weights": [1.0, 0.5]},
    ],
    ids=["pathwise", "on-policy", "capped", "truncated-left-out"],
)
def test_gradient_is_this_projects(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Against our step's coefficients times the log-probs of a full softmax, all rows at once."""
    recorder, model = Recorder(), policy(folder)
    trainer = Spying(
        model,
        [share_of_small_digits, length],
        AGROConfig(**common(tmp_path), **rollouts(**options)),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tiny.build_tokenizer(),
        callbacks=[recorder],
    )
    trainer.train()
    compare(recorder, folder, trainer.scored, options, GENERATIONS)


class Engine:
    """Stands where TRL has vLLM: samples from the reference, an older policy than the trained one.

    It tells the log-probabilities that vLLM would, those of the sampled tokens at the temperature,
    and of one token none.
    """

    def __init__(self, folder: Path, logprobs: int | None, temperature: float, **_: Any) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.logprobs, self.temperature = logprobs, temperature
        self.sums: list[float] = []  # of every completion so far; NaN where one token has none

    def sync_weights(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        completions, logprobs = [], []
        for prompt in prompts:
            ids, told = list(prompt), []
            for _token in range(8):
                logits = self.model(torch.tensor([ids])).logits[0, -1] / self.temperature
                chances = logits.log_softmax(-1)
                ids.append(int(chances.exp().multinomial(1)))
                told.append([float(chances[ids[-1]])])
                if ids[-1] == self.model.config.eos_token_id:
                    break
            completions.append(ids[len(prompt) :])
            logprobs.append(told)
        logprobs[1][0] = [None]
        for told in logprobs:
            self.sums.append(sum(float("nan") if t is None else t for (t,) in told))
        return prompts, completions, logprobs if self.logprobs is not None else None, None


InPlaceOfVllm = Callable[[Callable[..., Engine]], None]


@pytest.fixture
def in_place_of_vllm(monkeypatch: pytest.MonkeyPatch) -> InPlaceOfVllm:
    """Has TRL make this engine where it would start vLLM."""
    return partial(monkeypatch.setattr, "trl.trainer.rloo_trainer.VLLMGeneration")


@pytest.mark.parametrize("taper", [0.0, 0.5, float("inf")])
def test_what_vllm_sampled_is_tapered_as_this_project_does(
    folder: Path, tmp_path: Path, in_place_of_vllm: InPlaceOfVllm, taper: float
) -> None:
    in_place_of_vllm(lambda **kwargs: Engine(folder, **kwargs))
    options = {"beta": 0.3, "taper": taper}
    recorder = Recorder()
    trainer = Spying(
        policy(folder),
        [share_of_small_digits, length],
        AGROConfig(**common(tmp_path), **rollouts(**options), use_vllm=True, vllm_mode="colocate"),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tiny.build_tokenizer(),
        callbacks=[recorder],
    )
    trainer.train()
    assert len(trainer.vllm_generation.sums) == 12  # one generation, on one rank
    assert (trainer.vllm_generation.logprobs is None) == (taper == 0)
    batch = {**trainer.scored, "sampling_logprobs": torch.tensor(trainer.vllm_generation.sums)}
    stats = compare(recorder, folder, batch, options, GENERATIONS)
    (log,) = [row for row in trainer.state.log_history if "agro/variance" in row]
    assert ("agro/taper_weight" in log) == (taper > 0)
    if taper > 0:
        assert float(stats.taper_weight) < 0.95
        assert log["agro/taper_weight"] == pytest.approx(float(stats.taper_weight), rel=1e-4)
        expected = float(stats.sampler_log_ratio)
        assert log["agro/sampler_log_ratio"] == pytest.approx(expected, rel=1e-4)


def test_a_server_whose_log_probs_leave_the_temperature_out_is_refused(
    folder: Path, tmp_path: Path, in_place_of_vllm: InPlaceOfVllm
) -> None:
    modes = ["raw_logprobs", "processed_logprobs"]

    def engine(**kwargs: Any) -> Engine:
        made = Engine(folder, **kwargs)
        info = {"model_config": {"logprobs_mode": modes.pop(0)}}
        made.vllm_client = types.SimpleNamespace(get_server_info=lambda: info)
        return made

    in_place_of_vllm(engine)

    def build() -> AGROTrainer:
        return AGROTrainer(
            policy(folder),
            length,
            AGROConfig(
                **common(tmp_path),
                **rollouts(beta=0.3, taper=1.0),
                use_vllm=True,
                vllm_mode="server",
            ),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=tiny.build_tokenizer(),
        )

    with pytest.raises(ValueError, match="^taper: expected a vLLM server .* got raw_logprobs"):
        build()
    assert build().vllm_generation.logprobs == 0


def compare(
    recorder: Recorder,
    folder: Path,
    batch: dict[str, Any],
    options: dict[str, Any],
    group_size: int,
) -> AgroStats:
    """The recorded gradient, by the law, with that of all rows of `batch` at once."""
    exact = policy(folder).double()
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logprobs, ref_logprobs = sums(exact, batch), sums(reference, batch)
    rewards = batch["rewards"].masked_fill(~batch["completion_mask"].bool().any(1), float("nan"))
    known = {name: options[name] for name in ("beta", "lr_weight", "lr_cap") if name in options}
    unknown = torch.full((len(rewards),), float("nan"), dtype=torch.float64)
    weights, stats = coefficients(
        Scores(
            rewards=rewards,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            sampling_logprobs=batch.get("sampling_logprobs", unknown),
            lengths=batch["completion_mask"].sum(1),
            groups=torch.arange(len(rewards)) // group_size,
            on_policy=torch.ones(len(rewards), dtype=torch.bool),
            entropy=torch.zeros(()),
            num_tokens=torch.tensor(1),
        ),
        TrainConfig(
            model="tiny",
            lr_baseline=str(options.get("lr_baseline", "auto")),
            off_policy_taper=options.get("taper", 0.0),
            **known,
        ),
    )
    assert 0 < int(stats.num_dropped) < len(rewards)  # missing rewards take part in the test
    assert float(weights.abs().max()) > 0.1
    truth = full_softmax_gradient(exact, batch, weights)
    plain = full_softmax_gradient(policy(folder), batch, weights)
    assert recorder.gradients.keys() == truth.keys()
    for name, gradient in recorder.gradients.items():
        assert_close_to_truth(gradient, truth[name], plain[name], name)
    return stats


def test_two_ranks_have_the_whole_batchs_gradient(folder: Path, tmp_path: Path) -> None:
    """DDP, groups spread over both ranks; the asserts are in ranks_trl.py."""
    module = "tests.train.integrations.ranks_trl"
    printed = on_two_ranks(module, str(folder), str(tmp_path))
    assert printed.count("both ranks: same") == 2


def sums(model: LlamaForCausalLM, batch: dict[str, Any]) -> Tensor:
    """(12,) log-probabilities of the completions, by the logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1] / 0.8
    picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    start = batch["prompt_ids"].size(1) - 1
    return picked[:, start:].where(batch["completion_mask"].bool(), 0.0).sum(1)


def full_softmax_gradient(
    model: LlamaForCausalLM, batch: dict[str, Any], weights: Tensor
) -> dict[str, Tensor]:
    (weights * sums(model, batch)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trainer_of(
    kind: str,
    folder: Path,
    tmp_path: Path,
    recorder: Recorder,
    accumulation: int = 3,
    batch: int = 4,
) -> Any:
    sizes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
    shared = {"processing_class": tiny.build_tokenizer(), "callbacks": [recorder]}
    if kind in ("GRPO", "RLOO"):
        config, trainer = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}[
            kind
        ]
        args = config(**common(tmp_path, **sizes), **rollouts(beta=0.05))
        data = Dataset.from_list(PROMPTS)
        return trainer(policy(folder), share_of_small_digits, args, train_dataset=data, **shared)
    if kind == "SFT":
        data = Dataset.from_list(
            [{"prompt": r["prompt"], "completion": "7+8=15,95"} for r in PROMPTS]
        )
        args = SFTConfig(**common(tmp_path, **sizes), eos_token=tiny.EOS)
        return SFTTrainer(policy(folder), args, train_dataset=data, **shared)
    if kind == "KTO":
        answers = [("42", True), ("7+8=15", False), ("95", True), ("4+4", False)]
        data = Dataset.from_list(
            [
                {**row, "completion": completion, "label": label}
                for row, (completion, label) in zip(PROMPTS, answers, strict=True)
            ]
        )
        args = KTOConfig(**common(tmp_path, **sizes))
        return KTOTrainer(policy(folder), args=args, train_dataset=data, **shared)
    data = Dataset.from_list([{**row, "chosen": "42", "rejected": "7+8=15"} for row in PROMPTS])
    args = DPOConfig(**common(tmp_path, **sizes))
    return DPOTrainer(policy(folder), args=args, train_dataset=data, **shared)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "SFT", "DPO", "KTO"])
def test_stock_trainers_do_the_same_step_with_our_head(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    apply = _Head.apply

    def counting(head: _Head, hidden: Tensor, *others: Any) -> Any:
        calls.append(len(hidden))
        return apply(head, hidden, *others)

    monkeypatch.setattr(_Head, "apply", counting)
    logs, recorders = [], (Recorder(), Recorder())
    for recorder in recorders:
        trainer = trainer_of(kind, folder, tmp_path, recorder)
        if recorder is recorders[1]:
            assert not calls
            with agro_logprobs(keep_logits_bytes="auto"):
                trainer.train()
        else:
            trainer.train()
        logs.append(trainer.state.log_history[0])
    assert calls
    theirs, ours = recorders
    assert theirs.gradients and theirs.gradients.keys() == ours.gradients.keys()
    for name, gradient in ours.gradients.items():
        scale = float(theirs.gradients[name].abs().max())
        torch.testing.assert_close(
            gradient, theirs.gradients[name], rtol=0, atol=3e-5 * scale, msg=name
        )
    assert logs[0].keys() == logs[1].keys()
    for name, value in logs[0].items():
        if "time" not in name and "runtime" not in name and "per_second" not in name:
            assert logs[1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def share_of_small_digits_of_all(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(2 <= token <= 6 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "RLOO"])
def test_documented_losses_have_trls_gradient(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/losses.md, through a patched model, on the batch that TRL's trainer saw."""
    recorder, seen = Recorder(), {}
    monkeypatch.setitem(globals(), "share_of_small_digits", share_of_small_digits_of_all)
    trainer = trainer_of(kind, folder, tmp_path, recorder, accumulation=1, batch=12)
    names = {
        "SFT": "compute_loss",
        "DPO": "compute_loss",
        "RLOO": "_generate_and_score_completions",
    }

    def keeping(method: str, before: bool) -> None:
        theirs = getattr(trainer, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(args[1]) if before else {}
            result = theirs(*args, **kwargs)
            seen.setdefault(method, given if before else result)
            if before:
                seen.setdefault("loss", float(result.detach()))
            return result

        setattr(trainer, method, call)

    keeping(names[kind], before=kind != "RLOO")
    if kind == "RLOO":
        keeping("_calculate_rewards", before=False)
    trainer.train()
    model, reference = patch_model(policy(folder)), LlamaForCausalLM.from_pretrained(folder)
    batch, losses = seen[names[kind]], documented_losses()
    if kind == "RLOO":
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        start = batch["prompt_ids"].size(1)
        counted = attention.bool() & (torch.arange(ids.size(1)) >= start)
    else:
        ids, attention = batch["input_ids"], batch["attention_mask"]
        counted = batch["labels"] != -100 if kind == "SFT" else batch["completion_mask"].bool()
    targets = next_tokens(ids, counted)
    if kind == "SFT":
        hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state
        loss = losses["cross_entropy"](hidden, model.lm_head.weight, targets)
    else:
        options = {"temperature": 0.8 if kind == "RLOO" else 1.0}
        inputs = {"input_ids": ids, "attention_mask": attention, "targets": targets, **options}
        logprobs = model(**inputs).logprobs
        with torch.no_grad():
            ref_logprobs = patch_model(reference)(**inputs).logprobs
        if kind == "DPO":
            loss = losses["dpo"](logprobs, ref_logprobs, beta=0.1)
        else:
            groups = (-1, GENERATIONS, logprobs.size(1))
            rewards = seen["_calculate_rewards"].sum(1).view(-1, GENERATIONS)
            loss = losses["rloo"](
                logprobs.view(groups), ref_logprobs.view(groups), rewards, beta=0.05
            )
    loss.backward()
    if kind != "RLOO":  # TRL's RLOO reports its value at ratio 1, ours has the log-probs in it
        assert float(loss.detach()) == pytest.approx(seen["loss"], rel=1e-5)
    for name, parameter in model.named_parameters():
        theirs = recorder.gradients[name]
        assert parameter.grad is not None and float(theirs.abs().max()) > 0
        torch.testing.assert_close(
            parameter.grad, theirs, rtol=0, atol=3e-5 * float(theirs.abs().max()), msg=name
        )


def documented_losses() -> dict[str, Any]:
    page = (DOCS / "losses.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(compile(block, "docs/losses.md", "exec"), names)
    return names


def test_context_refuses_a_budget_that_is_none() -> None:
    with pytest.raises(ValueError, match='keep_logits_bytes: expected an int >= 0 or "auto"'):
        agro_logprobs(keep_logits_bytes=-1).__enter__()


@pytest.mark.parametrize(
    ("typed", "expected"), [(["auto"], "auto"), (["4096"], 4096), ([], 0)], ids=str
)
def test_a_command_line_takes_a_budget(
    typed: list[str], expected: int | str, tmp_path: Path
) -> None:
    option = ["--keep_logits_bytes", *typed] if typed else []
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--beta", "0.1"]
    (config,) = HfArgumentParser(AGROConfig).parse_args_into_dataclasses([*arguments, *option])
    assert config.keep_logits_bytes == expected


def test_context_puts_trls_head_back() -> None:
    before = utils._ChunkedLogProbFunction, utils._use_triton
    with pytest.raises(RuntimeError, match="inside"), agro_logprobs():
        assert utils._ChunkedLogProbFunction == _Head()
        raise RuntimeError("inside")
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_head_gives_what_trls_gives(softcap: float | None) -> None:
    """Every result, with bias, temperature, cap and scale, and the gradients."""
    made = head_inputs(23, 16, 61, bias=True)
    assert made.bias is not None
    every = ("log_probs", "entropy", "mean_logits", "is_top1")
    found = []
    for head in (_Head(keep_logits_bytes="auto"), ChunkedLogProbFunction):
        leaves = [
            tensor.clone().requires_grad_() for tensor in (made.hidden, made.weight, made.bias)
        ]
        results = head.apply(*leaves, made.targets, 0.7, 16, softcap, 0.25, every)
        (results[0] @ made.coefficients + results[1].sum()).backward()
        found.append(([*results[:2], results[3], *(leaf.grad for leaf in leaves)], results))
    (ours, raw), (plain, plain_raw) = found
    truth = exact_head(made, softcap)
    for name, a, b, c in zip(NAMES, ours, truth, plain, strict=True):
        assert_close_to_truth(a, b, c, name)
    assert raw[2] is None and torch.equal(raw[4], plain_raw[4])


NAMES = ("logprobs", "entropy", "mean_logits", "dhidden", "dweight", "dbias")


def exact_head(made: Any, softcap: float | None) -> list[Tensor]:
    """float64, by the logits: TRL's own head keeps its sums in fp32."""
    leaves = [t.double().requires_grad_() for t in (made.hidden, made.weight, made.bias)]
    logits = (leaves[0] @ leaves[1].T + leaves[2]) * 0.25
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / 0.7
    everything = logits.log_softmax(-1)
    logprobs = everything.gather(-1, made.targets[:, None]).squeeze(-1)
    entropy = -(everything.exp() * everything).sum(-1)
    (logprobs @ made.coefficients.double() + entropy.sum()).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [logprobs.detach(), entropy.detach(), logits.detach().mean(-1), *gradients]


def test_a_step_without_any_reward_changes_nothing(folder: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = AGROTrainer(
        policy(folder),
        lambda completion_ids, **_: [None] * len(completion_ids),
        AGROConfig(**common(tmp_path), **rollouts(beta=0.1)),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tiny.build_tokenizer(),
        callbacks=[recorder],
    )
    trainer.train()
    assert recorder.gradients
    assert all((gradient == 0).all() for gradient in recorder.gradients.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, "^beta: expected a finite number > 0"),
        ({"beta": 0.1, "lr_weight": -1.0}, "^lr_weight: expected"),
        ({"beta": 0.1, "lr_baseline": 2.0}, "^lr_baseline: expected"),
        ({"beta": 0.1, "taper": -1.0, "use_vllm": True}, "^taper: expected a number >= 0"),
        ({"beta": 0.1, "taper": 1.0}, "^taper: expected 0 without use_vllm, got 1.0"),
        ({"beta": 0.1, "num_iterations": 2}, "^num_iterations, steps_per_generation"),
        ({"beta": 0.1, "steps_per_generation": 6}, "^num_iterations, steps_per_generation"),
        ({"beta": 0.1, "normalize_advantages": True}, "^normalize_advantages: expected False"),
    ],
)
def test_what_is_not_agro_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AGROConfig(**common(tmp_path), **{**rollouts(), **options})


def test_config_of_another_trainer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="^args: expected an AGROConfig, got RLOOConfig"):
        AGROTrainer(policy(folder), length, RLOOConfig(**common(tmp_path), **rollouts()))


def test_sums_leave_out_what_is_masked() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    per_token = torch.tensor([[-1.0, -2.0, float("nan")], [-1.0, -1.0, -1.0]])
    assert completion_sums(per_token, mask).tolist() == pytest.approx(
        [-3.0, float("nan")], nan_ok=True
    )


def example_of_the_page() -> str:
    page = (DOCS / "trl.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    return next(block for block in blocks if "AGROTrainer(" in block)


def test_the_pages_script_trains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed in docs/trl.md, on the tiny Llama and at its learning rate: the reward rises."""
    script = example_of_the_page()
    for printed, ours in (
        ('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(folder))),
        ("learning_rate=1e-5", "learning_rate=3e-3"),
        ("{a} + {a} =", "{a}+{a}="),  # the tiny tokenizer knows no spaces
    ):
        assert script.count(printed) == 1
        script = script.replace(printed, ours)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(script, "docs/trl.md", "exec"), names)
    logs = [row for row in names["trainer"].state.log_history if "reward" in row]
    rewards = [row["reward"] for row in logs]
    assert len(rewards) == names["args"].max_steps
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    assert all(row["agro/variance"] > 0 for row in logs)


def test_both_trainers_of_the_curves_take_the_same_optimiser_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """curves_trl: the same AdamW, learning rates and clipping, step for step."""
    monkeypatch.setattr(curves_trl, "WARM_START_STEPS", 1)
    curves_trl.make_base(tmp_path)
    steps: list[Any] = []
    step, clip = torch.optim.AdamW.step, Accelerator.clip_grad_norm_

    def recording_step(optimizer: Any, *args: Any) -> Any:
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
        options = {tuple(group[name] for name in names) for group in optimizer.param_groups}
        weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        steps.append((*options, weights))
        return step(optimizer, *args)

    def recording_clip(accelerator: Any, parameters: Any, max_norm: float, *args: Any) -> Any:
        steps.append(max_norm)
        return clip(accelerator, parameters, max_norm, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", recording_clip)
    found = []
    for run in (
        lambda: curves_trl.run_agro(tmp_path, 0, 6, curves_trl.LEARNING_RATE),
        lambda: curves_trl.run_trl(tmp_path, 0, 6),
    ):
        steps.clear()
        numbers = run()
        assert len(numbers) == 6 and numbers[0]["kl"] == pytest.approx(0.0, abs=1e-4)
        found.append(list(steps))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(found[0]) == 12 and found[0] == found[1]
    rates = [entry[0][0] for entry in found[0][1::2]]
    assert rates[0] == 0.0 and max(rates) == pytest.approx(1e-4) and rates[-1] < 5e-5


@pytest.mark.slow
def test_smollm2_takes_a_step(tmp_path: Path) -> None:
    """A real model with a real vocabulary: SmolLM2-135M, one step of 2 x 2 completions."""
    from agro_train.policy.load import load_model, load_tokenizer

    model = load_model("smollm2", TrainConfig(model="smollm2"))
    tokenizer = load_tokenizer("smollm2")
    model.save_pretrained(tmp_path / "smollm2")
    tokenizer.save_pretrained(tmp_path / "smollm2")
    del model
    prompt = [{"role": "user", "content": "What is 7 times 4? Answer with just the number."}]
    recorder = Recorder()
    trainer = AGROTrainer(
        str(tmp_path / "smollm2"),
        lambda completions, **_: [float(len(c[0]["content"]) % 2) for c in completions],
        AGROConfig(
            **common(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2),
            num_generations=2,
            max_completion_length=8,
            beta=0.1,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt}, {"prompt": prompt}]),
        callbacks=[recorder],
    )
    trainer.train()
    assert all(gradient.isfinite().all() for gradient in recorder.gradients.values())
    assert "agro/variance" in trainer.state.log_history[0]
