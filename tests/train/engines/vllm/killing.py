"""A reward function in whose third call a vLLM server dies."""

import os
import signal

from tests.train.reward_functions import even_share

calls = 0


def third_time(completion_ids: list[list[int]], **columns: object) -> list[float]:
    global calls
    calls += 1
    if calls == 3 and "AGRO_TEST_KILL" in os.environ:
        os.killpg(int(os.environ["AGRO_TEST_KILL"]), signal.SIGKILL)
    return even_share(completion_ids, **columns)
