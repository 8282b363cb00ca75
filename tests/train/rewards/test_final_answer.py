"""Where a text's final answer is."""

import pytest

from agro_train.rewards.final_answer import after_thinking, final_answer, find_boxes, is_prose

# By prompt: completions, and what is left of them.
AFTER_THINKING = {
    "": {
        "It is 7.": "It is 7.",
        "<think>8</think> 7": " 7",
        "<think>8</think> <think>9</think> 7": " 7",
        "<reasoning>8</reasoning>\n<answer>7</answer>": "\n<answer>7</answer>",
        "[THINK]8[/THINK]7": "7",
        # No end.
        "<think>8": "",
        "<think>8</think> <think>7": "",
    },
    "<think>\n": {"8</think> 7": " 7", "8": ""},
    "<think>\n\n</think>\n\n": {"7": "7"},
    "Think in <think> tags, and then say": {"7": "7"},
}


@pytest.mark.parametrize("prompt", AFTER_THINKING)
def test_thinking_is_left_out(prompt: str) -> None:
    expected = AFTER_THINKING[prompt]
    assert {text: after_thinking(text, prompt) for text in expected} == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # Boxes.
        (r"\boxed{8} and then \boxed{7}", "7"),
        (r"$\boxed{8}$ and $\boxed{7}$", "8,7"),
        (r"\boxed{8} \text{ or } \boxed{7}", "8,7"),
        (r"$x = \boxed{-1}$ and $y = \boxed{2}$.", "-1,2"),
        (r"$\boxed{8}$, or $\boxed{8}$", "8"),
        (r"\boxed{\frac{25}{13}} = \boxed{1\frac{12}{13}}", r"1\frac{12}{13}"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed \pi", r"\pi"),
        (r"7 \boxed{}", None),
        (r"\boxed{7} and \boxed{}", None),
        (r"\boxed{7} or \boxed{8", None),
        # GSM8K's mark, and Markdown's heading.
        ("7 + 8 = 15\n#### 15", "15"),
        ("#### The sum\nSo it is 15.", "15"),
        # No sentence.
        (r" 4\sqrt{13} ", r"4\sqrt{13}"),
        ("x + 1", "x + 1"),
        ("New York", "New York"),
        ("", None),
        # A sentence.
        ("The answer is 3 + 4 = 7.", "3 + 4 = 7"),
        ("The answer is 7, and not 8.", "7"),
        ("The answers are 7 and 8.", "7,8"),
        ("**Final answer:** 7\n\nI hope it helps 100%.", "7"),
        ("The answer is:\n\n$$x = 7$$\n", "x = 7"),
        (r"So the answer is \(\frac{1}{2}\). It is not 2.", r"\frac{1}{2}"),
        ("The answer is odd, as 7 is.", "7"),
        ("The answer is odd.", "odd"),
        ("So we have 7 of them, in all.", "7"),
        ("Adding 3 and 4 makes 7", "7"),
        ("It is 7\n- 3 of them are red.", "3"),
        ("We get $x$ and find it to be $7$.", "7"),
        ("She pays $5 now and $7 later.", "7"),
        ("It costs $5-$7 there", "7"),
        ("So it is -2*pi", "-2*pi"),
        ("So it is 2*omega", "2*omega"),
        ("So it is (1, 2).", "(1, 2)"),
        ("So x = - 3", "x = - 3"),
        ("It is - 3", "- 3"),
        ("9 of them - 3 of these", "3"),
        ("I do not know.", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_last_box_alone() -> None:
    assert final_answer(r"$\boxed{3}$ and $\boxed{4}$", together=False) == "4"


def test_box_whose_end_is_missing_has_no_content() -> None:
    (one,) = find_boxes(r"so \boxed{\frac{1}{2}")
    assert (one.start, one.end, one.content) == (3, 21, None)


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("It is 42.", True),
        ("no answer here", True),
        ("7 apples", True),
        ("3qr + 6q - 15r", False),
        ("abc + 1", False),
        ("north east", False),
        (r"90\text{ square units}", False),
        (r"\begin{pmatrix} 1 \end{pmatrix}", False),
    ],
)
def test_sentence_is_told_from_an_answer(text: str, prose: bool) -> None:
    assert is_prose(text) is prose
