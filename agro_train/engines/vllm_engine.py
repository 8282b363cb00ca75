"""Completions by vLLM: tokens in, tokens out, the policy's weights sent ahead, and a look at
whether they arrived.

A completion's seed is that of the transformers engine, its tokens are not: vLLM draws its random
numbers in its own way, and its kernels round in theirs. The samples count as the policy's own
(`on_policy`), for the two distributions differ by rounding alone; how much that is, a step's
`sampling/sampling_logp_difference` says. AGRO's pathwise term holds for samples of any
distribution. Only the likelihood-ratio term (`lr_weight`) takes them for the policy's, and its
expectation is then off by a share of about that difference, summed over a completion.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn

from agro_train.config import TrainConfig
from agro_train.data.batch import pack
from agro_train.engines.engine import (
    TOKENS_S,
    Ask,
    BrokenEngine,
    Sampling,
    Snapshot,
    completion_seed,
    cut,
)
from agro_train.engines.turns import Dialogue, Group, sampled
from agro_train.engines.vllm_beside import Colocated
from agro_train.engines.vllm_client import Answer, Client, Request
from agro_train.engines.vllm_ranks import Shared
from agro_train.engines.vllm_servers import Servers
from agro_train.engines.weights import (
    FILE_BYTES,
    PARCEL_BYTES,
    gathered_by_all,
    one_by_one,
    parcels,
    rollout_dtype,
    weights_folder,
    written,
)
from agro_train.policy.adapter import merged_weights
from agro_train.policy.policy import unwrap
from agro_train.types import Prompt, Rollout

T = TypeVar("T")

PROBE_TOKENS = 32  # of the completion whose log-probabilities are compared
# Mean |difference| of a token's log-probability, nats, that rounding may make.
# In float32 it is about 1e-6. In bfloat16, for SmolLM2 with transformers' sdpa attention and a
# float32 head against its eager attention and a bfloat16 head, it is 0.015 to 0.05 on greedy
# tokens and 0.05 to 0.085 on random ones, as those of the probe come to be when the policy moves
# away; one of its matrices replaced by noise makes it 0.3 and more.
NOISE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
LEFT_OUT = -9000.0  # nats: vLLM writes -9999 or -inf for an id that it has left out
MOVED = 1e-5  # mean |change| of our log-probability, nats: in float32, more than rounding


class VllmEngine:
    """An `Engine` and an `EngineAhead`. Weights are sent when `step` is another one than before, by
    the main rank; every rank asks for its own completions."""

    def __init__(
        self,
        client: Client,
        policy: nn.Module,
        accelerator: Any,
        tokenizer: Any,
        end_tokens: set[int],
        config: TrainConfig,
        dialogue: Dialogue | None = None,
    ) -> None:
        self.dialogue = dialogue
        self.client, self.policy, self.accelerator = client, policy, accelerator
        self.tokenizer, self.end_tokens, self.config = tokenizer, end_tokens, config
        self.sampling = Sampling.of(config)
        self.sent: int | None = None  # the step whose weights vLLM has
        self.probe: Rollout | None = None  # a completion that both sides are asked about
        self.before: tuple[Tensor, Tensor] | None = None  # its log-probabilities: ours, vLLM's
        self.beside: Any = None  # the ranks' group for the thread that samples beside the updates
        self.waiting: tempfile.TemporaryDirectory[str] | None = None  # for weights on their way

    def complete(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> list[Rollout]:
        if self.sent is None or ask["step"] != self.sent:
            self.send(prompts[0])
            self.sent = ask["step"]
        found = self.sample(prompts, **ask)
        groups = together(lambda: dict(found))
        return [rollout for place in range(len(prompts)) for rollout in groups[place]]

    def sample(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> Iterator[Group]:
        """The prompts' places and their completions, each group once it is there; with an
        environment once all are."""
        with self.client.asking() if isinstance(self.client, Shared) else nullcontext():
            yield from sampled(self.dialogue, self.one_turn, prompts, **ask)

    def one_turn(self, prompts: Sequence[Prompt], **ask: Unpack[Ask]) -> Iterator[Group]:
        num_generations, temperature = ask["num_generations"], ask["temperature"]
        limits = ask.get("limits", [self.config.max_completion_length] * len(prompts))
        requests = [
            self.request(prompt.ids, completion_seed(seed, number), temperature, limit)
            for prompt, seed, limit in zip(prompts, ask["seeds"], limits, strict=True)
            for number in range(num_generations)
        ]
        arrived: list[dict[int, Rollout]] = [{} for _ in prompts]
        for index, answer in self.ask(requests):
            place, number = divmod(index, num_generations)
            group = arrived[place]
            group[number] = self.rollout(
                prompts[place], answer, temperature, ask["step"], limits[place]
            )
            if len(group) == num_generations:
                yield place, [group[number] for number in range(num_generations)]

    def rollout(
        self, prompt: Prompt, answer: Answer, temperature: float, step: int | None, limit: int
    ) -> Rollout:
        found = cut(
            prompt,
            list(answer.ids),
            self.tokenizer,
            self.end_tokens,
            temperature,
            step,
            answer.logprobs if temperature else None,
            self.sampling,
            self.kept(answer) if temperature and self.sampling.truncates else None,
        )
        # vLLM puts text together in its own way, and may see a stop string where `cut` sees none.
        short = len(found.completion_ids) < limit
        return replace(found, finish="stop") if self.sampling.stop and short else found

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """The requests' places and their answers, as they come."""
        for index, answer in self.client.ask(requests):
            yield index, scored(answer)

    def kept(self, answer: Answer) -> list[list[int]]:
        """The ids that each of the answer's tokens was drawn from: those that vLLM, asked for more
        than it may keep, gives a probability. Raises BrokenEngine where it may have kept others."""
        asked = self.num_logprobs()
        kept = [[i for i, logprob in at if logprob > LEFT_OUT] for at in answer.likeliest]
        most = max(map(len, kept), default=0)
        complete = most < asked or asked == self.vocabulary()
        if len(kept) != len(answer.ids) or not complete or not all(kept):
            raise BrokenEngine(
                f"vllm: expected the ids kept for each of {len(answer.ids)} tokens, fewer than "
                f"{asked} with top_k={self.config.top_k}, got up to {most} for {len(kept)}; use "
                "vllm>=0.32, and start a server with `agro serve MODEL`"
            )
        return kept

    def num_logprobs(self) -> int:
        """How many ids vLLM is asked about at each token: twice top_k, for it keeps those that tie
        with the last."""
        return min(2 * self.config.top_k, self.vocabulary())

    def vocabulary(self) -> int:
        return len(unwrap(self.policy).model.get_output_embeddings().weight)

    def request(
        self, ids: tuple[int, ...], seed: int, temperature: float, limit: int | None = None
    ) -> Request:
        """Every setting that shapes the distribution, spelled out, so that no default can.

        Args:
            limit: tokens of the answer at most; None: max_completion_length.
        """
        sampling, limit = self.sampling, limit or self.config.max_completion_length
        parameters = {
            "n": 1,
            "seed": seed,
            "temperature": temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": limit,
            "min_tokens": min(sampling.min_new_tokens, limit),
            "stop_token_ids": sorted(self.end_tokens),
            "ignore_eos": True,  # the run's end tokens are all there
            "logprobs": 0,  # of the token sampled, and no others
        }
        if temperature and sampling.truncates:
            parameters["logprobs"] = self.num_logprobs()
        if sampling.stop:
            # A stop string may be a special token's text.
            parameters |= {"stop": list(sampling.stop), "skip_special_tokens": False}
        return Request(ids, parameters)

    def send(self, prompt: Prompt) -> None:
        """Sends the weights, and raises BrokenEngine if vLLM then does not compute with them."""
        together(self.deliver)
        self.agree(None)
        if self.probe is None:  # only now: vLLM's first weights may be arbitrary ones
            (self.probe,) = broadcast_object_list([together(lambda: self.new_probe(prompt))])
        ours = self.our_logprobs()
        self.before = ours, together(lambda: self.check(ours))

    def snapshot(self, step: int, prompt: Prompt) -> Snapshot:
        """The first weights go out at once, because the probe takes them; later ones wait in files
        until `load`."""
        if self.sent is None:
            if torch.distributed.is_initialized():
                # In it a rank waits for the slowest one's completions.
                limit = timedelta(seconds=TOKENS_S)
                self.beside = torch.distributed.new_group(backend="gloo", timeout=limit)
            self.send(prompt)
            self.sent = step
            return Snapshot(step)
        ours, files = self.our_logprobs(), together(self.write)
        if self.beside_all:  # one rank of each machine has written
            rank, local_rank = self.accelerator.process_index, self.accelerator.local_process_index
            files = gathered(files, None)[rank - local_rank]
        return Snapshot(step, files, ours)

    @property
    def beside_all(self) -> bool:
        """Whether every rank has an engine to take weights to, and not the main rank all."""
        return isinstance(self.client, Colocated) and self.accelerator.num_processes > 1

    @property
    def loads(self) -> bool:
        """Whether this rank has the engine take weights."""
        return self.beside_all or bool(self.accelerator.is_main_process)

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files in which weights wait."""
        if self.beside_all:
            return bool(self.accelerator.is_local_main_process)
        return bool(self.accelerator.is_main_process)

    def write(self) -> tuple[Path, ...]:
        """All weights in files, by one rank; the others take part in gathering them."""
        weights, where = merged_weights(unwrap(self.policy).model), self.folder()
        try:
            with gathered_by_all(weights):
                if not self.writes:
                    return ()
                waiting = self.waiting or tempfile.TemporaryDirectory(prefix="agro-", dir=where)
                self.waiting = waiting
                folder = Path(tempfile.mkdtemp(dir=waiting.name))
                return tuple(written(weights, folder, rollout_dtype(self.config)))
        except (OSError, SafetensorError) as error:
            raise BrokenEngine(
                f"vllm: expected room for a copy of the weights in {where}, got {error}; make room "
                "there, or set vllm_weights_dir to a folder that has it (and that a server sees, "
                "too)"
            ) from error

    def load(self, snapshot: Snapshot) -> None:
        if snapshot.step == self.sent:
            return
        ours = snapshot.probe_logprobs
        assert ours is not None, "there is a probe since the first weights"
        loads = self.loads
        # Requests of the weights before must be answered on all ranks first.
        together(lambda: None, self.beside)
        together(lambda: self.client.load(snapshot.files) if loads else None, self.beside)
        self.agree(self.beside)
        self.before = ours, together(lambda: self.check(ours), self.beside)
        self.sent = snapshot.step
        if not self.writes:
            return
        for file in snapshot.files:
            file.unlink()
        if snapshot.files:
            snapshot.files[0].parent.rmdir()

    def agree(self, group: Any) -> None:
        """A server that a rank has found dead, or that has missed the weights, is nobody's."""
        if isinstance(self.client, Servers):
            alive = {server.base_url for server in self.client.alive}
            self.client.keep(set.intersection(*gathered(alive, group)))

    def close(self) -> None:
        """Deletes weights that wait, and leaves the groups by which they go to servers. A server is
        not the run's own, and vLLM beside this process ends with it."""
        if self.waiting is not None:
            self.waiting.cleanup()
        if isinstance(self.client, Servers):
            self.client.close()

    def folder(self) -> Path:
        """Where weights wait."""
        return weights_folder(self.config, takes_tensors=self.client.takes_tensors)

    def check(self, ours: Tensor) -> Tensor:
        """vLLM's log-probabilities of the probe, once they are seen to be `ours`; of several
        servers the first one's, once those of all that answer are."""
        first, *others = [self.check_one(answer, ours) for answer in self.probe_answers()]
        del others
        return first

    def check_one(self, answer: Answer, ours: Tensor) -> Tensor:
        theirs, dtype = self.their_logprobs(answer), rollout_dtype(self.config)
        apart = float((ours - theirs).abs().mean())
        # Where our log-probabilities moved and vLLM's are the same to the last bit, it computed
        # with the old weights, however near those may be. In bfloat16 that proves nothing: a small
        # step of an adapter, merged, may round away, and the noise alone decides.
        stale = (
            dtype == torch.float32
            and self.before is not None
            and float((ours - self.before[0]).abs().mean()) > MOVED
            and torch.equal(theirs, self.before[1])
        )
        if stale or not apart <= NOISE[dtype]:  # nor may it be NaN
            found = "the same ones as before the update" if stale else f"others by {apart:.3g} nats"
            raise BrokenEngine(
                "vllm: expected the policy's log-probabilities after its weights were sent, got "
                f"{found}; the weights did not arrive, or vLLM serves another model or computes in "
                f"another dtype than {dtype}"
            )
        return theirs

    def deliver(self) -> None:
        """One parcel of weights after another; a rank whose engine takes none takes part in
        gathering sharded ones all the same."""
        weights, dtype = merged_weights(unwrap(self.policy).model), rollout_dtype(self.config)
        with gathered_by_all(weights):
            if self.loads and self.client.takes_tensors:
                # An engine in this process takes a tensor at a time, which nobody has to pack.
                full = PARCEL_BYTES if isinstance(self.client, Servers) else 1
                cast = ((name, weight.to(dtype)) for name, weight in weights)
                self.client.load(parcels(cast, full))
            elif self.loads:
                self.deliver_files(weights, dtype)

    def deliver_files(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        where = self.folder()
        try:
            with tempfile.TemporaryDirectory(dir=where) as folder:
                self.client.load(one_by_one(weights, Path(folder), dtype))
        except (OSError, SafetensorError) as error:
            raise BrokenEngine(
                f"vllm: expected to write weights to {where}, {FILE_BYTES / 1e9:.1f} GB and a "
                f"tensor at a time, got {error}; make room there, or set vllm_weights_dir to a "
                "folder that has it (and that a server sees, too)"
            ) from error

    def new_probe(self, prompt: Prompt) -> Rollout:
        """A greedy completion: likely tokens, on which rounding does least."""
        request = self.request(prompt.ids, seed=0, temperature=0.0)
        short = min(PROBE_TOKENS, max(1, self.config.max_completion_length - 1))
        request.parameters.update(max_tokens=short, min_tokens=0, stop_token_ids=[], stop=[])
        ((_, answer),) = self.ask([request])
        return cut(prompt, list(answer.ids), self.tokenizer, set(), 0.0, None)

    def our_logprobs(self) -> Tensor:
        """(n,) float64 of the probe's tokens under the policy, nats. Every rank must call it."""
        assert self.probe is not None, "there is a probe before weights are sent"
        (micro,) = pack([self.probe], token_budget=1, share_prompts=False)
        with torch.no_grad():
            found = self.policy(micro.to(self.accelerator.device), 1.0).logprobs
        logprobs: Tensor = found.double().cpu()
        return logprobs

    def probe_answers(self) -> list[Answer]:
        """What the probe's tokens are given, by each server or by the engine beside the trainer."""
        assert self.probe is not None, "there is a probe before weights are sent"
        ids = self.probe.prompt_ids + self.probe.completion_ids
        request = self.request(ids, seed=0, temperature=0.0)
        request.parameters.update(max_tokens=1, min_tokens=0, prompt_logprobs=0, stop=[])
        if isinstance(self.client, Servers):
            return [scored(answer) for answer in self.client.answers(request)]
        return [answer for _, answer in self.ask([request])]

    def their_logprobs(self, answer: Answer) -> Tensor:
        """(n,) float64 of the probe's tokens by vLLM, nats, all finite."""
        assert self.probe is not None, "there is a probe before weights are sent"
        count = len(self.probe.completion_ids)
        theirs = torch.tensor(answer.prompt_logprobs[-count:], dtype=torch.float64)
        if len(theirs) != count or not theirs.isfinite().all():
            raise BrokenEngine(
                f"vllm: expected {count} finite log-probabilities of a prompt's tokens, got "
                f"{theirs.tolist()}; use vllm>=0.32, and start a server with `agro serve MODEL`"
            )
        return theirs


def together(function: Callable[[], T], group: Any = None) -> T:
    """function() on every rank; where it fails on one it fails on all, and none waits for it for
    ever.

    Args:
        group: of processes, for a thread beside the trainer's; None: the trainer's own.
    """
    failure, result = None, None
    try:
        result = function()
    except BrokenEngine as error:
        failure = error
    failures = [text for text in gathered(failure and str(failure), group) if text]
    if failures:
        raise BrokenEngine(failures[0]) from failure
    return result  # type: ignore[return-value]


def scored(answer: Answer) -> Answer:
    """The answer, if it has tokens and a log-probability of each. Raises BrokenEngine."""
    if not 0 < len(answer.ids) == len(answer.logprobs):
        raise BrokenEngine(
            "vllm: expected tokens and as many log-probabilities, got "
            f"{len(answer.ids)} and {len(answer.logprobs)}; use vllm>=0.32, and start a "
            "server with `agro serve MODEL`"
        )
    return answer


def gathered(item: T, group: Any) -> list[T]:
    """Every rank's, in the order of ranks."""
    if group is None:
        found: list[T] = gather_object([item])
        return found
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, item, group=group)
    return everyone
