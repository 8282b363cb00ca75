"""One run of an experiment with a language model: its settings, its start, its curve.

A run is a shipped configuration with a few settings changed, through the trainer's own `setup`,
`take_step` and `evaluate`. A seed fixes the warm start, the order of the prompts and the
random numbers of every completion, so runs of one seed differ by their settings alone.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

import yaml
from transformers.utils import logging as transformers_logging

from agro_train import config as configuration
from agro_train.commands.record import record
from agro_train.commands.sampler import load_sampler
from agro_train.config import TrainConfig
from agro_train.data.batch import build_batch
from agro_train.data.rollout_log import write_rollouts
from agro_train.evaluate import by_prompt, evaluate, mean_reward, summarise
from agro_train.policy.load import load_base, load_tokenizer, set_matmul_precision
from agro_train.rewards.functions import load_rewards, score
from agro_train.run import Run
from agro_train.seeds import derive_seed
from agro_train.setup import setup
from agro_train.step import score_batch
from agro_train.train import take_step

BASE = "graded-sums"  # the shipped configuration that runs start from, where none is named
RECORDED = "[reference.jsonl]"  # as `recorded`: the reference's generations for every prompt
# Seconds in place of minutes, too short to show anything: that everything runs.
QUICK = {
    "warm_start_steps": 40,
    "steps": 2,
    "eval_every": 2,
    "eval_generations": 1,
    "eval_prompts": 40,
    "prompts_per_step": 8,
    "num_generations": 2,
}
QUICK_PROMPTS = 100  # recorded for a quick run, in place of every one
# Groups of held-out prompts by the reference's pass rate: at least the first, below the second.
BUCKETS = {
    "below": (0.0, 0.5),
    "above": (0.5, 1.01),
    **{f"bin{i}": (i / 5, (i + 1) / 5 + 0.01 * (i == 4)) for i in range(5)},
}

# Of the updates: a curve has their means over those since the mark before.
TRAINING = ("reward", "kl", "entropy")
Curve = list[dict[str, float]]
"""Its marks; "learned" and "sampled" are completions so far."""


@dataclass(frozen=True)
class Point:
    """One run: its seed, and what it changes in a shipped configuration."""

    settings: str  # as `agro train` takes them, sorted by key; none that the base has anyway
    seed: int
    base: str = BASE

    @property
    def named(self) -> set[str]:
        """The settings that it or its base configuration names; the others have their defaults."""
        return {each.partition("=")[0] for each in self.settings.split()} | named_by(self.base)

    @property
    def command(self) -> str:
        """Runs it again, after `agro rollout` where it has recorded=[reference.jsonl]."""
        return " ".join(["agro train", self.base, *self.settings.split(), f"seed={self.seed}"])

    def config(self, *more: str) -> TrainConfig:
        return _load(self.base, *self.settings.split(), f"seed={self.seed}", *more)


def point(seed: int, settings: Mapping[str, object], base: str = BASE) -> Point:
    """Equal runs are equal points, so that figures share them: however their numbers were written,
    and whether or not they name what the base configuration has anyway."""
    given = {key: _text(settings[key]) for key in sorted(settings)}
    asked, shipped = _load(base, *(f"{k}={v}" for k, v in given.items())), _load(base)
    off_policy = (
        asked.recorded_prompts_per_step or asked.replayed_prompts_per_step or asked.max_staleness
    )
    for key in list(given):
        idle = key.startswith("off_policy") and not (off_policy and asked.algorithm == "agro")
        if idle or getattr(asked, key) == getattr(shipped, key):
            del given[key]
    numbers = {k: _text(getattr(asked, k)) for k in given if isinstance(getattr(asked, k), float)}
    return Point(" ".join(f"{k}={v}" for k, v in (given | numbers).items()), seed, base)


@cache  # a table asks for thousands, each some milliseconds
def _load(base: str, *settings: str) -> TrainConfig:
    return configuration.load(configuration.find(base), settings)


@cache
def version(base: str) -> str:
    """A shipped configuration's name with a digest of its text."""
    return f"{base}@{hashlib.sha256(configuration.find(base).read_bytes()).hexdigest()[:8]}"


# What a run's numbers do not depend on; on the attention no more than on the machine.
COSMETIC = (
    "output_dir",
    "samples_every",
    "report_to",
    "project",
    "run_name",
    "save_total_limit",
    "attn_implementation",
)


def defaults() -> dict[str, object]:
    """What a run has for the settings that neither it nor its base configuration names."""
    return {key: value for key, value in asdict(TrainConfig()).items() if key not in COSMETIC}


@cache
def named_by(base: str) -> frozenset[str]:
    """The settings that a shipped configuration names."""
    return frozenset(yaml.safe_load(configuration.find(base).read_text()))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


# --- Where runs start -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The model that a seed's runs start from, their reference, and what is known of it."""

    folder: Path
    model: str  # the warm-started one is kept in the folder
    pass_rates: Mapping[str, float]  # by held-out prompt

    @property
    def recorded(self) -> Path:
        return self.folder / "reference.jsonl"


def start_name(one: Point) -> str:
    """Equal for points that start from one model."""
    config = one.config()
    shaping = (version(one.base), config.model, config.warm_start_steps, start_samples(config))
    return f"{one.base}-{one.seed}-{hashlib.sha256(repr(shaping).encode()).hexdigest()[:8]}"


