"""vLLM in a process beside this one, or as a server: requests of tokens, answers of tokens.

Both are asked in the same way, and both take new weights through vLLM's own weight transfer
interface, with the backend of `vllm_worker`.
"""

import http.client
import json
import logging
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig

from agro_train.config import TrainConfig
from agro_train.engines.engine import BrokenEngine
from agro_train.engines.weight_transfer import Kind, Transfer, join
from agro_train.engines.weights import MEMORY, Parcel
from agro_train.refusal import Refusal
from agro_train.settings import MOST_KEPT

BACKEND = "agro"  # of weight transfer
EXTENSION = "agro_train.engines.vllm_worker.WorkerExtension"
AT_ONCE = 256  # requests to a server
# Seconds for a request of tokens. Those of all ranks queue up at the server, and a step's may well
# take an hour; a server that dies closes its connections, and is noticed at once all the same.
TOKENS_S = 6 * 3600.0
RETRY_S = 1.0
# A token, for the ids that top_k kept: twice as many, for vLLM keeps those that tie with the last.
MOST_LOGPROBS = 2 * MOST_KEPT
FORGET_S = 10.0


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    parameters: dict[str, Any]  # of vLLM's SamplingParams


@dataclass(frozen=True)
class Answer:
    ids: tuple[int, ...]  # as sampled, the end token included
    logprobs: tuple[float, ...]  # of ids, nats; of the processed logits, so at the temperature
    prompt_logprobs: tuple[float, ...]  # of prompt_ids[1:] at temperature 1, if they were asked for
    # Of each of ids, the likeliest ids there with their log-probabilities, if they were asked for.
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()


class Answerer(Protocol):
    def ask(self, requests: Sequence[Request]) -> Iterable[tuple[int, Answer]]:
        """The requests' places and their answers, as they come."""


class Client(Answerer, Protocol):
    @property
    def takes_tensors(self) -> bool:
        """Or else files."""

    def load(self, parcels: Iterable[Parcel]) -> None:
        """Takes all the weights, in parcels that are asked for one by one, and forgets what it has
        computed with the old ones."""


