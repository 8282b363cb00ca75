"""The program of one math worker, `python -m THIS_MODULE TIMEOUT_S`.

It runs in a process of its own because the checks cannot be stopped otherwise: sympy spends minutes
in a single call on an answer like 9^{9^{9^9}}, where neither an exception nor math-verify's own
alarm reaches it. A job is `{"gold": text}` or `{"gold": text, "completion": text}`.
"""

import logging
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from agro_train.rewards.worker_main import serve

MEMORY = 4 << 30  # bytes of address space: a huge integer ends in MemoryError, not in swapping


def start() -> Callable[[dict[str, str]], dict[str, Any]]:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off
    # The imports, and what the first parse builds, must not count towards the first job's time.
    work({"gold": "1", "completion": r"$\boxed{1}$"})
    return work


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
    serve(start, timeout_s=float(sys.argv[1]))
