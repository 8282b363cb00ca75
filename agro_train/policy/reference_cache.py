"""The reference's log-probabilities of recorded rollouts: computed once, kept on disk.

The reference does not change. So a recorded completion's log-probability under it is computed once,
for all the steps that train on the completion and for later runs on the same file.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agro_train import durable
from agro_train.config import TrainConfig
from agro_train.data.batch import pack
from agro_train.data.recorded import Recorded, RecordedFile
from agro_train.policy.logprobs import sequence_logprobs
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal, writing_to
from agro_train.types import Rollout

# What the reference is asked: a prompt's ids, a completion's, which of these were sampled, and what
# was kept for each of them.
Sequenced = tuple[tuple[int, ...], tuple[int, ...], tuple[range, ...], str | None]
# Log-probabilities of one file's rollouts by their place in it, nats.
Known = dict[int, float]

# A recorded `ref_logprob` is believed if it is within this of the reference, nats a token: other
# kernels and precisions differ by about 0.01, another model or temperature by far more.
TOLERANCE = 0.05
SAMPLE = 8  # rollouts of each file whose recorded `ref_logprob` is checked


def with_ref_logprobs(
    recorded: Recorded,
    used: set[int],
    reference: torch.nn.Module,
    reference_id: str,
    config: TrainConfig,
    accelerator: Any,
    say: Callable[[str], None],
) -> Recorded:
    """The same rollouts with `ref_logprob` in the groups numbered in `used`.

    Every rank must call it. The main one alone reads and writes the cache, whose entries are keyed
    by the reference's identity (`reference_id`, which only the main rank needs) and precision, the
    temperature and the file's hash. A cache that cannot be read is computed again, and `say` is
    told.
    """
    wanted = {sequence(rollout) for number in used for rollout in recorded.groups[number]}
    ranks = Ranks.of(accelerator)
    known: dict[Sequenced, float] = {}
    for file in recorded.files:
        path = cache_folder() / f"{key(file, reference_id, config)}.json"
        before = ranks.from_main(partial(read, path, len(file.rollouts), say))
        missing = [
            i
            for i, rollout in enumerate(file.rollouts)
            if sequence(rollout) in wanted and rollout.ref_logprob is None and i not in before
        ]
        claimed = [i for i, rollout in enumerate(file.rollouts) if rollout.ref_logprob is not None]
        checked = claimed[:SAMPLE]
        asked = [file.rollouts[i] for i in missing + checked]
        values = ask_reference(asked, reference, config, accelerator)
        now = dict(zip(missing + checked, values, strict=True))
        _check_claims(file, {i: now[i] for i in checked})
        known |= {sequence(file.rollouts[i]): value for i, value in {**before, **now}.items()}
        if missing and ranks.main:
            write(path, {**before, **{i: now[i] for i in missing}})
            say(
                f"{file.path}: the reference's log-probabilities of {len(missing)} rollouts "
                f"computed and kept in {path}"
            )
    groups = list(recorded.groups)
    for number in used:
        groups[number] = tuple(
            replace(r, ref_logprob=known[sequence(r)]) if r.ref_logprob is None else r
            for r in groups[number]
        )
    return replace(recorded, groups=tuple(groups))


def sequence(rollout: Rollout) -> Sequenced:
    """What the reference's log-probability of a rollout depends on."""
    return rollout.prompt_ids, rollout.completion_ids, tuple(rollout.sampled), rollout.kept_ids


def ask_reference(
    rollouts: Sequence[Rollout], reference: torch.nn.Module, config: TrainConfig, accelerator: Any
) -> list[float]:
    """Log-probabilities of whole completions, nats, each rank doing a part."""
    ranks = Ranks.of(accelerator)
    values: list[float] = [math.nan] * len(rollouts)
    chunk = ranks.world * config.prompts_per_step * config.num_generations
    for start in range(0, len(rollouts), chunk):
        part = rollouts[start : start + chunk]
        mine = ranks.block(part)  # neighbours, which share a prompt
        micro = pack(
            mine,
            token_budget=config.token_budget,
            share_prompts=config.share_prompts,
            min_new_tokens=config.min_new_tokens,
        )
        sums = sequence_logprobs(reference, micro, len(mine), config, accelerator.device)
        values[start : start + len(part)] = ranks.gather(sums.tolist())
    return values


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/agro/reference, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agro" / "reference"


def check_cache_folder() -> None:
    """Raises Refusal if the cache cannot be written. Called before anything is computed for it."""
    folder = cache_folder()
    with writing_to(folder, "XDG_CACHE_HOME", "set it to another"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def key(file: RecordedFile, reference_id: str, config: TrainConfig) -> str:
    """Everything the values depend on. Text that is tokenised or rendered anew shows in the ids."""
    ids = hashlib.sha256()
    for rollout in file.rollouts:
        ids.update(repr((rollout.prompt_ids, rollout.completion_ids)).encode())
    products = torch.get_float32_matmul_precision()
    precision = (config.dtype, config.mixed_precision, products)
    parts: tuple[Any, ...] = (
        reference_id,
        precision,
        config.temperature,
        file.sha256,
        ids.hexdigest(),
    )
    if config.truncates:  # the same file may be scored over all ids, too
        parts += ("kept ids",)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def read(path: Path, count: int, say: Callable[[str], None]) -> Known:
    """What is cached of a file of `count` rollouts; nothing if there is no whole cache."""
    if not path.is_file():
        return {}
    try:
        known = {int(place): float(value) for place, value in json.loads(path.read_text()).items()}
        if not all(0 <= i < count and math.isfinite(value) for i, value in known.items()):
            raise ValueError("a value that cannot be")
    except (ValueError, TypeError, AttributeError) as error:  # cut short, or not what was written
        say(f"{path}: not a whole cache of log-probabilities ({error}); they are computed again")
        return {}
    return known


def write(path: Path, known: Mapping[int, float]) -> None:
    """The whole file or none; runs on one machine may write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path, json.dumps(known), shared=True)


def _check_claims(file: RecordedFile, values: Mapping[int, float]) -> None:
    for i, value in values.items():
        rollout = file.rollouts[i]
        assert rollout.ref_logprob is not None, "only rollouts that have one are checked"
        if abs(rollout.ref_logprob - value) > TOLERANCE * len(rollout.sampled_ids):
            raise Refusal(
                f"recorded: expected ref_logprob of this run's reference at this temperature in "
                f"{file.path}, rollout {i + 1}, got {rollout.ref_logprob:g} where the reference "
                f"gives {value:g}; leave the column out and it is computed"
            )