class Colocated:
    """vLLM in a process of its own, on this one's device. It starts without weights."""

    takes_tensors = False
    options: ClassVar[dict[str, Any]] = {}  # of vLLM's, besides those below

    def __init__(
        self,
        model: PretrainedConfig,
        dtype: torch.dtype,
        length: int,
        config: TrainConfig,
        tokenizer: Any,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, SamplingParams
        from vllm.config import WeightTransferConfig

        self.sampling_params = SamplingParams
        with tempfile.TemporaryDirectory() as folder, broken("to start"):
            model.save_pretrained(folder)
            if config.stop:
                tokenizer.save_pretrained(folder)  # stop strings are looked for in text
            self.llm = LLM(
                model=folder,
                skip_tokenizer_init=not config.stop,
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=length,
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


def forget(reset: Callable[[], bool]) -> None:
    """Empties the prefix cache. It cannot be done while a request still holds a part of it, which
    lasts a moment longer than the request."""
    deadline = time.monotonic() + FORGET_S
    while not reset():
        if time.monotonic() > deadline:
            raise BrokenEngine(
                f"vllm: expected it to empty its prefix cache within {FORGET_S:g} s, got requests "
                "that still use it; let nobody else ask the run's server"
            )
        time.sleep(0.05)


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


class Server:
    """A vLLM server, as `agro serve` starts one. `timeout_s` is for its start, and for every answer
    but tokens."""

    def __init__(self, base_url: str, timeout_s: float) -> None:
        self.base_url, self.timeout_s = base_url.rstrip("/"), timeout_s
        self.transfer: Transfer | None = None  # by which weights come; None: by files

    def check(self, length: int, *, files: bool = True) -> None:
        """Waits until the server is up. Raises Refusal if it is none that takes new weights, or
        that reads fewer than `length` tokens.

        Args:
            files: whether weights come by files.
        """
        hint = "start it with `agro serve MODEL`"
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                found = self._call("/v1/models")
                with self._answered():
                    got = int(found["data"][0].get("max_model_len") or length)
                break
            except BrokenEngine as error:
                if time.monotonic() > deadline:
                    raise Refusal(
                        f"vllm_server_base_url: expected a vLLM server at {self.base_url}, got no "
                        f"answer of one within {self.timeout_s:g} s ({error}); {hint}"
                    ) from error
                time.sleep(1.0)
        if got < length:
            raise Refusal(
                f"vllm: expected a server that reads {length} tokens, the longest prompt and "
                f"completion, got one that reads {got}; {hint} --max-model-len {length}"
            )
        try:
            if files:
                self.take_files()
            self._tokens(Request((0,), {"max_tokens": 1}), self.timeout_s)
        except BrokenEngine as error:
            raise Refusal(
                f"vllm: expected a server that takes new weights and tokens, got {error}; {hint}"
            ) from error

    def check_logprobs(self, count: int) -> None:
        """Raises Refusal if the server does not tell the log-probabilities of `count` ids."""
        try:
            self._tokens(Request((0,), {"max_tokens": 1, "logprobs": count}), self.timeout_s)
        except BrokenEngine as error:
            raise Refusal(
                f"top_k: expected a server that tells {count} log-probabilities a token, of which "
                f"the ids kept are read, got {error}; start it with `agro serve MODEL`"
            ) from error

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        with ThreadPoolExecutor(min(AT_ONCE, len(requests))) as threads:
            places = {threads.submit(self._tokens, one): i for i, one in enumerate(requests)}
            for future in as_completed(places):
                yield places[future], future.result()

    def join(self, kind: Kind, device: torch.device) -> None:
        """From now on weights come from a group of this process and the server's workers."""
        found = self._call("/get_world_size")
        with self._answered():
            workers = int(found["world_size"])
        self.transfer = join(
            kind,
            self.base_url,
            workers,
            lambda meeting: self._call("/init_weight_transfer_engine", {"init_info": meeting}),
            device,
            self.timeout_s,
        )

    def take_files(self) -> None:
        """From now on weights come by files."""
        self.close()
        self._call("/init_weight_transfer_engine", {"init_info": {}})

    def close(self) -> None:
        """Leaves the group."""
        if self.transfer is not None:
            self.transfer.close()
        self.transfer = None

    def start_load(self) -> None:
        self._call("/start_weight_update", {})

    def take(self, parcel: Parcel) -> None:
        """Some of the weights."""

        def update(info: dict[str, Any]) -> None:
            self._call("/update_weights", {"update_info": info})

        if self.transfer is not None:
            self.transfer.send(load_file(parcel) if isinstance(parcel, Path) else parcel, update)
        else:
            assert isinstance(parcel, Path), "who is in no group takes files"
            update({"path": str(parcel)})

    def finish_load(self) -> None:
        """Ends with an empty prefix cache."""
        self._call("/finish_weight_update", {})

        def emptied() -> bool:
            found = self._call("/reset_prefix_cache", {})
            with self._answered():
                return bool(found["success"])

        forget(emptied)

    def _tokens(self, request: Request, timeout_s: float = TOKENS_S) -> Answer:
        path = "/inference/v1/generate"
        body = {"token_ids": list(request.prompt_ids), "sampling_params": request.parameters}
        # Asked again once where the connection is refused, as it may be to one of many at once:
        # the server then has not seen the request.
        found = self._call(path, body, timeout_s, attempts=2)
        with self._answered():
            choice = found["choices"][0]
            logprobs = (choice.get("logprobs") or {}).get("content") or []
            read = zip(request.prompt_ids, found.get("prompt_logprobs") or [], strict=False)
            return Answer(
                tuple(int(token) for token in choice["token_ids"]),
                tuple(float(at["logprob"]) for at in logprobs),
                tuple(float(at[str(token)]["logprob"]) for token, at in list(read)[1:]),
                tuple(
                    tuple(
                        (int(one["token"].removeprefix("token_id:")), float(one["logprob"]))
                        for one in at["top_logprobs"]
                    )
                    for at in logprobs
                )
                if request.parameters.get("logprobs")
                else (),
            )

    def _call(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        attempts: int = 1,
    ) -> dict[str, Any]:
        """GET without a body, else POST. Raises BrokenEngine, whatever goes wrong."""
        request = urllib.request.Request(
            self.base_url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with self._answered():
            for left in reversed(range(attempts)):
                try:
                    text = self._read(request, timeout_s or self.timeout_s)
                    break
                except urllib.error.URLError as error:
                    if not (left and isinstance(error.reason, ConnectionRefusedError)):
                        raise
                time.sleep(RETRY_S)
            found: dict[str, Any] = json.loads(text) if text.strip() else {}
            return found

    def _read(self, request: urllib.request.Request, timeout_s: float) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                text: bytes = response.read()
                return text
        except urllib.error.HTTPError as error:
            reason = message(error.read().decode(errors="replace").strip())[:300]
            raise BrokenEngine(
                f"vllm: expected {request.full_url} to work, got status {error.code}: {reason}"
            ) from error

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Turns what asking the server and reading its answer raise into BrokenEngine, on which
        all ranks end together."""
        try:
            yield
        except BrokenEngine:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise BrokenEngine(
                f"vllm: expected an answer from {self.base_url}, got {error!r}; start the server "
                "again with `agro serve MODEL`, and then the run with --resume"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BrokenEngine(
                f"vllm: expected an answer from {self.base_url} in the form of vLLM's, got one "
                f"that does not read as such ({error!r}); start a server with `agro serve MODEL`"
            ) from error


def message(text: str) -> str:
    """What went wrong, of what a server answers then."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text


class Servers:
    """Several vLLM servers of the same weights, asked as one: each is asked for whole groups.

    One that does not answer is left out for good, and what it was asked is asked again elsewhere:
    it may come back with the weights that it was started with.
    """

    def __init__(self, base_urls: Sequence[str], timeout_s: float) -> None:
        self.alive = [Server(url, timeout_s) for url in base_urls]

    @property
    def takes_tensors(self) -> bool:
        return any(server.transfer for server in self.alive)

    def check(self, length: int, *, files: bool = True) -> None:
        """Every server's. Raises Refusal, as one that is missing at the start is a mistake."""
        for server in self.alive:
            server.check(length, files=files)

    def join(self, kind: Kind, device: torch.device) -> None:
        """Has each server join a group with this process. Raises BrokenEngine where one does
        not."""
        for server in self.alive:
            server.join(kind, device)

    def take_files(self) -> None:
        for server in self.alive:
            server.take_files()

    def close(self) -> None:
        for server in self.alive:
            server.close()

    def check_logprobs(self, count: int) -> None:
        for server in self.alive:
            server.check_logprobs(count)

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        left = dict(enumerate(requests))
        while left:
            alive = list(self.alive)
            prompts = {ids: n for n, ids in enumerate({r.prompt_ids: None for r in left.values()})}
            failed: list[tuple[Server, BrokenEngine]] = []
            with ExitStack() as stack:
                # A pool each: a slow server must not hold up what another one is asked.
                pools = [stack.enter_context(ThreadPoolExecutor(AT_ONCE)) for _ in alive]
                asked = {}
                for place, request in left.items():
                    number = prompts[request.prompt_ids] % len(alive)
                    future = pools[number].submit(alive[number]._tokens, request)
                    asked[future] = place, alive[number]
                for future in as_completed(asked):
                    place, server = asked[future]
                    try:
                        answer = future.result()
                    except BrokenEngine as error:
                        failed.append((server, error))
                        continue
                    del left[place]
                    yield place, answer
            for server, failure in failed:
                self.leave_out(server, failure)

    def load(self, parcels: Iterable[Parcel]) -> None:
        self._all(lambda server: server.start_load())
        for parcel in parcels:
            self._all(lambda server, parcel=parcel: server.take(parcel))  # type: ignore[misc]
        self._all(lambda server: server.finish_load())

    def keep(self, base_urls: set[str]) -> None:
        """Leaves out the others: another rank has found them dead."""
        for server in self.alive:
            if server.base_url not in base_urls:
                server.close()
        self.alive = [server for server in self.alive if server.base_url in base_urls]
        if not self.alive:
            raise BrokenEngine(
                "vllm: expected a server that answers all ranks, got none that does; start them "
                "again with `agro serve MODEL`, and then the run with --resume"
            )

    def leave_out(self, server: Server, error: BrokenEngine) -> None:
        """Raises the error if the server is the last one."""
        if server not in self.alive:
            return
        if len(self.alive) == 1:
            raise error
        self.alive.remove(server)
        server.close()
        logging.getLogger(__name__).warning(
            "%s is left out, %d server(s) go on: %s", server.base_url, len(self.alive), error
        )

    def _all(self, function: Callable[[Server], None]) -> None:
        for server in list(self.alive):
            try:
                function(server)
            except BrokenEngine as error:
                self.leave_out(server, error)


def reads_in_parts() -> bool:
    """Whether vLLM may read a prompt in parts, as it does where many come at once.

    After each part it sets a seeded request's random numbers back, which torch has no way to do on
    a CPU: vLLM would end.
    """
    return torch.cuda.is_available()


def serve_command(model: str, options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of a server that takes a trainer's weights.

    Only this machine reaches it, unless `options` (of `vllm serve`) has a --host: whoever reaches
    it can change its weights.
    """
    defaults = {
        "--weight-transfer-config": json.dumps({"backend": BACKEND}),
        "--worker-extension-cls": EXTENSION,
        "--logprobs-mode": "processed_logprobs",
        "--max-logprobs": str(MOST_LOGPROBS),
        "--generation-config": "vllm",
        "--host": "127.0.0.1",
    }
    # What `vllm serve` runs; that command itself fails where the package is not called vllm, as the
    # build for CPUs is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    for name, value in defaults.items():
        command += [name, value]
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    if not reads_in_parts():
        command.append("--no-enable-chunked-prefill")
    # The requests that start and end an update are among vLLM's development ones.
    command.append("--enable-scale-out")  # requests of tokens
    return [*command, *options], {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}


def weights_folder(config: TrainConfig, *, takes_tensors: bool = False) -> Path:
    """Where weights lie on their way to vLLM: where both sides see them.

    Args:
        takes_tensors: whether they only wait there, and this process sends them on.
    """
    if config.vllm_weights_dir:
        return Path(config.vllm_weights_dir).resolve()
    hosts = {urlsplit(url).hostname for url in config.vllm_server_base_url}
    near = (
        takes_tensors
        or config.vllm_mode == "colocate"
        or hosts <= {"localhost", "127.0.0.1", "::1"}
    )
    if near:
        return MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    return Path(config.output_dir).resolve()
