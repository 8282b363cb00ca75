"""Where a completion ends: an end token, or the token that completes a stop string."""

from pathlib import Path

import pytest

from agro_train.engines.engine import Sampling, cut
from agro_train.policy import tiny
from agro_train.policy.load import load_tokenizer
from agro_train.types import Prompt
from tests.train.models import save_llama3_miniature

TOKENIZER = tiny.build_tokenizer()
END = TOKENIZER.eos_token_id
PROMPT = Prompt("g", "1+2=", tuple(TOKENIZER("1+2=")["input_ids"]), {})


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("completion", "stop", "min_new_tokens", "expected"),
    [
        ("12+34+5", ("4+",), 0, "12+34+"),
        ("12+34+5", ("9", "+3"), 0, "12+3"),  # whichever comes first
        ("12+34+5", ("2+34+5",), 0, "12+34+5"),
        ("12+34+5", ("99",), 0, None),
        ("1212+12", ("12",), 0, "12"),
        (
            "1212+12",
            ("12",),
            1,
            "12",
        ),  # completed by the second token, which is not among the first
        ("1212+12", ("12",), 2, "1212"),
        ("1212+12", ("12",), 4, "1212+12"),
        ("1212+12", ("12",), 7, None),
    ],
)
def test_stop_string_ends_a_completion_with_its_last_token(
    completion: str, stop: tuple[str, ...], min_new_tokens: int, expected: str | None
) -> None:
    sampling = Sampling(stop=stop, min_new_tokens=min_new_tokens)
    found = cut(PROMPT, ids(completion), TOKENIZER, {END}, 1.0, 0, sampling=sampling)
    assert found.finish == ("length" if expected is None else "stop")
    assert found.completion == (expected or completion)
    assert list(found.completion_ids) == ids(expected or completion)


def test_end_token_before_a_stop_string_counts_and_so_does_what_was_kept() -> None:
    sampling = Sampling(stop=("3",), top_k=2)
    completion = [*ids("12"), END, *ids("3")]
    sets = [[token, 0] for token in completion]
    found = cut(PROMPT, completion, TOKENIZER, {END}, 1.0, 0, (-1.0,) * 4, sampling, sets)
    again = cut(PROMPT, completion[:3], TOKENIZER, {END}, 1.0, 0, (-1.0,) * 3, sampling, sets[:3])
    assert found == again and found.finish == "stop" and len(found.sampling_logprobs or ()) == 3


def test_stop_string_in_bytes_or_of_a_special_token_is_found(tmp_path: Path) -> None:
    """A letter of three bytes is three tokens here, and complete with the last of them alone."""
    tokenizer = load_tokenizer(str(save_llama3_miniature(tmp_path)))
    text = tokenizer("a €\n\n## b", add_special_tokens=False)["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<|eom_id|>")
    for stop, length in (("€", 5), (" €\n\n", 7), ("\n\n##", 9), ("b", 11)):
        assert Sampling(stop=(stop,)).end(text, tokenizer, set()) == length
    found = Sampling(stop=("<|eom_id|>",)).end([*text, special, *text], tokenizer, set())
    assert found == len(text) + 1
