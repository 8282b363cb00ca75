"""A plan as people read it: a table on the console, the same in Markdown."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from agro_train.config import TrainConfig
from agro_train.plan.advice import Change, first_change, fits
from agro_train.plan.architecture import find_architecture
from agro_train.plan.machine import Machine
from agro_train.plan.memory import Plan, plan, product_bytes
from agro_train.plan.speed import Speed, speed


@dataclass(frozen=True)
class Prediction:
    """All that `agro plan` says of a configuration and a machine."""

    config: TrainConfig
    machine: Machine
    plan: Plan
    speed: Speed
    fits: bool
    change: Change | None  # only where it does not fit

    @classmethod
    def of(cls, config: TrainConfig, machine: Machine) -> "Prediction":
        """Raises Refusal for what cannot be planned, or not be launched."""
        architecture: Any = find_architecture(config.model)
        found = plan(config, machine, architecture)
        room = fits(found, machine)
        change = None if room else first_change(config, machine, architecture, found)
        time = speed(config, machine, architecture, found)
        return cls(config, machine, found, time, room, change)

    @property
    def title(self) -> str:
        where = f"{self.machine.gpus} x {self.machine.gpu}"
        if self.machine.bytes:
            where += f" of {_gb(self.machine.bytes)} GB"
        return f"{self.config.model}, {where}: predicted GB of one"

    def rows(self) -> list[list[str]]:
        """The table: a header, a row for each kind of thing, and the sums."""
        stages = self.plan.stages
        names = dict.fromkeys(part.name for stage in stages for part in stage.parts if part.bytes)
        lines = [["", *(stage.name for stage in stages)]]
        for name in names:
            sizes = [sum(p.bytes for p in stage.parts if p.name == name) for stage in stages]
            lines.append([name, *(_gb(size) if size else "" for size in sizes)])
        return [*lines, ["all", *(_gb(stage.total) for stage in stages)]]

    def sentences(self) -> list[str]:
        """What the table leaves open."""
        found, config = self.plan, self.config
        weights, in_products = found.weights, found.weights.count * product_bytes(config)
        lines = [self.verdict()]
        trained = f", {weights.trained_count / 1e6:.1f} M of them trained" * config.use_peft
        lines.append(
            f"{weights.count / 1e9:.2f} G weights{trained}; micro-batches of {found.micro_batch} "
            "tokens; prompts and completions as long as the configuration allows."
        )
        sampled = (
            f"{found.cache_row / 1e9:.3g} GB of key-value cache a sequence"
            + f", {found.cache_rows} sequences at once" * bool(found.cache_rows)
        )
        if config.use_vllm and config.vllm_mode == "server":
            sampled += (
                f"; vLLM's servers hold {_gb(in_products)} GB of weights each, over the GPUs of one"
            )
        elif config.use_vllm:
            share = config.vllm_gpu_memory_utilization * self.machine.bytes
            own = in_products / config.vllm_tensor_parallel_size
            sampled += f"; vLLM's share holds {_gb(own)} GB of weights and " + (
                f"{max(0, int((share - own) / found.cache_row))} longest sequences"
            )
        lines.append(f"Sampling: {sampled}.")
        lines.append(
            f"Host: {_gb(found.host_start)} GB a node while models are loaded ("
            f"{self.machine.beside} process{'es' * (self.machine.beside > 1)}), "
            f"{_gb(found.host_checkpoint)} GB "
            + ("a node" if found.in_shards else "on the main node")
            + " while a checkpoint is written"
            + (f", {_gb(found.sent)} GB of weights on their way" if found.sent else "")
            + f". Disk: {_gb(found.checkpoint)} GB a checkpoint, {_gb(found.disk)} GB in all."
        )
        lines.append(self.timing())
        return lines

    def verdict(self) -> str:
        """Whether it fits, and if not what to change first."""
        found, machine = self.plan, self.machine
        needs = f"The peak is {_gb(found.peak)} GB, in the stage {found.worst.name}"
        if not machine.bytes:
            return f"{needs}."
        needs += f", and {_gb(machine.reserved)} GB are kept for what is not tensors" * machine.cuda
        if self.fits:
            return f"{needs}: it fits {_gb(machine.bytes)} GB."
        told = f"{needs}: it does not fit {_gb(machine.bytes)} GB."
        if self.change is None:
            return f"{told} No one setting saves anything: more GPUs, or a smaller model."
        enough = "" if self.change.fits else ", which is not enough alone"
        return (
            f"{told} Change first: {self.change.settings} would save {_gb(self.change.saves)} GB"
            f"{enough}."
        )

    def timing(self) -> str:
        if self.speed.update is None:
            return "Time: predicted for GPUs and bfloat16 products only."
        line = (
            f"Time a step, at least: {_seconds(self.speed.update)} for scoring and update at "
            f"{self.machine.efficiency:.0%} of the datasheet's products"
        )
        if self.machine.gpus > 1 and self.speed.network is not None:
            line += f" (the network alone: {_seconds(self.speed.network)})"
        if self.speed.sampling is not None:
            return f"{line}, and {_seconds(self.speed.sampling)} for sampling."
        return f"{line}; what vLLM takes is not predicted."


def show(prediction: Prediction, console: Console | None = None) -> None:
    """Prints the table and its sentences."""
    console = console or Console()
    header, *rows = prediction.rows()
    table = Table(title=prediction.title)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    console.print(table)
    for sentence in prediction.sentences():
        console.print(sentence, soft_wrap=not console.is_terminal, markup=False, highlight=False)
    console.print("Predictions, not measurements: docs/planning.md says what they leave out.")


def as_markdown(prediction: Prediction) -> str:
    header, *rows = prediction.rows()
    lines = [f"*{prediction.title}.*", "", f"| {' | '.join(header)} |"]
    lines.append("|---|" + "---:|" * (len(header) - 1))
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"* {each}" for each in prediction.sentences()), ""])


def _gb(size: float) -> str:
    """Three digits, but no more than tenths of a GB are of interest where there are many."""
    gigabytes = size / 1e9
    return (
        f"{gigabytes:.0f}"
        if gigabytes >= 100
        else f"{gigabytes:.1f}"
        if gigabytes >= 1
        else (f"{gigabytes:.2g}")
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
