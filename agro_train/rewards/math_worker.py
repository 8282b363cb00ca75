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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's, whose end ends this one
    # Whatever the libraries print must not get between the lines of results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off
    # Before the clock of the first job runs: imports, and what the first parse builds.
    work({"gold": "1", "completion": r"$\boxed{1}$"})
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
    except Exception:  # any of sympy's, MemoryError too: the completion made it, not the run
        return {"gold": True, "equal": False, "answer": None}
    try:
        spelling = spell(answer[0]) if answer else None
    except Exception:  # the same; an answer that cannot be spelled has no vote, and may be right
        spelling = None
    return {"gold": True, "equal": equal, "answer": spelling}


def spell(answer: Any) -> str:
    """A text for the answer; decimals and percentages as fractions, so that 0.5, 50\\% and
    \\frac{1}{2} are one vote."""
    from sympy import Expr, UnevaluatedExpr, nsimplify  # type: ignore[import-untyped]

    if not isinstance(answer, Expr):
        return str(answer)
    return str(nsimplify(answer.replace(UnevaluatedExpr, lambda held: held), rational=True))


@lru_cache(maxsize=1024)
def parsed_gold(text: str) -> list[Any]:
    from math_verify import parse

    parsed: list[Any] = parse(text, parsing_timeout=None)
    return parsed


if __name__ == "__main__":
    main(float(sys.argv[1]))
