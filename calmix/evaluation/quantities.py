"""Numbers, units, dates and ranges in generated answers: how they are read and compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from fractions import Fraction
from typing import NamedTuple

EXPONENT = re.compile(r"(?<=[\w)\]}])(?:\^|\*\*)\s*(?:\{[^{}]*\}|[-+]?[\w.]+)")
RAISED = re.compile("(?<=[\\w)\\]}])[\u00b9\u00b2\u00b3\u2070-\u207b]+")  # "x²"
TENS = re.compile(  # "5 x 10^3"
    r"(?<=\d)\s*(?:[x*\u00d7]|\\times|\\cdot)\s*10(?:\^|\*\*)\{?([-+]?\d{1,3})(?!\d)\}?"
)
FRACTION = re.compile(r"((?<![\w)\]}])-)?\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))")
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # one character, as in "3½"
GAP = re.compile(  # between thousands, also "1,00,000"
    r"(?<=\d)(?:\\[,;:! ]|\{,\}|[\u00a0\u2007\u2009\u202f'\u2019])(?=\d{3}(?!\d))"
    r"|(?<=\d),(?=(?:\d\d,)+\d{3}(?!\d))"
)
MARKS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-") | {"\u2044": "/"})
NUMBER = re.compile(
    r"(?<![\w^./])(?:(?P<date>\d{4}-\d\d?-\d\d?|\d+([./])\d+\2\d+)(?!\w|[./-]\d)|"
    r"(?P<minus>-?)[$\u20ac\u00a3\u00a5]?(?:(?P<whole>\d{1,9}) (?=\d+/\d))?"
    r"(?P<digits>\d{1,3}([, ])\d{3}(?:\6\d{3})*(?:\.\d+)?|\d{1,999}(?:\.\d{1,999})?|\.\d{1,999})"
    r"(?P<power>[eE][-+]?\d{1,3}(?!\w))?(?:\s?/\s?(?P<under>\d{1,999}))?"
    r"(?!\d|[./]\d|\s?/\s?\d|\^|(?:st|nd|rd|th)\b)"
    r"(?:\s?(?P<scale>\\?%|(?:per ?cent|thousand|million|billion)\b))?)"
)
MAGNITUDES = {"thousand": 1000, "million": 10**6, "billion": 10**9}  # all others are hundredths
EQUALS = re.compile(r"\s*=")
UNITS = {  # spellings of the units that are compared
    "percent": r"\\?%|per ?cent",
    "dollars": r"\\?\$|dollars?|usd",
    "euros": "\u20ac|euros?|eur",
    "pounds": "\u00a3|pounds?|lbs?|gbp",
    "yen": "\u00a5|yen|jpy",
    "celsius": "(?:\u00b0 ?|degrees? )(?:c|celsius)|celsius",
    "fahrenheit": "(?:\u00b0 ?|degrees? )(?:f|fahrenheit)|fahrenheit",
    "degrees": r"\u00b0|\^\\circ|degrees?",
    "kmh": "km/h|kmh|kph|kilomet(?:er|re)s (?:per|an) hour",
    "mph": "mph|miles (?:per|an) hour",
    "mm": "mm|millimet(?:er|re)s?",
    "cm": "cm|centimet(?:er|re)s?",
    "km": "km|kilomet(?:er|re)s?",
    "m": "m|met(?:er|re)s?",
    "miles": "miles?",
    "inches": "inch(?:es)?",
    "feet": "ft|foot|feet",
    "mg": "mg|milligrams?",
    "kg": "kgs?|kilos?|kilograms?",
    "g": "g|grams?",
    "ml": "ml|millilit(?:er|re)s?",
    "l": "l|lit(?:er|re)s?",
    "s": "s|secs?|seconds?",
    "min": "mins?|minutes?",
    "h": "h|hrs?|hours?",
    "days": "days?",
    "weeks": "weeks?",
    "months": "months?",
    "years": "years?|yrs?",
    "am": r"am|a\.m\.?",
    "pm": r"pm|p\.m\.?",
}
OPTIONAL = ("percent", "dollars", "euros", "pounds", "yen")  # an answer may leave them out
_NAMED = "|".join(f"(?P<{name}>{spelt})" for name, spelt in UNITS.items())
UNIT = re.compile(rf"(?:{_NAMED})(?!\w)")
QUANTITY = re.compile(
    r"(?:([$\u20ac\u00a3\u00a5])\s?)?(?<![\d.])(\d+(?:\.\d+)?)(?!\.?\d)"
    rf"((?: (?:thousand|million|billion)\b)?)(?:\s*-?(?P<unit>{_NAMED})(?!\w))?"
)
MONTHS = re.findall(
    r"\S+",
    "jan(?:uary)? feb(?:ruary)? mar(?:ch)? apr(?:il)? may june? july? aug(?:ust)? "
    "sept?(?:ember)? oct(?:ober)? nov(?:ember)? dec(?:ember)?",
)
_MONTH, _DAY = f"({'|'.join(MONTHS)})", r"(\d\d?)(?:st|nd|rd|th)?"
DATE = re.compile(rf"\b(?:{_MONTH}\.? {_DAY}|{_DAY}(?: of)? {_MONTH}\.?)(?!\w)(?:,? (\d{{4}})\b)?")
ISO_DATE = re.compile(r"\b(\d{4})-(0?[1-9]|1[0-2])-(\d\d?)\b")
_COUNTS = "zero one two three four five six seven eight nine ten eleven twelve"
COUNT_WORDS = {word: str(count) for count, word in enumerate(_COUNTS.split())}
COUNT = re.compile(rf"(?<![\w-])(?:{'|'.join(COUNT_WORDS)})(?![\w-])")


class Reading(NamedTuple):
    """A number in a text. `value` is None for a time, a date and a range, which are not one number.
    `scale` is that of a percent sign or a word behind it ("5 million"), which may be left out."""

    text: str
    value: Fraction | None
    scale: Fraction = Fraction(1)

    def same(self, other: Reading) -> bool:
        """Whether two readings are the same number: "50 %" is 50 and 0.5, but not 5000 %."""
        if self.value is None or other.value is None:
            return False
        if self.value == other.value and 1 in (self.scale, other.scale):
            return True
        return self.value * self.scale == other.value * other.scale


def readings(text: str) -> list[Reading]:
    """Return the numbers in a text: with signs, points, separated thousands ("18 000") and
    fractions ("3/4", "1 1/2"); not exponents, ordinals and parts of words. The ends of a range
    ("3 to 5") and the parts of a time ("3:15") are read as one, and a full hour as a number."""
    text = _written(text)
    numbers, end = list[Reading](), -1
    for match in NUMBER.finditer(text):
        one = _reading(match)
        if numbers and (last := _joined(text, numbers[-1], end, match.start(), one, match.end())):
            numbers[-1] = last
        else:
            numbers.append(one)
        end = match.end()
    return numbers


def single(text: str) -> Reading | None:
    """Return the number that is all of a text; None if it is anything else."""
    match = NUMBER.fullmatch(_written(text).strip())
    return _reading(match) if match else None


def _written(text: str) -> str:
    """Write fractions, powers of ten, dashes and thousands in one way, and mark exponents."""
    text = VULGAR.sub(_in_latex, text.translate(MARKS))
    text = GAP.sub(lambda gap: "" if gap[0] == "," else ",", text)
    text = FRACTION.sub(
        lambda one: f" {one[1] or ''}{one[2] or one[4]}/{one[3] or one[5]} ", raised(text)
    )
    return EXPONENT.sub("^", TENS.sub(r"e\1", text))


def raised(text: str) -> str:
    """Write exponents of small digits like others: "x²" as "x^{2}"."""
    return RAISED.sub(lambda one: f"^{{{unicodedata.normalize('NFKC', one[0])}}}", text)


def _in_latex(vulgar: re.Match[str]) -> str:
    """Return a fraction of one character in LaTeX."""
    over, under = unicodedata.normalize("NFKC", vulgar[0]).split("\N{FRACTION SLASH}")
    return rf"\frac{{{over}}}{{{under}}}"


def _reading(one: re.Match[str]) -> Reading:
    under = int(one["under"] or 1)
    if one["date"] or not under:
        return Reading(one[0], None)
    value = Fraction(re.sub("[, ]", "", one["digits"]) + (one["power"] or "")) / under
    value += int(one["whole"] or 0)
    scale = (
        Fraction(MAGNITUDES.get(one["scale"], Fraction(1, 100))) if one["scale"] else Fraction(1)
    )
    return Reading(one[0], -value if one["minus"] else value, scale)


def _joined(
    text: str, one: Reading, end: int, begin: int, other: Reading, stop: int
) -> Reading | None:
    """Return the time or range of which two numbers are parts, if they are: "3-5", "3 to 5" or
    "between 3 and 5", not the difference "5-3", the sum "3-5 = -2" or the change "from 3 to 5"."""
    between = text[end:begin]
    joint = Reading(one.text + between + other.text, None)
    if between == ":":
        return joint._replace(value=one.value) if other.text == "00" else joint
    mark = between.strip()
    if mark in ("\u00b1", "\\pm"):
        return joint
    begins = end - len(one.text)
    before = text[max(0, begins - 10) : begins].split()[-1:]  # a word
    joins = {"-": True, "to": before != ["from"], "and": before == ["between"]}
    if one.value is None or other.value is None or not joins.get(mark):
        return None
    return joint if one.value < other.value and not EQUALS.match(text, stop) else None


def plain_quantities(text: str) -> str:
    """Write the numbers, units and dates of a text in lower case in one way: "$5.00" as
    "5 dollars", "3 kilometers" as "3 km", "July 4th, 1776" as "4 jul 1776", "3 to 5" as "3-5"."""
    text = COUNT.sub(lambda count: COUNT_WORDS[count[0]], raised(text.translate(MARKS)))
    text = GAP.sub("", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    text = re.sub(
        r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.,])", lambda one: one[0].replace(" ", ""), text
    )
    text = DATE.sub(_date, ISO_DATE.sub(_iso_date, text))
    text = re.sub(r"\bbetween (?=\d+ and \d)(\d+) and ", r"\1-", text)
    text = re.sub(r"(?<=\d)(?:\s*-\s*| to )(?=\d)", "-", text)
    text = QUANTITY.sub(_quantity, text)
    text = re.sub(r"\b0?(\d{1,2}):00(?= [ap]m\b)|\b0(?=\d:\d\d)", r"\1", text)
    return without_zeros(text) if re.fullmatch(r"-?\d+\.\d+", text) else text


def without_unit(text: str, units: Collection[str]) -> str:
    """Return a text of `plain_quantities` without one of these units at its end."""
    head, _, unit = text.rpartition(" ")
    return head if unit in units and head[-1:].isdigit() else text


def unit_of(text: str) -> str:
    """Return the unit that a text names; "" if it is none of `UNITS`."""
    match = UNIT.fullmatch(text.lower())
    return next(name for name in UNITS if match[name]) if match else ""


def without_zeros(number: str) -> str:
    """Return a number without zeros at the end of its decimals."""
    return number.rstrip("0").rstrip(".") if "." in number else number


def _quantity(one: re.Match[str]) -> str:
    sign, number, words = one[1], one[2], one[3]
    unit = unit_of(sign or one["unit"] or "")
    return " ".join(filter(None, (without_zeros(number), words.strip(), unit))) if unit else one[0]


def _iso_date(one: re.Match[str]) -> str:
    return f"{one[3]} {MONTHS[int(one[2]) - 1][:3]} {one[1]}"


def _date(one: re.Match[str]) -> str:
    month, day = one[1] or one[4], int(one[2] or one[3])
    return " ".join(filter(None, (str(day), month[:3], one[5])))
