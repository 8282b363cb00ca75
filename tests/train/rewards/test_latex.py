"""Answers in the LaTeX that math-verify reads by value."""
# ruff: noqa: RUF001  (the characters that look like others are what this is about)

import pytest

from agro_train.rewards.latex import Answer, normalised, read, without_unicode


@pytest.mark.parametrize(
    ("written", "latex"),
    [
        ("$ 7 $", "7"),
        (r"\(7\)", "7"),
        (r"7\,.", "7"),
        ("**7**", "7"),
        (r"1\,000\,000", "1000000"),
        (r"10,\!236", "10236"),
        ("1 000", "1000"),
        ("6.02e3", "6020"),
        ("6.02e1", "60.2"),
        ("1.2E-4", "0.00012"),
        (r"1.5 \times 10^{3}", "1500"),
        (r"2 \cdot 10^3", "2000"),
        (r"5^2 \times 10^3", r"5^2 \times 10^3"),
        ("2e40", r"2 \cdot 10^{40}"),
        ("2e", "2e"),
        ("2*pi", r"2 \cdot \pi"),
        ("2**3", "2^3"),
        (r"\sqrt(2)", r"\sqrt{2}"),
        ("sqrt((1+2)*3)", r"\sqrt{(1+2) \cdot 3}"),
        (r"\varnothing", r"\emptyset"),
        (r"\text{13}", "13"),
        (r"\mathbf{13}", "13"),
        (r"\text{The answer is } 7", "7"),
        (r"\text{The answer is 7}", "7"),
        (r"\text{June 20}", r"\text{June 20}"),
        ("even", r"\text{even}"),
        ("18 dollars", "18"),
        (r"\$18", "18"),
        (
            r"\begin{pmatrix} 1 \\ 4 \end{pmatrix}",
            r"\begin{pmatrix} 1 \\ 4 \end{pmatrix}",
        ),
    ],
)
def test_normalised(written: str, latex: str) -> None:
    found = normalised(written)
    assert found is not None
    assert " ".join(found.latex.split()) == latex and found.base is None


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("2516_8", Answer("2516", 8)),
        ("2516_{8}", Answer("2516", 8)),
        (r"-221_{\text{three}}", Answer("-221", 3)),
        (r"12_{\text{base } 7}", Answer("12", 7)),
        ("0.0011_{2}", Answer("0.0011", 2)),
        ("1A_{16}", Answer("46", 16)),  # 36 + 10: one number for each row of digits
        ("x_1", Answer("x_1")),
        ("5_n", Answer("5_n")),
        ("5_1", Answer("5_1")),
    ],
)
def test_base_stands_beside_the_digits(written: str, answer: Answer) -> None:
    assert normalised(written) == answer


def test_answer_takes_the_base_of_the_question() -> None:
    assert Answer("1A").in_base(16) == normalised("1A_{16}")
    assert Answer("12").in_base(7) == Answer("12", 7)
    assert Answer(r"\frac{1}{2}").in_base(7) == Answer(r"\frac{1}{2}", 7)


@pytest.mark.parametrize("written", ["", "$$", " . ", "5 7", r"\,"])
def test_what_is_no_answer(written: str) -> None:
    assert normalised(written) is None


def test_signs_of_unicode_become_latex() -> None:
    text = without_unicode("−２×√3 + ½π ≤ ∞ in 60° and 20 °C，")
    assert " ".join(text.split()) == (
        r"-2\times \sqrt{3} + \frac{1}{2}\pi \le \infty in 60 and 20 ,"
    )
    assert read("答案是−7。") == Answer("-7")
