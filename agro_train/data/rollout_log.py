"""A log of rollouts: what a run writes of each, and reads again as it was.

It is a dataset, too: `recorded.load_recorded` reads it.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agro_train import durable
from agro_train.data.rows import read_jsonl
from agro_train.types import Rollout


def rollout_to_json(rollout: Rollout) -> str:
    """One line of a rollout log. Without the reference's log-probability: the line does not say
    whose it is, and another run has another reference. Of the sampler's, the sum alone. What JSON
    has no word for (a date or a decimal in a parquet column) is written as text.
    """
    row = {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
    row["sampling_logprob"] = sampling_logprob(rollout)
    del row["ref_logprob"], row["sampling_logprobs"]
    for name in ("kept_ids", "turns", "environment_reward"):
        if row[name] is None:
            del row[name]
    return json.dumps(row, ensure_ascii=False, default=str)


def sampling_logprob(rollout: Rollout) -> float | None:
    """Nats, of the whole completion under whoever sampled it; None where that is not known.

    Rounding may put the sum of a completion that is all but certain above 0, where no probability
    is: it is then 0.
    """
    known = rollout.sampling_logprob
    if known is None and rollout.sampling_logprobs is not None:
        known = math.fsum(rollout.sampling_logprobs)
    return min(known, 0.0) if known is not None and math.isfinite(known) else None


def write_rollouts(path: Path, rollouts: Iterable[Rollout]) -> None:
    """A log of rollouts, a line each. The file appears when it is complete."""
    durable.replace(path, "".join(rollout_to_json(rollout) + "\n" for rollout in rollouts))


def read_rollouts(path: Path) -> list[Rollout]:
    """A log that the run itself wrote, as it was."""
    return [rollout_of(row) for row in read_jsonl(path)]


def rollout_of(row: dict[str, Any]) -> Rollout:
    """What `vars` of a rollout was before it went through JSON."""
    lists = ("prompt_ids", "completion_ids", "turns")
    tuples = {name: tuple(row[name]) for name in lists if row.get(name) is not None}
    return Rollout(**{**row, **tuples})
