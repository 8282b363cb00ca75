"""Between host and device: what a step copies and waits for, counted on a device that is not there.

A tensor left on the host, or a number that is read on the way, fails here, where there is no GPU.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.train.card import Event

GENERATE = "agro_train/engines/transformers_engine.py"
TOKENS = 6
WEIGHTS, MOVED = 30, 32  # of the tiny model; with its buffers
MICRO = 2  # micro-batches of a step

# By phase, kind and place, how often.
SCORE = {
    # Policy and reference read each micro-batch; what they found is read once all of them have.
    ("score", "upload", "agro_train/transfer.py upload"): 2 * MICRO,
    ("score", "download", "agro_train/transfer.py download"): 2,
}
UPDATE = {
    ("update", "upload", "agro_train/transfer.py upload"): 2 * MICRO,  # and the coefficients
    ("update", "read", "agro_train/step.py update"): 1,  # the gradient's norm
}


def generation(phase: str, *, sampled: bool) -> dict[tuple[str, str, str], int]:
    """Of one batch of prompts; without what transformers itself asks for."""
    found = {
        (phase, "upload", "agro_train/transfer.py upload"): 1 + sampled,  # prompts; random bits
        (phase, "download", f"{GENERATE} _complete"): 1,
    }
    if sampled:  # which rows draw a token that is none of the likeliest
        found[phase, "shape", f"{GENERATE} __call__"] = TOKENS
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("card")
    command = [sys.executable, "-m", "tests.train.card_main", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def events(rows: list[list[str]]) -> list[Event]:
    return [Event(*row) for row in rows]


def counted(rows: list[list[str]]) -> Counter[tuple[str, str, str]]:
    """How often each thing happens; without transformers' own."""
    ours = [event for event in events(rows) if not event.site.endswith("transformers")]
    return Counter((event.phase, event.kind, event.site) for event in ours)


def lines(rows: list[list[str]]) -> str:
    """What a failure shows: where each thing happens."""
    found = Counter((event.phase, event.kind, event.op, event.line) for event in events(rows))
    return "\n".join(f"{count} x {', '.join(what)}" for what, count in sorted(found.items()))


# By the kind of event that operations have; "": none.
NOTED = {
    "read": ["item", "bool", "equal"],
    "download": ["tolist", "cpu", "read"],
    "shape": [
        "nonzero",
        "unique",
        "masked_select",
        "mask read",
        "mask written",
        "repeat_interleave",
        "head",
    ],
    "blocking upload": ["list", "upload", "upload, not pinned", "write"],
    "upload": ["upload, pinned"],
    "": [
        "mask filled",
        "places",
        "repeat_interleave of known size",
        "new",
        "number",
        "head whose rows stay",
        "gradient",
    ],
}


@pytest.mark.parametrize(
    ("kind", "operation"), [(kind, each) for kind, names in NOTED.items() for each in names]
)
def test_what_the_host_waits_for_is_noted(kind: str, operation: str, found: Any) -> None:
    assert found["operations"][operation] == ([kind] if kind else [])


def test_tensors_of_two_devices_do_not_mix(found: Any) -> None:
    (error,) = found["operations"]["host's"]
    assert "aten.add.Tensor: expected all tensors on one device" in error


def test_a_run_on_the_device_is_the_run_on_the_host(found: Any) -> None:
    """Two steps, metrics and all, and the checkpoint after them, bitwise."""
    host, card = found["host"], found["card"]
    assert len(host["metrics"]) == 2 and all(row["grad_norm"] > 0 for row in host["metrics"])
    assert repr(card["metrics"]) == repr(host["metrics"])  # two NaN are the same
    assert (card["moments"], card["weights"]) == (host["moments"], host["weights"])


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_waits_for_the_device_a_known_number_of_times(number: int, found: Any) -> None:
    """Three times, but for generation, which waits for each token."""
    step = found["card"][f"step {number}"]
    assert counted(step) == {**generation("generate", sampled=True), **SCORE, **UPDATE}, lines(step)


def promised() -> dict[str, int]:
    """How often each phase waits, as the page's table has it."""
    page = Path(__file__).parents[2] / "docs" / "internals" / "step.md"
    rows = re.findall(r"^\| (\w+) \| (\d[^|]*) \|", page.read_text(), flags=re.MULTILINE)
    sizes = {"": 1, "token": TOKENS, "weight": WEIGHTS}
    return {
        phase: sum(int(n) * sizes[of] for n, of in re.findall(r"(\d+)(?: a (\w+))?", waits))
        for phase, waits in rows
    }


def test_the_page_says_how_often_each_phase_waits(found: Any) -> None:
    waits: Counter[str] = Counter()
    for part in ("step 0", "evaluate", "save"):
        for (phase, kind, _), count in counted(found["card"][part]).items():
            waits[phase] += count if kind != "upload" else 0
    assert promised() == waits


def test_evaluation_waits_as_generation_does(found: Any) -> None:
    evaluation = found["card"]["evaluate"]
    greedy, drawn = (generation("evaluate", sampled=sampled) for sampled in (False, True))
    both = Counter(greedy) + Counter(drawn)
    assert counted(evaluation) == both, lines(evaluation)


def test_transformers_waits_for_each_token_a_few_times(found: Any) -> None:
    """Its generate asks whether every row has ended, and what its masks hold."""
    waits = [
        event for event in events(found["card"]["step 0"]) if "transformers" in event.site[-12:]
    ]
    assert 0 < len(waits) <= 4 * TOKENS
    assert {event.phase for event in waits} == {"generate"}


def test_weights_go_to_the_device_once_and_into_a_checkpoint_once(found: Any) -> None:
    started, saved = counted(found["card"]["set-up"]), counted(found["card"]["save"])
    # Of policy and reference.
    assert started == {
        ("set-up", "blocking upload", "agro_train/models.py place_on_devices"): 2 * MOVED
    }, lines(found["card"]["set-up"])
    assert saved == {
        # Each weight, its two moments and their step.
        ("save", "download", "agro_train/policy/checkpoint.py save"): 4 * WEIGHTS
    }, lines(found["card"]["save"])


@pytest.mark.parametrize("setting", ["kept", "early"])
def test_other_settings_wait_no_more_in_the_update(setting: str, found: Any) -> None:
    """With sets of kept ids, and with first tokens that cannot be the end."""
    rows = [row for row in found["mistakes"][setting] if Event(*row).phase != "generate"]
    kinds = Counter(event.kind for event in events(rows))
    assert kinds == {"upload": kinds["upload"], "download": 2, "read": 1}, lines(rows)


def test_a_number_read_by_mistake_is_one_event_more(found: Any) -> None:
    before, after = (counted(found["mistakes"][name]) for name in ("early", "asked"))
    more = after - before
    key = ("score", "read", "agro_train/policy/logprobs.py sequence_logprobs")
    assert more[key] == MICRO


def test_a_tensor_left_on_the_host_by_mistake_is_refused(found: Any) -> None:
    assert "expected all tensors on one device" in found["mistakes"]["left"]
