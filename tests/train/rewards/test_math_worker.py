"""What math-verify says of answers, after they were found and normalised."""
# ruff: noqa: RUF001  (the characters that look like others are what this is about)

import logging
from collections.abc import Iterator

import pytest

from agro_train.rewards.math_worker import decimal_places, work

MATRIX = r"\begin{pmatrix} 1 \\ %s \end{pmatrix}"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As in the worker: math-verify warns that its own timeouts are off."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        # Gold answers without delimiters, as MATH-500 has them in column answer.
        (r"4\sqrt{13}", r"So $\boxed{4\sqrt{13}}$."),
        (r"-2\pi", r"$\boxed{-2 \pi}$"),
        (r"\frac{12}{5,\!525}", r"$\boxed{\frac{12}{5525}}$"),
        (r"(-\infty,3)\cup(3,\infty)", r"$\boxed{(-\infty, 3) \cup (3, \infty)}$"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"$\boxed{(3, \frac{\pi}{2})}$"),
        (MATRIX % 7, rf"\[\boxed{{{MATRIX % 7}}}\]"),
        (r"\text{Evelyn}", r"$\boxed{\text{Evelyn}}$"),
        (r"x^2 + 2x + 1", r"$\boxed{(x+1)^2}$"),
        (r"\$15,\!000", r"$\boxed{15000}$"),
        (r"12\text{ and }13", r"$\boxed{12, 13}$"),
        (r"90\text{ square units}", r"$\boxed{90}$"),
        (r"\text{(E)}", r"$\boxed{E}$"),
        ("y=2x+3", r"$\boxed{y = 2x + 3}$"),
        ("east", r"$\boxed{\text{east}}$"),
        ("3qr + 6q", "So the answer is 3qr + 6q."),
        ("6*7 = 42, so the answer is 42.", r"$\boxed{42}$"),
        ("6*7 = 42\n#### 42", "It is 42."),
        # Which answer: the last one.
        ("7", r"$\boxed{8}$, no, wait: $\boxed{7}$"),
        (r"$\boxed{3}$ and $x = \boxed{4}$", r"$\boxed{4}$ or $\boxed{3}$"),
        ("3, 4", r"$\boxed{3}$ or $\boxed{4}$"),
        ("4", r"$\boxed{3}$ or $\boxed{4}$"),
        ("7", r"\boxed {7}"),
        ("7", r"\boxed7"),
        ("7", r"\fbox{7}"),
        # Spelling.
        (r"4\sqrt{2}", r"\boxed{4\sqrt(2)}"),
        (r"-2\pi", "The answer is -2*pi."),
        (r"-2\pi", r"\boxed{-2*pi}"),
        (r"\frac{\sqrt{3}}{2}", "The answer is sqrt(3)/2."),
        (r"2\sqrt{5}", "Thus 2√5"),
        (r"6.02 \times 10^{23}", r"\boxed{6.02e23}"),
        ("6.02e23", r"\boxed{6.02 \cdot 10^{23}}"),
        ("0.00012", r"\boxed{1.2e-4}"),
        ("1.2e-4", r"\boxed{1.2 \times 10^{-4}}"),
        ("13", r"\boxed{\text{13}}"),
        (r"\text{13}", r"\boxed{13}"),
        ("60", r"\boxed{60°}"),
        (r"60^\circ", r"\boxed{60°}"),
        ("60°", r"\boxed{60^{\circ}}"),
        ("25", r"\boxed{25 °C}"),
        ("1000", r"\boxed{1\,000}"),
        (r"1\,000", r"\boxed{1,000}"),
        ("1000", r"\boxed{1{,}000}"),
        ("1000", r"\boxed{1 000}"),
        ("11111111100", r"\boxed{11,\! 111,\! 111,\! 100}"),
        ("18", r"\boxed{18€}"),
        ("18€", r"\boxed{\$18}"),
        ("18", "She pays $5 now and $18 later."),
        ("7", r"\boxed{\text{The answer is } 7}"),
        ("7", r"\boxed{\text{The answer is 7.}}"),
        (r"\emptyset", r"\boxed{\varnothing}"),
        (r"\varnothing", r"\boxed{∅}"),
        ("-3", r"\boxed{−3}"),
        (r"\frac12", r"\boxed{½}"),
        ("18", r"\boxed{18 \text{ dollars}}"),
        ("18", r"\boxed{18 dollars}"),
        (r"\text{even}", r"\boxed{even}"),
        ("Yes", r"\boxed{yes}"),
        ("New York", r"\boxed{\text{New York}}"),
        (r"\text{the hour hand}", r"\boxed{\text{The hour hand}}"),
        # Bases.
        ("2516_8", r"\boxed{2516_{8}}"),
        ("2516_8", r"\boxed{2516}"),
        ("2516", r"\boxed{2516_8}"),
        ("1010_2", r"\boxed{1010_\text{two}}"),
        ("152A_{11}", r"\boxed{152A_{11}}"),
        ("152A_{11}", r"\boxed{152A}"),
        # Without a box.
        ("7", "所以答案是7。"),
        ("7", "答案为：$7$。"),
        ("7", "一共有７个苹果。"),
        ("7", "La réponse est 7."),
        ("7", "The answer is **7**."),
        ("7", "✅ Final Answer: **7**"),
        ("7", "The answer is 7, because 3 + 4 = 7."),
        ("7", "The value of $x$ is $7$."),
        ("7", "<answer>7</answer>"),
        ("1, -3", "The answers are 1 and -3."),
        (r"\text{even}", "The answer is even."),
        ("C", "The answer is (C)."),
    ],
)
def test_right_answers_are_right(gold: str, completion: str) -> None:
    found = work({"gold": gold, "completion": completion})
    assert found["gold"] and found["equal"] and found["answer"] is not None


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        (r"4\sqrt{13}", r"\boxed{4}"),
        ("4", r"\boxed{4\sqrt(2)}"),
        ("-2", "The answer is -2*pi."),
        ("-2", "The answer is -2*omega."),
        ("2516_9", r"\boxed{2516_8}"),
        ("2516_8", r"\boxed{1358}"),
        ("152A_{11}", r"\boxed{15A2_{11}}"),
        (r"40^\circ", r"\boxed{40_9}"),
        ("7", r"7, that is \boxed{}"),
        ("7", r"\boxed{ }"),
        ("7", r"\boxed{7"),
        ("7", ""),
        ("8", r"$\boxed{8}$, no, wait: $\boxed{7}$"),
        ("3", r"$\boxed{3}$ or $\boxed{4}$"),
        (r"$\boxed{3}$ or $\boxed{4}$", r"$\boxed{4}$"),
        ("12", r"\boxed{5 7}"),
        ("6.02", r"\boxed{6.02e23}"),
        ("1.3e-9", r"\boxed{1.2e-9}"),
        (r"\text{east}", r"\boxed{seat}"),
        (MATRIX % 7, rf"\boxed{{{MATRIX % 8}}}"),
        ("(3,4)", r"\boxed{(4,3)}"),
        ("[3,4]", r"\boxed{(3,4)}"),
        ("A", r"\boxed{B}"),
        ("8", "所以答案是7。"),
        ("2", "as required in part 1."),
    ],
)
def test_wrong_answers_are_wrong(gold: str, completion: str) -> None:
    found = work({"gold": gold, "completion": completion})
    assert found["gold"] and not found["equal"]


@pytest.mark.parametrize("gold", ["", "no answer here", r"so \boxed{}", r"\boxed{7", "$"])
def test_text_without_an_answer_is_no_gold_answer(gold: str) -> None:
    assert work({"gold": gold}) == {"gold": False, "equal": False, "answer": None}


def test_votes_name_their_base() -> None:
    texts = [r"\boxed{12_3}", r"\boxed{12_4}", r"\boxed{\text{12}}", r"\boxed{12}"]
    votes = [work({"gold": "1", "completion": text})["answer"] for text in texts]
    assert votes == ["12_3", "12_4", "12", "12"]


def test_small_numbers_are_compared_to_more_places() -> None:
    from sympy import Float, Integer, Rational, Symbol, oo

    found = [decimal_places(one) for one in (Integer(5), Rational(1, 3), Float(1.3e-9), Integer(0))]
    assert found == [6, 6, 12, 6]
    assert [decimal_places(Integer(10) ** n) for n in (400, -400)] == [6, 403]
    assert decimal_places(Symbol("x")) == decimal_places(oo) == decimal_places("text") == 6
