"""`reward=number`: the last number of a completion against the gold answer.

The parser is written out here because those of libraries read other numbers than people do.
math-verify computes 5-7, takes 1.5e3 for 1.5, and finds neither -$5 nor the Unicode minus sign nor
a number without a space before it; extract-numbers takes the dash of 5-7 for a sign. What is
decided here is in docs/rewards.md.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from agro_train.config import TrainConfig
from agro_train.rewards.final_answer import MARK, after_thinking
from agro_train.rewards.reward import Gold, Outcome, Reward, number_as_text
from agro_train.types import Rollout

CURRENCY = r"(?:\\?[$]|[€£¥₹₩₽]|US[$])"
# A dash right before the digits is a sign, unless it stands right after what it may connect or
# subtract from: 5-7 and (5)-7 end with 7, "is -7" and "(-7)" with -7.
SIGN = r"(?<![A-Za-z\d_)\]}%°.])[-\u2212\u2013\uff0d]"
# In groups of three, or of two and a last one of three, as in India.
GROUP = r"(?:,|\{,\}|\\,|,?\\!,?|['_\u2019\u00a0\u2009\u202f])"
GROUPED = rf"(?<![\d,])(?:\d{{1,3}}(?:{GROUP}\d{{3}})+|\d{{1,2}}(?:,\d{{2}})+,\d{{3}})(?!\d|,\d)"
NUMBER = (
    rf"(?P<sign>{SIGN}(?={CURRENCY}?\s?[.\d]))?(?:{CURRENCY}\s?)?(?P<inner>(?<=[$€£¥₹₩₽])[-\u2212])?"
    r"(?P<digits>WHOLE(?:\.\d+)?|(?<![\d.])\.\d+)(?P<exponent>[eE][-+\u2212]?\d{1,3}(?![\w.]))?"
)
WITH_GROUPS = re.compile(NUMBER.replace("WHOLE", rf"(?:{GROUPED}|\d+)"))
WITHOUT_GROUPS = re.compile(NUMBER.replace("WHOLE", r"\d+"))
UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\^\{?\d\}?(?=\W|$)")  # the 2 of m^2


@dataclass(frozen=True)
class NumberReward(Reward):
    """1.0 where the last number of the completion equals the gold answer, else 0.0.

    In GSM8K's form, on either side, the number after the last "####" counts: "... #### 1,000".
    """

    name = "number"
    gold = Gold(("answer",), kind="a number", accepts=lambda value: gold_number(value) is not None)

    gold_column: str = ""

    @classmethod
    def start(cls, spec: str, config: TrainConfig) -> "NumberReward":
        return cls(config.gold_column)

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        golds = [self.gold.find(rollout.columns, self.gold_column) for rollout in rollouts]
        found = [_number(rollout, gold) for rollout, gold in zip(rollouts, golds, strict=True)]
        return [
            Outcome(float(number is not None and number == gold_number(gold)))
            for number, gold in zip(found, golds, strict=True)
        ]

    def answers(self, rollouts: Sequence[Rollout]) -> list[Hashable | None]:
        """The numbers in one spelling, so that 72, 72.0 and 072 are one vote."""
        golds = [self.gold.find(rollout.columns, self.gold_column) for rollout in rollouts]
        found = [_number(rollout, gold) for rollout, gold in zip(rollouts, golds, strict=True)]
        return [None if number is None else spell(number) for number in found]


def _number(rollout: Rollout, gold: Any) -> Decimal | None:
    text = after_thinking(rollout.completion, rollout.prompt)
    return last_number(text, grouped=not commas_separate(rollout.columns, gold))


def number_reward(
    completions: Sequence[str], answer: Sequence[Any], solution: Sequence[Any] = (), **_: Any
) -> list[float]:
    """The same as a reward function with TRL's signature. 1.0 where the last number of the
    completion equals the answer, else 0.0."""
    shown = solution or [None] * len(completions)
    rollouts = [
        Rollout("", "", (), text, (), "stop", None, columns={"answer": gold, "solution": worked})
        for text, gold, worked in zip(completions, answer, shown, strict=True)
    ]
    return [one.value or 0.0 for one in NumberReward().outcomes(rollouts)]


def last_number(text: str, *, grouped: bool = True) -> Decimal | None:
    """The last number in the text; None where there is none.

    Args:
        grouped: whether 1,234 is one number.
    """
    _, mark, final = text.rpartition(MARK)
    # A heading of Markdown has the same mark.
    found = (mark and numbers(final, grouped=grouped)) or numbers(text, grouped=grouped)
    return found[-1] if found else None


def numbers(text: str, *, grouped: bool = True) -> list[Decimal]:
    """Every number of the text, in order."""
    pattern = WITH_GROUPS if grouped else WITHOUT_GROUPS
    return [_decimal(match) for match in pattern.finditer(UNIT_POWER.sub("", text))]


def gold_number(value: Any) -> Decimal | None:
    """The gold answer in a column: a number, the text of one and nothing else but signs (currency,
    percent, Markdown), or text that ends with one after "####". None: it is none of them."""
    text = number_as_text(value)
    if text is None:
        if not isinstance(value, str):
            return None
        text = value.rpartition(MARK)[2]
    found = list(WITH_GROUPS.finditer(text))
    if len(found) != 1 or re.search(r"\w", text[: found[0].start()] + text[found[0].end() :]):
        return None
    return _decimal(found[0])


def commas_separate(columns: Mapping[str, Any], gold: Any) -> bool:
    """Whether a comma stands between two numbers in this row's completions, and never inside one.

    The row's worked solution shows it: that of the built-in sums ends in "14,145" where the gold
    answer is 145.
    """
    worked = columns.get("solution")
    if not isinstance(worked, str) or not isinstance(gold, str):
        return False
    return worked.endswith(f",{gold}") and worked[: -len(gold) - 1][-1:].isdigit()


def spell(number: Decimal) -> str:
    """The same text for equal numbers."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _decimal(match: re.Match[str]) -> Decimal:
    """Exact, of any number of digits."""
    digits = re.sub(r"[^\d.]", "", match["digits"])
    exponent = (match["exponent"] or "").replace("\u2212", "-")
    number = Decimal(digits + exponent)
    # Not unary minus, which rounds to 28 digits.
    return number.copy_negate() if match["sign"] or match["inner"] else number
