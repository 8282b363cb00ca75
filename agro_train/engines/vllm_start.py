"""How a run gets vLLM: started beside it, or found as servers that take its weights."""

import importlib.util
import logging
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from agro_train.config import TrainConfig
from agro_train.engines.engine import BrokenEngine
from agro_train.engines.turns import Dialogue
from agro_train.engines.vllm_beside import Colocated, Served
from agro_train.engines.vllm_client import Client
from agro_train.engines.vllm_engine import VllmEngine, together
from agro_train.engines.vllm_ranks import Shared, alone
from agro_train.engines.vllm_servers import Servers
from agro_train.engines.weight_transfer import Kind
from agro_train.engines.weights import make_weights_folder, rollout_dtype
from agro_train.policy.policy import unwrap
from agro_train.refusal import Refusal

logger = logging.getLogger(__name__)


def start(
    config: TrainConfig,
    policy: nn.Module,
    accelerator: Any,
    tokenizer: Any,
    end_tokens: set[int],
    longest_prompt: int,
    dialogue: Dialogue | None = None,
) -> VllmEngine:
    """Starts vLLM, or finds the server. Raises Refusal, in one sentence, where it cannot."""
    # At least two tokens: the probe's first, and one more that goes with its log-probability.
    length = longest_prompt + max(2, config.max_completion_length)
    client: Client
    if config.vllm_mode == "server":
        servers = Servers(config.vllm_server_base_url, config.vllm_server_timeout)
        servers.check(length)
        make_weights_folder(config, takes_tensors=join_group(config, servers, accelerator))
        client = servers
    else:
        if 0 < config.vllm_max_model_length < length:
            raise Refusal(
                f"vllm_max_model_length: expected at least {length}, the longest prompt and "
                f"completion, got {config.vllm_max_model_length}; 0 sets it"
            )
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise Refusal(
                f"use_vllm: expected the package vllm, got none that works ({error}); pip install "
                "'.[vllm]' in this project's folder, or set vllm_mode=server"
            ) from error
        make_weights_folder(config)
        length = config.vllm_max_model_length or length
        model, dtype = unwrap(policy).model.config, rollout_dtype(config)
        served = Served(model, dtype, length, config, tokenizer)
        client = together(lambda: colocated(served, accelerator))
    engine = VllmEngine(client, policy, accelerator, tokenizer, end_tokens, config, dialogue)
    if config.truncates and isinstance(client, Servers):
        client.check_logprobs(engine.num_logprobs())
    return engine


def colocated(served: Served, accelerator: Any) -> Colocated:
    """vLLM beside this rank, started."""
    if accelerator.num_processes == 1:
        return Colocated(served)
    if served.config.vllm_tensor_parallel_size > 1:
        return Shared(served)
    with alone(accelerator.local_process_index):
        return Colocated(served)


def join_group(config: TrainConfig, servers: Servers, accelerator: Any) -> bool:
    """Whether weights go to the servers by a group that the main rank and their workers have
    joined, or else by files. Raises Refusal, on every rank, where they do not take them so."""
    wanted, device = config.vllm_weight_transfer, accelerator.device
    by_files = wanted == "files" or (wanted == "auto" and device.type != "cuda")
    if wanted == "nccl" and device.type != "cuda":
        raise Refusal(
            f"vllm_weight_transfer: expected the trainer on a GPU with nccl, got {device.type}; "
            "set auto, gloo or files"
        )
    kind: Kind = "gloo" if wanted == "gloo" else "nccl"

    def joined() -> bool:
        # By the main rank alone: what another one said later would end the main one's group.
        if not accelerator.is_main_process:
            return False
        if wanted != "nccl":  # of which alone a server with vLLM's own backend knows
            servers.take_files()
        if by_files:
            return False
        try:
            if kind == "nccl" and importlib.util.find_spec("vllm") is None:
                raise BrokenEngine(
                    "vllm_weight_transfer: expected the package vllm with nccl, got none; pip "
                    "install '.[vllm]' in this project's folder, or set vllm_weight_transfer=files"
                )
            servers.join(kind, device)
        except BrokenEngine as error:
            if wanted != "auto":
                raise
            servers.take_files()
            logger.warning("Weights go to vLLM by files: %s", error)
            return False
        return True

    found: list[bool] = broadcast_object_list([together(joined)])
    return found[0]
