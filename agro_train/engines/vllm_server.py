"""A vLLM server, asked over HTTP, and the command that starts one."""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from agro_train.engines.engine import TOKENS_S, BrokenEngine
from agro_train.engines.keep_alive import urlopen
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
from agro_train.engines.weight_transfer import Kind, Transfer, join
from agro_train.engines.weights import Parcel
from agro_train.refusal import Refusal

RETRY_S = 1.0


class Server:
    """A vLLM server, as `agro serve` starts one. `timeout_s` is for its start, and for every answer
    but tokens."""

    def __init__(self, base_url: str, timeout_s: float) -> None:
        self.base_url, self.timeout_s = base_url.rstrip("/"), timeout_s
        self.transfer: Transfer | None = None  # by which weights come; None: by files

    def check(self, length: int) -> None:
        """Waits until the server is up. Raises Refusal if it is none that takes tokens, or that
        reads fewer than `length` of them."""
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
            self._tokens(Request((0,), {"max_tokens": 1}), self.timeout_s)
        except BrokenEngine as error:
            raise Refusal(
                f"vllm: expected a server that takes tokens, got {error}; {hint}"
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
        """From now on weights come by files. Ends the group that the server is in, whoever has
        joined it."""
        self.close()
        try:
            self._call("/init_weight_transfer_engine", {"init_info": {}})
        except BrokenEngine as error:
            raise BrokenEngine(
                f"vllm: expected a server that takes new weights, got {error}; start it with "
                "`agro serve MODEL`"
            ) from error

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
            check_whole(choice.get("finish_reason") or "stop", self.base_url)
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
            with urlopen(request, timeout=timeout_s) as response:
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