def start_samples(config: TrainConfig) -> int:
    """How many completions of each held-out prompt measure the reference's pass rate."""
    return 8 * config.eval_generations


def make_start(one: Point, work: Path, recorded_prompts: int | None) -> Start:
    """The start of a run, made in `work` where it is not there; if the run learns from the
    reference's generations, with them, for `recorded_prompts` prompts (None: all). A folder has its
    final name when it is complete."""
    folder = work / start_name(one)
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as partial:
            made = Path(partial) / "start"
            _make_start(_start_config(one), made)
            made.rename(folder)
    kept = folder / "model"
    config = one.config()
    model = str(kept) if kept.exists() else config.model
    start = Start(folder, model, json.loads((folder / "pass_rates.json").read_text()))
    if config.recorded and not start.recorded.exists():
        record(_start_config(one, f"model={start.model}"), start.recorded, recorded_prompts)
    return start


def _start_config(one: Point, *more: str) -> TrainConfig:
    """Of all the configuration's prompts, whichever of them the run has."""
    config = one.config()
    kept = (f"{key}={getattr(config, key)}" for key in ("warm_start_steps", "eval_generations"))
    return Point("", one.seed, one.base).config(*kept, *more)


def _make_start(config: TrainConfig, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    set_matmul_precision(config.matmul_precision)  # as a run's own warm start has it
    if config.model == "tiny":
        tokenizer = load_tokenizer("tiny")
        model, _ = load_base("tiny", config, tokenizer)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        config = replace(config, model=str(folder / "model"))
    folder.mkdir(exist_ok=True)
    sampler = load_sampler(config)
    count = start_samples(config)
    prompts = sampler.questions.held_out
    rollouts = sampler.engine().complete(
        prompts,
        seeds=[derive_seed(config.seed, "pass rate", p.text) for p in prompts],
        num_generations=count,
        temperature=config.temperature,
        step=None,
    )
    scored = score(rollouts, load_rewards(config))
    rates = {
        prompt.text: mean_reward(scored[i * count : (i + 1) * count])
        for i, prompt in enumerate(prompts)
    }
    (folder / "pass_rates.json").write_text(json.dumps(rates))


# --- A run ----------------------------------------------------------------------------------------


def measure(one: Point, work: Path, recorded_prompts: int | None = None) -> Curve:
    """Trains and returns the curve: at step 0, every eval_every steps and at the end.
    recorded_prompts: see make_start."""
    config = one.config()
    start = make_start(one, work, recorded_prompts)
    with tempfile.TemporaryDirectory() as folder:
        more = [f"model={start.model}", f"output_dir={os.path.join(folder, 'run')}"]
        if config.recorded:
            more.append(f"recorded=[{start.recorded}]")
        run = setup(one.config(*more), resume=False)
        with closing(run.fresh):
            return _curve(run, start.pass_rates)


def _curve(run: Run, pass_rates: Mapping[str, float]) -> Curve:
    config = run.config
    curve: Curve = []
    since: list[dict[str, float]] = []
    learned = sampled = 0
    for step in range(config.steps + 1):
        if step % config.eval_every == 0 or step == config.steps:
            curve.append(
                {
                    "step": step,
                    "learned": learned,
                    "sampled": sampled,
                    **{name: _mean(since, name) for name in TRAINING},
                    **held_out(run, step, pass_rates),
                }
            )
            since = []
        if step < config.steps:
            metrics, rollouts = take_step(run, step)
            if config.replay_fraction:  # later steps read it
                write_rollouts(run.folder.rollouts(step + 1), rollouts)
            learned += len(rollouts)
            sampled += sum(rollout.source == "fresh" for rollout in rollouts)
            since.append(metrics)
    return curve


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return fmean(row[name] for row in rows) if rows else float("nan")


def held_out(run: Run, step: int, pass_rates: Mapping[str, float]) -> dict[str, float]:
    """The policy on the held-out prompts: greedy, sampled, sampled by the prompt's pass rate at the
    start, and the sampled completions' mean log-ratio to the reference (nats a completion: the KL,
    whatever the policy learned from) and entropy (nats a token)."""
    config = run.config
    numbers = range(len(run.questions.held_out))
    result = evaluate(run.engine, run.questions.held_out, numbers, run.rewards, config, step)
    summary = summarise(result)
    batch = build_batch(
        result.sampled,
        [i // config.eval_generations for i in range(len(result.sampled))],
        [True] * len(result.sampled),
        token_budget=config.token_budget,
        share_prompts=config.share_prompts,
    )
    models, device = run.models, run.accelerator.device
    scores, _ = score_batch(models.policy, models.reference, batch, batch.micro, config, device)
    found = {
        "eval_accuracy": summary["eval_accuracy"],
        "eval_reward": summary["eval_reward"],
        "eval_kl": float((scores.logprobs - scores.ref_logprobs).mean()),
        "eval_entropy": float(scores.entropy) / int(scores.num_tokens),
    }
    groups = by_prompt(result)
    for name, (low, high) in BUCKETS.items():
        chosen = [group for group in groups if low <= pass_rates[group[0].prompt] < high]
        found[f"eval_{name}"] = mean_reward([rollout for group in chosen for rollout in group])
    return found
