"""Two real servers that share a run's prompts, until one of them is killed, and then the other."""

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from agro_train.cli import main
from agro_train.data.rows import read_jsonl
from agro_train.engines.vllm_server import Server
from tests.train.engines.vllm.conftest import Started
from tests.train.models import small_run

# vLLM and what it imports warn of many things.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]
STEPS, GROUPS, SIZE = 6, 4, 4


class Deaths:
    """Kills a server while it is at the `count`-th call of one kind.

    It is stopped before the call, so that it cannot be done when it is killed a moment later.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.calls: Counter[tuple[str, str]] = Counter()
        self.wanted: dict[tuple[str, str], tuple[int, int]] = {}  # the count, and whom to kill
        for name in ("_tokens", "take"):
            self._watch(name)

    def at(self, name: str, count: int, server: Started) -> None:
        self.wanted[name, server.address] = count, server.group

    def _watch(self, name: str) -> None:
        real: Callable[..., Any] = getattr(Server, name)

        def watched(server: Server, *arguments: Any) -> Any:
            key = name, server.base_url
            self.calls[key] += 1
            count, group = self.wanted.get(key, (0, 0))
            if self.calls[key] == count:
                os.killpg(group, signal.SIGSTOP)
                Timer(0.5, os.killpg, (group, signal.SIGKILL)).start()
            return real(server, *arguments)

        self.monkeypatch.setattr(Server, name, watched)


def asked_for_tokens(server: Started) -> int:
    """Requests that the server has answered, by its own log."""
    return len(re.findall(r"POST /inference/v1/generate HTTP/1\.\d\" 200", server.log.read_text()))


def groups(folder: Path) -> dict[int, list[str]]:
    """Of each step the prompts that it learned from, one a completion."""
    return {
        int(path.stem.removeprefix("step-")): [row["prompt"] for row in read_jsonl(path)]
        for path in sorted((folder / "rollouts").glob("step-*.jsonl"))
    }


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    return small_run(
        model,
        folder,
        f"steps={STEPS}",
        f"prompts_per_step={GROUPS}",
        f"num_generations={SIZE}",
        "learning_rate=0.001",
        "lr_weight=0",
        "token_budget=60",
        "eval_every=0",
        "save_every=1",
        *more,
    )


@pytest.mark.parametrize(
    ("staleness", "transfer", "at"),
    [(0, "files", "_tokens"), (1, "gloo", "take")],
    ids=["answering", "taking weights, ahead of the updates"],
)
def test_run_outlives_one_of_two_servers_and_goes_on_after_both(
    staleness: int,
    transfer: str,
    at: str,
    model: Path,
    serve: Callable[[], Started],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = serve(), serve()
    deaths, half = Deaths(monkeypatch), GROUPS * SIZE // 2
    # Until then the second one was asked once at the start, for a probe's log-probabilities after
    # each of three updates, and for half of what two or three steps sampled.
    before = 1 + 3 + 2 * half if at == "_tokens" else 1 + 2 + 3 * half
    deaths.at(at, before + 3 if at == "_tokens" else 3, second)
    deaths.at("take", 5, first)
    server = ["use_vllm=true", "vllm_mode=server", f"max_staleness={staleness}"]
    server += [f"vllm_weight_transfer={transfer}", "vllm_server_timeout=300"]
    both = f"vllm_server_base_url=[{first.address},{second.address}]"
    assert main(arguments(model, tmp_path / "run", *server, both)) == 2
    (sentence,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("agro: ")]
    assert sentence.startswith("agro: vllm: expected ") and first.address in sentence
    (left_out,) = [line for line in caplog.messages if "is left out" in line]
    assert left_out.startswith(f"{second.address} is left out, 1 server(s) go on: vllm: expected")
    answered = asked_for_tokens(second)
    assert answered == before if at == "take" else before <= answered < before + half

    committed = [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert committed == list(range(1, 5 + staleness))
    assert (tmp_path / "run" / f"checkpoint-{len(committed)}" / "model.safetensors").is_file()
    third = serve()
    again = f"vllm_server_base_url=[{third.address}]"
    assert main(["train", "--resume", str(tmp_path / "run"), again]) == 0

    # No group was lost, and none was learned from twice: they are those of any engine's run.
    assert main(arguments(model, tmp_path / "other")) == 0
    assert groups(tmp_path / "run") == groups(tmp_path / "other")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    if not staleness:
        assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
