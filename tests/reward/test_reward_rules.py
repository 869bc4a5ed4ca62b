import doctest
from fractions import Fraction

import pytest

from flux_ray.reward import rules, symbols

pytestmark = pytest.mark.unit


@pytest.mark.skipif(symbols.is_missing(), reason="math-verify isn't installed")
def test_the_examples_in_docstrings_hold():
    tried = doctest.testmod(rules)
    assert tried.attempted > 6 and not tried.failed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("the answer is 42.", 42),
        ("3 apples and 4 pears", 4),
        ("#### 72", 72),
        ("####72\n", 72),
        ("10 + 2 = 12\n#### 12 dollars", 12),
        ("#### 5\nno, wait\n#### 6", 6),
        ("#### none of the 3", 3),
        ("#### unclear\n7", None),
        (r"so \boxed{8} of 9", 8),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{\text{about } 5}", 5),
        (r"half, \dfrac{1}{2}", Fraction(1, 2)),
        (r"\frac{1}{2} or 0.25", Fraction(1, 4)),
        (r"\frac{1}{0}", None),
        ("1/2", Fraction(1, 2)),
        ("5/0", None),
        ("1,234,567", 1234567),
        ("1,234.50", Fraction(2469, 2)),
        ("12,3", None),
        ("$1,000", 1000),
        ("-$5", -5),
        ("$-5", -5),
        ("50%", 50),
        ("50 %", 50),
        (".5", Fraction(1, 2)),
        ("-3.25", Fraction(-13, 4)),
        ("10-3", None),
        ("2*3=-6", -6),
        ("1e3", 1000),
        ("2.5e-1", Fraction(1, 4)),
        ("9" * 5000, None),
        ("1e99", 10**99),
        ("no number", None),
        ("", None),
        (r"\boxed{unclosed 7", 7),
    ],
)
def test_the_number_that_a_text_gives(text, number):
    assert rules.parse_number(text) == number


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("42", "42", 1.0),
        (" 42\n", 42, 1.0),
        ("42.0", "42", 0.0),
        ("paris", "Paris", 0.0),
        ("x", None, None),
        ("", "", 1.0),
    ],
)
def test_exact_match(completion, answer, value):
    assert rules.exact_match(None, [completion], [answer]) == [value]


def test_exact_match_may_ignore_case():
    assert rules.exact_match(None, ["paris", "rome"], ["Paris", "Paris"], ignore_case=True) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so 42", "42", 1.0),
        ("42.0", 42, 1.0),
        ("41", "42", 0.0),
        ("nothing", "42", 0.0),
        ("1/3", "0.3333333", 1.0),
        ("0.333", "1/3", 0.0),
        ("1000001", "1000000", 0.0),
        ("#### 18", "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", 1.0),
        ("$18", "18", 1.0),
        ("x", "no number here", None),
        ("x", None, None),
    ],
)
def test_numeric(completion, answer, value):
    assert rules.numeric(None, [completion], [answer]) == [value]


def test_numeric_takes_a_tolerance():
    assert rules.numeric(None, ["0.333", "0.2"], ["1/3", "1/3"], tolerance=1e-3) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("It is 4.", "4", 1.0),
        ("It is 4.", 4, 1.0),
        ("It is 5.", "$4", 0.0),
        ("Paris", "Paris", 1.0),
        ("I think of\n#### Paris", "Paris", 1.0),
        (r"\boxed{Paris}", "Paris", 1.0),
        ("In Paris", "Paris", 0.0),
        ("Apollo 11", "Apollo 11", 1.0),
        ("Soyuz 11", "Apollo 11", 0.0),
        ("#### 12", "6 + 6 = 12\n#### 12", 1.0),
        ("x", None, None),
    ],
)
def test_numeric_or_exact(completion, answer, value):
    assert rules.numeric_or_exact(None, [completion], [answer]) == [value]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("1 + 1 = 2\n#### 2", 1.0),
        ("#### 1,000\n", 1.0),
        ("#### -$2.50", 1.0),
        ("####1/2", 1.0),
        ("#### 50%", 1.0),
        ("#### about 5", 0.0),
        ("#### 5 dollars", 0.0),
        ("#### 5\n#### 6", 1.0),
        ("2", 0.0),
        ("####", 0.0),
        ("#### \n", 0.0),
        ("#### ####", 0.0),
        ("#### 2\nand then", 0.0),
    ],
)
def test_regex_looks_for_a_marked_number_at_the_end_by_default(completion, value):
    assert rules.regex(None, [completion]) == [value]


def test_regex_takes_a_pattern():
    assert rules.regex(None, ["<think>a</think>b", "b"], pattern=r"^<think>.*</think>") == [1.0, 0.0]


def test_length_counts_tokens_beyond_the_target():
    assert rules.length(None, ["", ""], [[1] * 10, [1] * 3], target=4, penalty=0.5) == [-3.0, 0.0]


def test_repetition_is_the_share_of_n_grams_seen_before():
    assert rules.repetition(None, ["", "", ""], [[1, 2, 3, 4], [5] * 5, [1]], ngram=2) == [0.0, -0.75, 0.0]
    assert rules.repetition(None, [""], [[5] * 5], ngram=2, penalty=2.0) == [-1.5]


def test_rules_read_the_text_of_a_chat():
    chats = [[{"role": "assistant", "content": "42"}], [{"role": "assistant", "content": None}]]
    assert rules.exact_match(None, chats, ["42", "42"]) == [1.0, 0.0]
    assert rules.numeric_or_exact(None, chats, ["42", "42"]) == [1.0, 0.0]
