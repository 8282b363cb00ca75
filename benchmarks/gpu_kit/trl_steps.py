"""Steps of TRL's GRPOTrainer on the same model: as many prompts, completions and tokens of each."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from agro_train.config import TrainConfig
from benchmarks.gpu_kit import shapes
from benchmarks.gpu_kit.parts import Job
from benchmarks.gpu_kit.reward import reward
from benchmarks.gpu_kit.stopwatch import Stopwatch
from benchmarks.gpu_kit.supervise import Report
from benchmarks.measure import timing
from benchmarks.trainer.step_loops import trl_settings


def run(report: Report, folder: Path, job: Job) -> None:
    """As agro_steps.run. Rewards are part of its score."""
    import trl

    device = "cuda" if torch.cuda.is_available() else "cpu"
    (shape,) = job.shapes
    source = shapes.write_folder(shape, folder / shape)
    config = shapes.architecture(shape)
    prompts = shapes.write_prompts(job, config.vocab_size, folder / "prompts.jsonl")
    model: Any = shapes.random_model(config, "bfloat16" if job.lora else "float32", device)
    if not job.lora:  # the reference is loaded once more, by the name of the policy's folder
        model.save_pretrained(source)
        model = str(source)
    at_once = job.groups_at_once * job.generations
    watch = Stopwatch(report, device)

    class Borders(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            self.step = watch.phase("step")
            self.step.__enter__()

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            self.step.__exit__(None, None, None)
            watch.seconds["score"] = watch.seconds["rollout"] - watch.seconds["generate"]
            watch.peaks |= {"score": watch.peaks["rollout"], "update": watch.peaks["step"]}
            tokens = job.prompts * job.generations * job.completion_length
            watch.tell(watch.seconds["step"] - watch.seconds["rollout"], tokens)

    arguments = trl.GRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=job.prompts // job.groups_at_once,
        gradient_checkpointing=job.gradient_checkpointing,
        bf16=True,
        use_cpu=device == "cpu",
        **trl_settings(job.generations, job.completion_length, job.steps),
        **({} if job.lora else {"model_init_kwargs": {"dtype": "float32"}}),
    )
    ours = TrainConfig()
    adapter = LoraConfig(
        r=ours.lora_r,
        lora_alpha=ours.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer: Any = trl.GRPOTrainer(
        model=model,
        args=arguments,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=adapter if job.lora else None,
        callbacks=[Borders()],
    )
    report(
        "model",
        shape=shape,
        settings=f"per_device_train_batch_size={at_once} bf16=True trl={trl.__version__}",
        work=vars(shapes.work(config, job)),
        planned_gb={},
        weights=sum(p.numel() for p in trainer.model.parameters()),
        trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )
    trainer._generate = watch.timed("generate", trainer._generate)
    trainer._generate_and_score_completions = watch.timed(
        "rollout", trainer._generate_and_score_completions
    )
    trainer.train()
    if device == "cuda":
        report("clocks", **timing.gpu_facts())
