"""Ways to write a number, and numbers that aren't it.

Gives:  `written(number)`: every way to write it, by kind; `some_written`, a few of them; `others(number)`: numbers
        that a slip gives.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

MINUS = "−"
#: Between groups of three digits.
SEPARATORS = (",", "{,}", "\\,", "\\;", "\\ ", "~", "\u2009", "\u202f", "\u00a0", " ", "'", ",\\!")
#: Where the number is written in place of N.
WORDS = (
    "N", "The answer is N.", "#### N", "so 3 of them.\n#### N", "\\boxed{N}", "We get $\\boxed{N}$.", "\\[ x = N \\]",
    "\\boxed{x = N}", "I had 7 at first, and 2 of 3 are gone.\n\nThe final answer is: \\boxed{N}", "**N**",
    "\\boxed{N\\text{ dollars}}", "\\fbox{N}", "\\boxed {N}", "<think>1 or 2?</think>\nN", "#### N apples",
    "Answer:\n$$\\boxed{\\mathbf{N}}$$", "### Step 2\nIt is \\(N\\)", "#### Step 4: done\n\\boxed{N}",
    "\\boxed{\\text{N}}",
)  # fmt: skip
CURRENCY = ("${}", "\\${}", "€{}", "{} €", "£ {}", "{}\\$")
UNITS = ("{}%", "{} %", "{}\\%", "{} percent", "{}^\\circ", "{}^{{\\circ}}", "{}°", "{}\\text{{ kg}}", "{} dollars")


def digits(number: Fraction) -> str:
    """The number as a decimal, without its sign; it must have a finite one."""
    scaled, places = abs(number), 0
    while scaled.denominator != 1:
        scaled, places = scaled * 10, places + 1
    text = str(scaled.numerator).rjust(places + 1, "0")
    return f"{text[:-places]}.{text[-places:]}" if places else text


def grouped(text: str, by: str) -> str:
    whole, point, rest = text.partition(".")
    first = len(whole) % 3 or 3
    groups = [whole[:first], *(whole[place : place + 3] for place in range(first, len(whole), 3))]
    return by.join(groups) + point + rest


def forms(number: Fraction) -> Iterator[tuple[str, str]]:
    """Kind and text of the number's size, without its sign."""
    text, size = digits(number), abs(number)
    yield "plain", text
    yield "decimal", f"{text}.0" if "." not in text else f"{text}0"
    for by in SEPARATORS:
        yield f"separator {by!r}", grouped(text, by)
    for command in ("\\frac", "\\dfrac", "\\tfrac"):
        yield "fraction", f"{command}{{{size.numerator * 2}}}{{{size.denominator * 2}}}"
    yield "fraction", f"{size.numerator}/{size.denominator}"
    if size.denominator > 1 and size > 1:
        whole, rest = divmod(size, 1)
        yield "mixed", f"{whole} {rest}"
        yield "mixed", f"{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"
    for power in (1, 3):
        small = digits(size / 10**power)
        yield "scientific", f"{small} \\times 10^{power}"
        yield "scientific", f"{small} \\cdot 10^{{{power}}}"
        yield "scientific", f"{small}e{power}"
        yield "scientific", f"{small}E+0{power}"
        yield "scientific", f"{small} × 10{'⁰¹²³'[power]}"


def signed(number: Fraction, kind: str, text: str) -> Iterator[tuple[str, str]]:
    if number >= 0:
        yield kind, text
        return
    for minus in ("-", MINUS):
        yield f"{kind}, minus {minus}", f"{minus}{text}"


def contexts(kind: str) -> list[str]:
    """Where a number of this kind may stand, in place of N."""
    around = []
    if kind.startswith(("plain", "decimal", "separator ','")):
        around = [way.format("N") for way in (*CURRENCY, *UNITS)]
    return [*WORDS, *around, *(f"\\boxed{{{way}}}" for way in around)]


def written(number: Fraction) -> Iterator[tuple[str, str]]:
    """Kind and text: each form in each context."""
    for kind, text in (pair for form in forms(number) for pair in signed(number, *form)):
        for context in contexts(kind):
            yield f"{kind} in {context!r}", context.replace("N", text)


def some_written(number: Fraction, chance: random.Random, count: int) -> list[tuple[str, str]]:
    """As many of them, any form in any context."""
    known = [pair for form in forms(number) for pair in signed(number, *form)]
    chosen = [(kind, text, chance.choice(contexts(kind))) for kind, text in chance.choices(known, k=count)]
    return [(f"{kind} in {context!r}", context.replace("N", text)) for kind, text, context in chosen]


def others(number: Fraction) -> Iterator[Fraction]:
    """By sign, by each digit, by one, by a power of ten; by what is left of a separator, and right of it."""
    text, sign = digits(number), -1 if number < 0 else 1
    candidates = [-number, number + 1, number - 1, number * 10, number / 10, number * 1000, number / 1000]
    for place, digit in enumerate(text):
        if digit != ".":
            candidates.append(sign * Fraction(text[:place] + str((int(digit) + 1) % 10) + text[place + 1 :]))
    whole = text.partition(".")[0]
    if len(whole) > 3:
        candidates += [sign * Fraction(whole[-3:]), sign * Fraction(whole[:-3])]
    yield from (candidate for candidate in dict.fromkeys(candidates) if candidate != number)
