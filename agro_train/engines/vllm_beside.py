"""vLLM beside the trainer, on its device."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from agro_train.config import TrainConfig
from agro_train.engines.engine import BrokenEngine
from agro_train.engines.vllm_client import (
    BACKEND,
    EXTENSION,
    MOST_LOGPROBS,
    Answer,
    Request,
    check_whole,
    forget,
    reads_in_parts,
)
from agro_train.engines.weights import Parcel


@dataclass(frozen=True)
class Served:
    """What an engine beside the trainer is to serve."""

    model: PretrainedConfig
    dtype: torch.dtype
    length: int  # tokens of a prompt and its completion, at most
    config: TrainConfig
    tokenizer: Any


class Colocated:
    """vLLM in a process of its own, on this one's device. It starts without weights."""

    takes_tensors = False
    options: ClassVar[dict[str, Any]] = {}  # of vLLM's, besides those below

    def __init__(self, served: Served) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams
        from vllm.config import WeightTransferConfig

        self.sampling_params, config = SamplingParams, served.config
        with tempfile.TemporaryDirectory() as folder, broken("to start"):
            served.model.save_pretrained(folder)
            if config.stop:
                served.tokenizer.save_pretrained(folder)  # stop strings are looked for in text
            self.llm = LLM(
                model=folder,
                skip_tokenizer_init=not config.stop,
                load_format="dummy",
                dtype=str(served.dtype).removeprefix("torch."),
                max_model_len=served.length,
                logprobs_mode="processed_logprobs",
                max_logprobs=MOST_LOGPROBS,
                generation_config="vllm",
                enforce_eager=not torch.cuda.is_available(),
                enable_chunked_prefill=None if reads_in_parts() else False,
                gpu_memory_utilization=config.vllm_gpu_memory_utilization,
                tensor_parallel_size=config.vllm_tensor_parallel_size,
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                worker_extension_cls=EXTENSION,
                **self.options,
            )
            self.llm.init_weight_transfer_engine({"init_info": {}})

    def ask(self, requests: Sequence[Request]) -> list[tuple[int, Answer]]:
        with broken("to answer"):
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
                [
                    self.sampling_params(detokenize=bool(r.parameters.get("stop")), **r.parameters)
                    for r in requests
                ],
                use_tqdm=False,
            )
        answers: list[Answer] = []
        for request, output in zip(requests, outputs, strict=True):
            check_whole(output.outputs[0].finish_reason, "the engine beside the trainer")
            ids = tuple(output.outputs[0].token_ids)
            found = output.outputs[0].logprobs or []
            read = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
            answers.append(
                Answer(
                    ids,
                    tuple(at[token].logprob for token, at in zip(ids, found, strict=False)),
                    tuple(at[token].logprob for token, at in list(read)[1:]),
                    tuple(tuple((i, one.logprob) for i, one in at.items()) for at in found)
                    if request.parameters.get("logprobs")
                    else (),
                )
            )
        return list(enumerate(answers))

    def load(self, parcels: Iterable[Parcel]) -> None:
        taking = "to take new weights"
        with broken(taking):
            self.llm.start_weight_update()
        for parcel in parcels:  # writes the file, and may fail on its own account
            taken = {"path": str(parcel)} if isinstance(parcel, Path) else {"weights": parcel}
            with broken(taking):
                self.llm.update_weights({"update_info": taken})
        with broken(taking):
            self.llm.finish_weight_update()
            forget(lambda: bool(self.llm.reset_prefix_cache()))


@contextmanager
def broken(what: str) -> Iterator[None]:
    """Turns what vLLM raises, of which there is no common class, into BrokenEngine."""
    try:
        yield
    except BrokenEngine:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BrokenEngine(
            f"vllm: expected it {what}, got {type(error).__name__}: {reason[0]}; its own messages "
            "above say more"
        ) from error
