"""The program of one math worker: jobs in, results out, a line of JSON each.

It runs in a process of its own because the checks cannot be stopped otherwise: sympy spends minutes
in a single call on an answer like 9^{9^{9^9}}, where neither an exception nor math-verify's own
alarm reaches it. A job is `{"gold": text}` or `{"gold": text, "completion": text}`.
"""

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY = 4 << 30  # bytes of address space: a huge integer ends in MemoryError, not in swapping


def main(timeout_s: float) -> None:
    # Whatever the libraries print must not get between the lines of results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off
    import math_verify  # noqa: F401  (before the clock of the first job runs)

    results.write("ready\n")
    results.flush()
    for line in sys.stdin:
        # The parent kills a worker that takes too long; without a parent this alarm does.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
        answer = work(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        results.write(json.dumps(answer) + "\n")
        results.flush()


def work(job: dict[str, str]) -> dict[str, Any]:
    """{"gold": can the gold answer be parsed, "equal": is the completion's answer equal to it,
    "answer": the completion's answer in one spelling, to count votes by}.

    An error of the parser or of the comparison, which math-verify raises for odd LaTeX, means that
    the answer was not recognised.
    """
    from math_verify import parse, verify

    gold = parsed_gold(job["gold"])
    if "completion" not in job or not gold:
        return {"gold": bool(gold), "equal": False, "answer": None}
    try:
        answer = parse(job["completion"], parsing_timeout=None)
        equal = bool(verify(gold, answer, timeout_seconds=None))
        spelling = spell(answer[0]) if answer else None
    except Exception:  # any of sympy's, MemoryError too: the completion made it, not the run
        return {"gold": True, "equal": False, "answer": None}
    return {"gold": True, "equal": equal, "answer": spelling}


def spell(answer: Any) -> str:
    """A text for the answer; decimals as fractions, so that 0.5 and \\frac{1}{2} are one vote."""
    from sympy import nsimplify  # type: ignore[import-untyped]

    return str(nsimplify(answer, rational=True) if getattr(answer, "is_Float", False) else answer)


@lru_cache(maxsize=1024)
def parsed_gold(text: str) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(text, parsing_timeout=None)
    return parsed


if __name__ == "__main__":
    main(float(sys.argv[1]))
