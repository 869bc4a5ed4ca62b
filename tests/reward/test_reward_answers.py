r"""Answers however they are written: the right number is right, and no other one is; texts, lists and formulas too."""

from __future__ import annotations

import doctest
import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flux_ray.reward import answers, symbols
from flux_ray.reward.rules import RULES, exact_match, numeric, numeric_or_exact
from tests.reward.rewriting import digits, others, some_written, written

pytestmark = pytest.mark.unit

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"
NUMBERS = st.builds(lambda scaled, places: Fraction(scaled, 10**places),
                    st.integers(-(10**9), 10**9), st.integers(0, 3)).filter(bool)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
needs_math_verify = pytest.mark.skipif(symbols.is_missing(), reason="math-verify isn't installed")


def test_the_examples_in_docstrings_hold():
    modules = [answers] if symbols.is_missing() else [answers, symbols]
    for module in modules:
        tried = doctest.testmod(module)
        assert tried.attempted and not tried.failed


def gold(number: Fraction) -> str:
    return f"{'-' if number < 0 else ''}{digits(number)}"


def right(rule: str, text: str, answer: object) -> float | None:
    return RULES[rule](None, [text], [answer])[0]


NUMBERS_AGREE = [
    (r"\boxed{10{,}000}", "10000"), (r"\boxed{10\,000}", "10000"), ("it is 1 000 000", "1000000"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"), ("The answer is −5.", "-5"), (r"\frac{3}{-4}", "-3/4"),
    ("18.90", r"\$18.90"), ("50", r"50\%"), ("90", r"90^\circ"), ("1 1/2", "1.5"), (r"1.5 \times 10^3", "1500"),
    ("1500", r"1.5 \times 10^3"), ("1½", "1.5"), ("12,34,567", "1234567"), ("１２", "12"), ("10³", "1000"),
    (r"10,\!000", "10000"), ("5 (five)", "5"), ("a 5-day trip", "5"), (r"\boxed{2\frac{1}{2}}", "2.5"),
    ("#### Step 4: so\n\\boxed{72}", "72"), ("<answer>5</answer>", "5"), ("5<|im_end|>", "5"),
    (r"\boxed{\left(5\right)}", "5"), (r"-\dfrac{-1}{2}", "0.5"), ("- 5", "-5"), ("$-5$", "-5"), ("€5", "5"),
    ("Left: 437 + 2*234 = 905.\n\nFinal Answer: **73**", "73"), (r"\boxed{28 pct}", r"28\%"), ("28 percentage", "28"),
    ("5!", "5"), (r"\boxed{3 \times 4 = 12}", "12"), (r"\boxed{0.\overline{3}}", "1/3"), (r"\frac13", r"0.\bar{3}"),
    (r"-2.1\overline{6}", "-13/6"), (r"1,234.\overline{5}", "11111/9"), (r"\boxed{{1 \over 2}}", "0.5"),
    (r"\boxed{10\text{ km}^2}", "10"), ("答案是42。", "42"), ("所以答案是 -5", "-5"), ("정답은42입니다", "42"),
    ("<think>maybe \\boxed{7}</think> It is 5.", "5"), ("#### 42\n" + "The reasoning confirms this. " * 20, "42"),
    ("So, Josh made a profit of **$70,000**.", "70000"), ("42", 42.0), (r"\fbox{42}", "42"), ("42 个", "42"),
    (r"\boxed{1 \over 2}", "0.5"), (r"It is $1 \over 2$", "0.5"), (r"-{1 \over 2}", "-0.5"), (r"2{1\over 2}", "2.5"),
]  # fmt: skip
NUMBERS_DIFFER = [
    (r"\boxed{10{,}234}", "234"), (r"\boxed{\frac{1}{2}}", r"-\frac{1}{2}"), ("5", "−5"), ("−5", "5"),
    (r"\boxed{\sqrt{5}}", "5"), (r"\boxed{2^5}", "5"), (r"\boxed{5x}", "5"), (r"\boxed{3\pi}", "3"),
    (r"the area is 25\pi", "25"), (r"\boxed{(3, 4)}", "4"), (r"\boxed{x > 5}", "5"), (r"\boxed{x \ge 5}", "5"),
    (r"\boxed{12,3}", "3"), ("12,3", "3"), (r"\boxed{x=2, y=3}", "3"), (r"\boxed{5:3}", "3"), (r"\boxed{5!}", "5"),
    (r"\boxed{5-x}", "5"), (r"\boxed{x + 5}", "5"), (r"\boxed{-(5)}", "5"), (r"\boxed{\frac{\sqrt{3}}{2}}", "2"),
    (r"\boxed{\log 5}", "5"), (r"\boxed{5_8}", "5"), (r"\boxed{\pm 5}", "5"), ("5/0", "0"), ("x^2", "2"), ("5²", "52"),
    ("5.6.7", "7"), ("1,000,50", "50"), ("5e3", "5"), (r"1.5 \times 10^3", "3"), (r"\boxed{\frac{1}{2}}", "2"),
    ("50%", "0.5"), (r"\boxed{2 \text{ or } 3}", "3"), (r"\boxed{5\sqrt{2}}", "5"), ("2**3", "3"), ("1 1/2", "1/2"),
    (r"\boxed{3x - y + 13 = 0}", "0"), (r"\boxed{10^{-10}}", r"2\cdot 10^{-10}"), ("0.0010001", "0.001"),
    (r"\boxed{\frac{1}{3000000}}", r"\frac{1}{4000000}"), (r"\boxed{x^2 = 4}", "4"),
    (r"\boxed{0.\overline{3}}", "0.3"), (r"0.\overline{3}", "3"), (r"0.1\overline{6}", r"0.\overline{16}"),
    (r"0.\overline{3}x", "1/3"), (r"x + 1 \over 2", "0.5"), (r"\boxed{{x \over 2}}", "2"), (r"it is \frac{x}{2}", "2"),
    (r"it is 1 \over 2 apples", "2"), (r"1 000.\overline{1}", "10/9"), (r"\frac{x}{3,000}", "3000"),
    (r"\boxed{\{5\}}", "5"), (r"\boxed{5 + x}", "5"), ("10-3", "3"), (r"\boxed{|5|}", "5"),
]  # fmt: skip
TEXTS_AGREE = [
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("true", True),
    ("<think>A or B?</think>\n\n**B**", "B"), ("[8.124,12.852]", "[8.124, 12.852]"),
    (r"\frac12", r"\frac{1}{2}"), (r"\text{B}", "B"), ("B", r"\text{B}"), ("(3, 4)", "(3,4)"), ("(B)", "B"),
    (r"\boxed{\textbf{(B)}}", "B"), ("Paris.", "Paris"), (r"(0.5, 1)", r"\left(\frac12, 1\right)"), ("x=5", "5"),
    (r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}{2}"), ("5", "x = 5"), ("x^2 + 1", "x^2+1"), ("[0, 1)", "[0,1)"),
    (r"\{1, 2\}", r"\{1,2\}"), ("1,2,3", "1, 2, 3"), ("5 apples", "5 apples"),
    ("5", r"5\text{ cm}"), (r"10\text{ inches}^2", "10"), ("12_{3}", "12_3"), (r"5,\frac{1}{2}", "5, 0.5"),
    (r"x\in[-2,7]", "[-2,7]"), (r"{x+1 \over 2}", r"\frac{x+1}{2}"), (r"(3,0.\overline{3})", r"(3, \frac13)"),
]  # fmt: skip
TEXTS_DIFFER = [
    ("<think>B</think> C", "B"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    ("x=5", "y=5"), ("1 2", "12"), ("(3,4)", "(4,3)"), ("(3,4)", "[3,4]"), ("(3,4", "(3,4)"), ("A", "B"), ("a", "A"),
    ("12", "Apollo 12"), ("5 apples", "6 apples"), ("(3,-4)", "(3,4)"), ("(1,2)", "(1,2,3)"), ("x+1", "x-1"),
    ("5 cm", r"5\text{ m}"), ("3,5", "3.5"), ("12:00", "1:00"), (r"7_{10}", r"7_{8}"), ("31/2", "3 1/2"),
    ("New York", "York"), ("", "5"), ("", "B"), (r"\boxed{}", "B"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer"), NUMBERS_AGREE)
def test_one_number_written_in_two_ways_is_right(text, answer):
    assert right("numeric", text, answer) == right("numeric_or_exact", text, answer) == 1.0


@pytest.mark.parametrize(("text", "answer"), NUMBERS_DIFFER)
def test_another_number_or_a_part_of_an_expression_is_wrong(text, answer):
    assert right("numeric", text, answer) == right("numeric_or_exact", text, answer) == 0.0


@pytest.mark.parametrize(("text", "answer"), TEXTS_AGREE)
def test_one_text_written_in_two_ways_is_right(text, answer):
    assert right("numeric_or_exact", text, answer) == 1.0


@pytest.mark.parametrize(("text", "answer"), TEXTS_DIFFER)
def test_another_text_is_wrong(text, answer):
    assert right("numeric_or_exact", text, answer) == 0.0


@pytest.mark.parametrize("rule", [exact_match, numeric, numeric_or_exact])
def test_any_of_a_list_is_right(rule):
    assert rule(None, ["42", "43", "44"], [["42"], ["1", 43, None], ["1"]]) == [1.0, 1.0, 0.0]
    assert rule(None, ["42"] * 4, [[], [None], None, float("nan")]) == [None] * 4


# What holds of every number.


@MANY
@given(NUMBERS, st.randoms(use_true_random=False))
@example(Fraction(1234567), random.Random(0))
@example(Fraction(-1, 1000), random.Random(0))
def test_every_way_to_write_a_number_is_right_and_no_other_number_is(number, chance):
    answer = gold(number)
    for kind, text in some_written(number, chance, 30):
        assert right("numeric_or_exact", text, answer) == 1.0, (kind, text, answer)
        assert right("numeric", text, answer) == 1.0, (kind, text, answer)
    for other in others(number):
        for kind, text in some_written(other, chance, 4):
            assert right("numeric_or_exact", text, answer) == 0.0, (kind, text, answer)
            assert right("numeric", text, answer) == 0.0, (kind, text, answer)


@settings(MANY, max_examples=300)
@given(st.text(max_size=60) | st.from_regex(r"\A[-0-9,.{}\\ a-z$()/^]{0,40}\Z"), NUMBERS)
def test_whatever_a_policy_writes_is_scored(text, number):
    """And what is right alone is right in a box."""
    for rule in ("numeric", "numeric_or_exact", "exact_match"):
        assert right(rule, text, gold(number)) in (0.0, 1.0)
    assert answers.same_answer(text, text, lambda a, b: a == b)


# On real answers, and beside them on made ones that are always there.

MADE = ["72", "#### 1,450", "0", "-7", "18.90", "3/4", "#### 12", "1000000", "0.05", "999"]


def numbers_of(cells):
    return sorted({number for number in map(answers.parse_number, cells) if number is not None})


def real_numbers():
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} isn't there")
    return numbers_of(json.loads(line)["answer"] for line in GSM8K.open(encoding="utf-8"))


def wrong_and_accepted(rule, numbers, *, of_each, chance):
    """Texts of the right number that aren't right, and of another that are."""
    wrong, accepted = [], []
    for number in numbers:
        answer = gold(number)
        texts = [text for _, text in (written(number) if of_each is None else some_written(number, chance, of_each))]
        scored = RULES[rule](None, texts, [answer] * len(texts))
        wrong += [(text, answer) for text, value in zip(texts, scored, strict=True) if value != 1.0]
        changed = [text for other in others(number) for _, text in some_written(other, chance, 2)]
        scored = RULES[rule](None, changed, [answer] * len(changed))
        accepted += [(text, answer) for text, value in zip(changed, scored, strict=True) if value != 0.0]
    return wrong, accepted


MADE_RULES = ["numeric_or_exact", "numeric", pytest.param("math", marks=needs_math_verify)]


@pytest.mark.parametrize("rule", MADE_RULES)
def test_made_answers_rewritten_are_right_and_changed_are_wrong(rule):
    numbers = [number for number in numbers_of(MADE) if number]
    assert wrong_and_accepted(rule, numbers, of_each=None, chance=random.Random(0)) == ([], [])


@pytest.mark.system
@pytest.mark.parametrize("one_of", [8, pytest.param(1, marks=pytest.mark.all)])
@pytest.mark.parametrize("rule", MADE_RULES)
def test_gsm8k_s_answers_rewritten_are_right_and_changed_are_wrong(rule, one_of):
    numbers = [number for number in real_numbers() if number]
    assert len(numbers) > 800
    assert wrong_and_accepted(rule, numbers[::one_of], of_each=12, chance=random.Random(0)) == ([], [])


# What math-verify adds, and what it must not.

SYMBOLS_AGREE = [
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}\frac{2}{2}\\2\end{pmatrix}"),
    (r"\boxed{b+a}", "a+b"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"), (r"\boxed{\sqrt{25}}", "5"), (r"\boxed{3\pi}", r"\pi \cdot 3"),
    (r"\boxed{\{2,1\}}", r"\{1,2\}"), (r"So it is $2\sqrt{2}$.", r"\sqrt{8}"), (r"\boxed{x\le 5}", r"x \leq 5"),
    (r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}", r"\begin{pmatrix}1 & 2\end{pmatrix}"), ("$x^2+1$", "1+x^2"),
    (r"\boxed{2x+4y-3=0}", r"y = -\frac{1}{2}x + \frac{3}{4}"), (r"\boxed{\frac{\pi}{2}}", r"\frac{1}{2}\pi"),
    (r"\boxed{\frac{\sqrt2}{2}}", r"\frac{1}{\sqrt{2}}"), (r"\boxed{2 \text{ or } 3}", r"\{2,3\}"),
]  # fmt: skip
#: Right by math-verify alone: |5| is 5, and the set of 5 is taken for 5.
NOT_NUMBERS = {r"\boxed{|5|}", r"\boxed{\{5\}}"}
SYMBOLS_DIFFER = [
    (r"\boxed{Sirap}", "Paris"), (r"\boxed{BA}", "AB"), (r"\boxed{9^{9^{9}}}", "5"), ("x", "y"),
    # Of public reports about math-verify: it takes each for the other.
    (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}"), (r"\boxed{\frac{1}{2^{98}}}", r"\frac{1}{2^{99}}"),
    (r"\boxed{\frac{1}{3 \cdot 2^{2006}}}", r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}"), (r"\boxed{7_{10}}", "7_{8}"),
    (r"\boxed{1, 3, 5, \ldots, 2n-1}", r"1, 2, \ldots, n"), (r"\boxed{\forall x>0, f(x) = 0}", "f(x) = 0"),
    (r"\boxed{(1,2)}", r"\{1,2\}"), (r"\boxed{5\text{ cm}}", r"5\text{ m}"), (r"\boxed{4\sqrt(2)}", "4"),
    (r"\boxed{n=1, 2, 3}", "n=2, 3, 4"), (r"\boxed{D = (0, 1.5)}", "D = (0, 1)"), (r"\boxed{2021}", r"\pm 2021"),
    (r"\boxed{1 + \frac{1}{\mathrm{e}}}", r"1 - \frac{1}{\mathrm{e}}"), (r"\boxed{1:4:9}", "1:2:3"),
    (r"\boxed{5 cats}", "5 acts"), (r"\boxed{(3,4)}", "[3,4]"), (r"\boxed{(4,3)}", "(3,4)"), ("", "5"),
]  # fmt: skip


@needs_math_verify
@pytest.mark.parametrize(("text", "answer"), NUMBERS_AGREE[::3] + TEXTS_AGREE + SYMBOLS_AGREE)
def test_math_takes_formulas_that_are_equal(text, answer):
    assert right("math", text, answer) == 1.0


@needs_math_verify
@pytest.mark.parametrize(("text", "answer"), [pair for pair in NUMBERS_DIFFER + TEXTS_DIFFER + SYMBOLS_DIFFER
                                              if pair[0] not in NOT_NUMBERS])
def test_math_takes_no_other_formula(text, answer):
    assert RULES["math"](None, [text], [answer], seconds=1.0) == [0.0]
