"""The reward of the kit's runs. Nothing is imported: a process of its own loads it in no time."""

from collections.abc import Sequence


def reward(completions: Sequence[object], **columns: object) -> list[float]:
    """Varies from completion to completion, and costs nothing."""
    return [float(len(str(completion)) % 7) for completion in completions]
