"""Steps of `agro train` itself, on a model with random weights that is made on the device."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from agro_train import config as configuration
from agro_train import models, setup, step, train
from agro_train.config import TrainConfig
from agro_train.engines import transformers_engine
from agro_train.plan.advice import fits
from agro_train.plan.machine import Machine
from agro_train.plan.memory import Plan, plan
from agro_train.policy.attention import name_at_load, settle
from agro_train.policy.load import load_architecture, prepare
from benchmarks.gpu_kit import shapes
from benchmarks.gpu_kit.parts import Job
from benchmarks.gpu_kit.stopwatch import Stopwatch
from benchmarks.gpu_kit.supervise import Report
from benchmarks.measure import timing


def run(report: Report, folder: Path, job: Job) -> None:
    """Reports the model, what is planned for it, each step, and the clocks right after the last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, config, planned = choose(job, folder, device)
    found: Any = shapes.architecture(shape)
    report(
        "model",
        shape=shape,
        settings=" ".join(settings(job)),
        work=vars(shapes.work(found, job)),
        planned_gb=planned_gb(planned),
        weights=planned.weights.count,
        trained=planned.weights.trained_count,
    )
    watch = Stopwatch(report, device)

    def load_base(source: str, config: TrainConfig, tokenizer: Any) -> tuple[Any, None]:
        model = shapes.random_model(
            load_architecture(source),
            config.dtype,
            device,
            name_at_load(config.attn_implementation),
        )
        settle(model, config.attn_implementation)
        prepare(model, config)
        return model, None

    with (
        mock.patch.object(models, "load_base", load_base),
        mock.patch.object(
            transformers_engine, "generate", watch.timed("generate", transformers_engine.generate)
        ),
        mock.patch.object(step, "score_batch", watch.timed("score", step.score_batch)),
        mock.patch.object(train, "update", watch.timed("whole update", step.update)),
    ):
        started = setup.setup(config, resume=False)
        engine: Any = started.engine
        engine.end_tokens = {found.vocab_size}  # an id that is never drawn
        try:
            for number in range(config.steps):
                with watch.phase("step"):
                    _, rollouts = train.take_step(started, number)
                watch.peaks["update"] = watch.peaks["whole update"]
                watch.tell(
                    update_s=watch.seconds["whole update"] - watch.seconds["score"],
                    completion_tokens=sum(len(rollout.completion_ids) for rollout in rollouts),
                )
            if device == "cuda":
                report("clocks", **timing.gpu_facts())
        finally:
            started.fresh.close()
            started.lock.release()


def settings(job: Job) -> list[str]:
    """The job as a run's settings, but for the model and the files."""
    lora = ["use_peft=true", "dtype=bfloat16"] if job.lora else []
    return [
        *lora,
        "mixed_precision=bf16",
        f"gradient_checkpointing={str(job.gradient_checkpointing).lower()}",
        f"steps={job.steps + 1}",
        f"prompts_per_step={job.prompts}",
        f"num_generations={job.generations}",
        f"max_prompt_length={job.prompt_length}",
        f"max_completion_length={job.completion_length}",
        f"generation_batch_size={job.prompts * job.generations}",
        f"token_budget={job.token_budget}",
        "beta=0.01",
        "learning_rate=1e-6",
        "eval_every=0",
        "eval_prompts=0",
        "reward=benchmarks.gpu_kit.reward:reward",
    ]


def choose(job: Job, folder: Path, device: str) -> tuple[str, TrainConfig, Plan]:
    """The first of the job's shapes whose plan fits the device, or the last one."""
    machine = Machine(gpus=1, gpu="cpu")
    if device == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        machine = Machine(gpus=1, memory=memory / 1e9)
    for shape in job.shapes:
        model = shapes.write_folder(shape, folder / shape)
        data = folder / "prompts.jsonl"
        shapes.write_prompts(job, shapes.architecture(shape).vocab_size, data)
        files = [f"model={model}", f"data={data}", f"output_dir={folder / 'run'}"]
        config = configuration.load(None, [*settings(job), *files])
        planned = plan(config, machine)
        if fits(planned, machine):
            break
    return shape, config, planned


def planned_gb(planned: Plan) -> dict[str, float]:
    """What the plan has for each phase."""
    totals = {stage.name: stage.total / 1e9 for stage in planned.stages}
    return {
        "generate": totals["sampling"],
        "score": totals["scoring"],
        "update": max(totals["update"], totals["optimiser"]),
    }
