r"""How people and models write an answer.

Takes:  a text: a completion, or the cell of an answer column.
Gives:  `golds`, the right answers of a cell; `said`, what follows a reasoning; `answer_part`, `expression_in`,
        `parse_number`, `whole_number`; `same_answer`.
Knows:  `#### x`, `\boxed{x}`, the last number of a text; LaTeX, separators of thousands, fractions, mixed numbers,
        powers of ten, currency, percent and degree signs, Unicode's minus signs and blanks.
Never:  takes part of an expression for a number: the 5 of \sqrt{5}, of 2^5, of (3, 5), of x > 5.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

REASONED = "</think>"  # what follows is the answer
MAX_NUMBER_CHARS = 64  # a longer run of digits is babble, and Fraction would be slow on it
MAX_POWER = 400  # of ten
MAX_NESTING = 8  # of LaTeX commands around one another
MAX_PART_CHARS = 4096  # a longer "answer" is babble too: compared as it is

#: In a plain text: see `plain`.
NUMBER = re.compile(
    r"""(?<![\w.)])
    (?P<sign>[-+]?)[ ]?[$€£¥₹]?[ ]?(?P<inner>[-+]?)
    (?:(?P<whole>\d+)[ ](?P<top>\d+)[ ]?/[ ]?(?P<bottom>\d+)(?![\d/])
      |10[ ]?\^[ ]?\{?[ ]?(?P<of_ten>[-+]?\d{1,3})[ ]?\}?(?!\d)
      |(?P<number>(?:\d{1,3}(?P<by>[, '’])\d{3}(?:(?P=by)\d{3})*(?!\d)   # 1,234,567
                    |\d{1,2}(?:,\d{2})+,\d{3}(?!\d)                      # 12,34,567
                    |\d+)(?:\.\d+)?
                  |\.\d+)
       (?:[ ]?[*x][ ]?10[ ]?\^[ ]?\{?[ ]?(?P<power>[-+]?\d{1,3})[ ]?\}?(?!\d)
         |e(?P<exponent>[-+]?\d{1,3})(?!\w))?
       (?:[ ]?/[ ]?(?P<below>[-+]?\d+(?:\.\d+)?))?)""",
    re.IGNORECASE | re.VERBOSE,
)
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+")
#: What stands right before a number that is part of an expression, of a relation or of a list without blanks.
EXPRESSION_BEFORE = re.compile(r"([*^_/<>≤≥≠±|\\{]|[\w)][ ]?[-+]|[-+][ ]?\(|\\[A-Za-z]+|\d[,:])[ ]?\Z")
#: The same right after it. A letter alone is a variable, unless it is a unit's.
EXPRESSION_AFTER = re.compile(
    r"[ ]?(?:[\^_{\\<>≤≥≠±]|[-+*/][ ]?(?:[A-Za-z](?![A-Za-z])|[\\({\d]))"
    r"|[(|]|[,:.]\d|(?![mgshldLVWC])[A-Za-z](?![A-Za-z])|[ ][xyz](?![A-Za-z])"
)
#: A sign after this is an operator: 10 - 3, x + 5. After a word it is the number's own.
OPERAND_BEFORE = re.compile(r"(?:[\d)%}]|(?<![A-Za-z])[A-Za-z])[ ]?\Z")
MARK = re.compile(r"####|\\(?:boxed|fbox|framebox)(?![A-Za-z])")
FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
VARIABLE = re.compile(r"([A-Za-z])\s*(?:=|\\in(?![A-Za-z]))\s*(?=\S)")
#: Left of `=`, it tells of an equation, or of several answers: 3x + 4y = 0; x = 2, y = 3.
NO_NAME = re.compile(r"[,;&]|\b(?:and|or)\b|\d[ ]?[A-Za-z](?![A-Za-z])|[-+*/^][ ]?[A-Za-z](?![A-Za-z])"
                     r"|(?<![A-Za-z])[A-Za-z][ ]?[-+*/^]")
PERCENT = r"%|percent(?:age)?|pct\.?"
UNIT = r"(?:[cmk]m|[km]?g|m?[lL]|[mshd]|ft|in|lbs?|oz|hrs?|mi|yd)(?![A-Za-z])"
#: What stands after a number and counts it: 5 cm, 5 apples, 10 inches^2.
UNITS = re.compile(rf"[ ]?({UNIT}|{PERCENT})|[ ]({UNIT}|[A-Za-z]{{3,}})((?:[ /](?:{UNIT}|[A-Za-z]{{2,}}))*)"
                   r"(?:[ ]?\^\{?[23]\}?)?[ ]?")
SUBSCRIPT = re.compile(r"([_^])\{(\w)\}")
BETWEEN_SYMBOLS = re.compile(r"(?<=\W)\s+|\s+(?=\W)")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
CHOICE = re.compile(r"\(?([A-Za-z])[).:]?")

TEXTS = r"\\(?:text|textbf|textit|textrm|texttt|mbox|hbox|emph)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
FONTS = r"\\(?:math(?:rm|bf|it|sf|tt|bb|cal)|boldsymbol|bm|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
#: Pattern ► what it means in plain text, in this order.
PLAIN: tuple[tuple[re.Pattern[str], str], ...] = tuple((re.compile(pattern), meant) for pattern, meant in (
    (r"\*\*(?=\S)([^*\n]+)(?<=\S)\*\*", r" \1 "),                         # bold, in Markdown
    (r"</?[A-Za-z][\w-]*>|<\|[^|<>\n]*\|>", " "),                         # tags, special tokens
    (r"\{\s*,\s*\}|,\\[,!]", ","),                                        # 10{,}000
    (r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?", ""),
    (r"(?<!\\)\\[,;: ]|\\(?:quad|qquad|thinspace|enspace|hfill|newline|therefore)(?![A-Za-z])|~|\{\\[,;:]\}"
     r"|[\u00a0\u2000-\u200a\u202f\u205f\u3000]|\\[()\[\]]", " "),
    (r"[\u200b-\u200d\u2060\ufeff]|\\displaystyle", ""),                  # of no width
    (r"[\u2212\uff0d\ufe63]|[\u2010\u2011\u2013](?=[\d.$\\])", "-"),      # minus signs; dashes and hyphens used as one
    (r"(?<=[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])(?=-?\d)", " "),    # no blanks between words and numbers
    (r"\\([%$€£#&])", r"\1"),
    (r"\\(?:pounds|euro|yen|dollar)(?![A-Za-z])", "$"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\}|\\degree)(?![A-Za-z])|°|\\degree(?![A-Za-z])", " "),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∙]", "*"),
    (r"\\(?:approx|simeq|equiv)(?![A-Za-z])|[≈≃]", "="),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),              # TeX's own fraction
    (r"(\A|[$=])(\s*)([-+]?[\d.,]+)\s*\\over\s*([-+]?[\d.,]+)(?=\s*(?:\Z|\$))", r"\1\2\\frac{\3}{\4}"),
    (r"(\A\s*)(?![\s\S]*(?<![\\A-Za-z])[A-Za-z]{2})([^{}$]+?)\\over(?![A-Za-z])([^{}$]+)\Z", r"\1\\frac{\2}{\3}"),
))  # fmt: skip
#: Without any of these a text has nothing that the patterns above undo.
LATEX_OR_UNICODE = re.compile(r"[*<{\\~^]|[^\x00-\x7f]")
#: 0.1\overline{6}: the digits before, those that don't repeat, those that do.
REPEATING = re.compile(r"(?<![\w.])(\d{1,3}(?:[, ]\d{3})+|\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
WRAPPED: tuple[tuple[re.Pattern[str], str], ...] = ((re.compile(TEXTS), r" \1 "), (re.compile(FONTS), r"\1"))
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
VULGAR = re.compile(r"(\d?)([¼½¾⅐-⅞])")
WIDE = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code != 0xFF0D})
FRACTION_SIGN = re.compile(r"\\frac(?![A-Za-z])\s*")
SIMPLE = re.compile(r"\s*[-+]?\s*[\d.,]+\s*")


def golds(cell: object) -> list[str]:
    """The right answers of a cell: any of a list's is right. None, nan and an empty list say nothing.

    A column of whole numbers with a gap in it is one of floats in most tables, so 42.0 is 42 too.

    >>> golds(42), golds(["42", None, "forty-two"]), golds(None), golds(42.0), golds(True)
    (['42'], ['42', 'forty-two'], [], ['42.0', '42'], ['True', 'true'])
    """
    if isinstance(cell, (list, tuple)):
        return [gold for one in cell for gold in golds(one)]
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return []
    if isinstance(cell, bool):
        return [str(cell), str(cell).lower()]
    return [str(cell), str(int(cell))] if isinstance(cell, float) and cell.is_integer() else [str(cell)]


def said(text: str) -> str:
    """What a completion says after its reasoning, where it says anything there.

    >>> said("<think>7? no</think> It is 5."), said("<think>It is 5.</think>")
    (' It is 5.', '<think>It is 5.</think>')
    """
    after = text.rpartition(REASONED)[2]
    return after if after.strip() else text


def plain(text: str) -> str:
    r"""The text as one would type it: LaTeX for numbers and words undone, Unicode's variants replaced.

    >>> plain("-\\frac{1}{2}"), plain("10{,}000"), plain("\\text{B}"), plain("−5½")
    ('-1/2', '10,000', ' B ', '-5 1/2')
    """
    if not LATEX_OR_UNICODE.search(text):
        return text
    if not text.isascii():
        text = VULGAR.sub(_vulgar, text.translate(WIDE))
        text = SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}", text)
    for pattern, meant in PLAIN:
        text = pattern.sub(meant, text)
    if "\\" not in text:
        return text
    text = REPEATING.sub(_repeating, text)
    for _ in range(MAX_NESTING):
        before = text
        for pattern, meant in WRAPPED:
            text = pattern.sub(meant, text)
        if text == before:
            break
    return _without_fractions(text, MAX_NESTING)


def _vulgar(match: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(match[2])).limit_denominator(10)
    return f"{match[1]} {value}" if match[1] else str(value)


def _repeating(match: re.Match[str]) -> str:
    """The fraction that it is; as it stands where it is too long for a number."""
    before, fixed, again = re.sub("[, ]", "", match[1]), match[2], match[3]
    if len(match[0]) > MAX_NUMBER_CHARS:
        return match[0]
    scale = 10 ** len(fixed)
    value = Fraction(int(f"{before}{fixed}" or 0), scale) + Fraction(int(again), (10 ** len(again) - 1) * scale)
    return f"{value.numerator}/{value.denominator}"


def _without_fractions(text: str, depth: int) -> str:
    r"""a/b for \frac{a}{b} of numbers, else (a)/b or (a)/(b)."""
    parts, end = [], 0
    for match in FRACTION_SIGN.finditer(text):
        if match.start() < end:
            continue  # within the one before, which has seen to it
        top, after_top = _argument(text, match.end())
        bottom, after = _argument(text, after_top)
        if top is None or bottom is None or not depth:
            continue
        begun = text[end : match.start()]
        top, bottom = (_without_fractions(part, depth - 1) for part in (top, bottom))
        if SIMPLE.fullmatch(top) and SIMPLE.fullmatch(bottom):
            mixed = " " if begun[-1:].isdigit() else ""
            value = f"{mixed}{top.strip().replace(',', '')}/{bottom.strip().replace(',', '')}"
        else:  # a number below stands bare, so that nobody takes it for the answer
            value = f"({top})/{bottom.strip().replace(',', '')}" if SIMPLE.fullmatch(bottom) else f"({top})/({bottom})"
        parts += [begun, value]
        end = after
    return "".join([*parts, text[end:]])


def _argument(text: str, start: int) -> tuple[str | None, int]:
    """A command's argument, in braces or one character long, and where it ends."""
    start += len(text[start : start + 2]) - len(text[start : start + 2].lstrip())
    if text[start : start + 1] != "{":
        alone = text[start : start + 1]
        return (alone, start + 1) if alone and alone not in "\\}" else (None, start)
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place], place + 1
    return None, start


def answer_part(text: str) -> tuple[str, bool]:
    r"""What a text marks as its answer, by the last `####` or `\boxed{}`, and whether it marks one; else all of it.

    >>> answer_part("Step 1\n#### 7\n"), answer_part("so \\boxed{\\text{B}}."), answer_part("it is 7")
    ((' 7', True), ('\\text{B}', True), ('it is 7', False))
    """
    for mark in reversed(list(MARK.finditer(text))):
        if mark[0] == "####":
            return text[mark.end() :].partition("\n")[0], True
        argument, _ = _argument(text, mark.end())
        if argument is not None:
            return argument, True
    return text, False


def expression_in(text: str) -> str:
    r"""What a text marks as its answer, else its last formula, else its last line.

    >>> expression_in("It is $x$, so $2x$ is even."), expression_in("First\nx + 1\n")
    ('2x', 'x + 1')
    """
    part, is_marked = answer_part(text)
    if is_marked:
        return part
    formulas = FORMULA.findall(text[-MAX_PART_CHARS:])
    return max(formulas[-1]) if formulas else (text.strip().splitlines() or [""])[-1]


def parse_number(text: str) -> Fraction | None:
    r"""The number that a text gives: the one that it marks as its answer, else the last one in it.

    None where there is none, where a mark holds several, and where it is part of an expression.

    >>> parse_number("3 of 4, so \\boxed{\\frac{3}{4}}"), parse_number("$1,234.50 in all"), parse_number("none")
    (Fraction(3, 4), Fraction(2469, 2), None)
    """
    part, is_marked = answer_part(text)
    if is_marked:
        return _only_number(part)
    part = plain(part)
    last = None
    for match in NUMBER.finditer(part):
        last = match
    return None if last is None or not _stands_alone(part, last) else _value(last)


def _only_number(part: str) -> Fraction | None:
    """The one number of a marked answer, after the last `=` where there is one."""
    if len(part) > MAX_PART_CHARS:
        return None
    part = plain(part).strip().strip("$")
    left, equals, right = part.rpartition("=")
    if equals and NO_NAME.search(GROUPED.sub("", left)):
        return None
    numbers = list(NUMBER.finditer(right))
    if len(numbers) != 1 or "\\" in right or right.strip().startswith(tuple(BRACKETS)) or "!" in right:
        counted = _counted(_bare(right))   # 10 km^2
        return counted[0] if counted else whole_number(right)
    return _value(numbers[0]) if _stands_alone(right, numbers[0]) else None


def _stands_alone(text: str, match: re.Match[str]) -> bool:
    before, after = text[max(0, match.start() - 24) : match.start()], text[match.end() : match.end() + 8]
    if match["sign"] and OPERAND_BEFORE.search(before):
        return False
    return not EXPRESSION_BEFORE.search(before) and not EXPRESSION_AFTER.match(after)


def whole_number(text: str) -> Fraction | None:
    """The number that a text is as a whole (sign, currency, percent, degrees, full stop aside); else None."""
    if len(text) > MAX_PART_CHARS:
        return None
    bare = plain(text).strip().strip("$").removesuffix(".").strip()
    bare = re.sub(rf"\s*(?:[$€£¥₹]|{PERCENT})$", "", bare).strip()
    while bare[:1] + bare[-1:] in ("{}", "()"):
        bare = bare[1:-1].strip()
    match = NUMBER.fullmatch(bare)
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > MAX_NUMBER_CHARS:
        return None
    sign = -1 if (match["sign"] == "-") != (match["inner"] == "-") else 1
    if match["whole"]:
        top, bottom = int(match["top"]), int(match["bottom"])
        return sign * (int(match["whole"]) + Fraction(top, bottom)) if top < bottom else None
    value = Fraction(re.sub("[, '’]", "", match["number"] or "1"))
    power = int(match["of_ten"] or match["power"] or match["exponent"] or 0)
    if abs(power) > MAX_POWER:
        return None
    value *= Fraction(10) ** power
    if match["below"]:
        below = Fraction(match["below"])
        return sign * value / below if below else None
    return sign * value


def same_answer(text: str, gold: str, close: Callable[[Fraction, Fraction], bool]) -> bool:
    r"""Whether two answers are one: as numbers, else part by part in equal brackets, else as texts.

    `close`: whether two numbers count as equal.
    """
    one, other = _bare(text), _bare(gold)
    if one == other:
        return True
    if max(len(one), len(other)) > MAX_PART_CHARS:
        return False
    numbers = whole_number(one), whole_number(other)
    if numbers[0] is not None and numbers[1] is not None:
        return close(numbers[0], numbers[1])
    counted = _counted(one), _counted(other)
    if counted[0] and counted[1]:  # 5 apples against 5
        return not (counted[0][1] and counted[1][1]) and close(counted[0][0], counted[1][0])
    named = VARIABLE.match(one), VARIABLE.match(other)
    if bool(named[0]) != bool(named[1]):  # x = 5 against 5
        one, other = (side[match.end() :] if match else side for side, match in zip((one, other), named, strict=True))
        return same_answer(one, other, close)
    choices = CHOICE.fullmatch(one), CHOICE.fullmatch(other)
    if choices[0] and choices[1]:
        return choices[0][1] == choices[1][1]
    parts = parts_of(one), parts_of(other)
    if parts[0] and parts[1] and len(parts[0]) == len(parts[1]):
        return all(same_answer(a, b, close) for a, b in zip(*parts, strict=True))
    return False


def _counted(text: str) -> tuple[Fraction, str] | None:
    """The number that a text begins with and the words that it counts, where there is nothing else."""
    match = NUMBER.match(text)
    words = text[match.end() :] if match else ""
    value = _value(match) if match and (not words or UNITS.fullmatch(words)) else None
    return None if value is None else (value, words.strip())


def _bare(text: str) -> str:
    """A text without what has no meaning: blanks beside symbols, the full stop at its end, the signs around maths."""
    text = plain(text).strip().strip("$").strip().removesuffix(".").strip()
    text = SUBSCRIPT.sub(r"\1\2", text)
    return BETWEEN_SYMBOLS.sub("", " ".join(text.split())) if len(text) <= MAX_PART_CHARS else text


def parts_of(text: str) -> list[str]:
    """Opening bracket (or none), what the commas part, closing bracket; empty where it isn't a list."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    first, last, inner = "", "", text
    if len(text) > 1 and text[0] in BRACKETS and text[-1] in BRACKETS.values():
        first, last, inner = text[0], text[-1], text[1:-1]
    parts, depth = [""], 0
    for character in inner:
        depth += (character in BRACKETS) - (character in BRACKETS.values())
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [first, *parts, last] if len(parts) > 1 else []
