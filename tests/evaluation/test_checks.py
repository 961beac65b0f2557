"""Which answers are right."""

import random

import pytest

from calmix.evaluation import checks
from calmix.evaluation.quantities import numbers

REQUESTS = [  # answers, and what a request asks for
    ("**Paris**", {"words": 1, "is": "Paris"}, True),
    ("It is Paris.", {"words": 1, "is": "Paris"}, False),
    ("dogs", {"words": 1, "is": "dog|dogs"}, True),
    ("1. apple\n2. pear\n3. plum", {"lines": "3", "each_words": 4}, True),
    (
        "Here are three fruits for you today:\n- apple\n- pear",
        {"lines": "3", "each_words": 4},
        False,
    ),
    ("apple, pear", {"lines": 1, "commas": "2", "each_words": 4}, True),
    ('```json\n{"a": 1}\n```', {"json": '{"a": 1}'}, True),
    ('{"a": 1', {"json": '{"a": 1}'}, False),
    ('"The train leaves at nine."', {"same": "The train leaves at nine."}, True),
    ("HELLO WORLD!", {"same": "HELLO WORLD", "case": True}, True),
    ("A dog is an animal.", {"sentences": 1, "most_words": "20", "contains": "dog"}, True),
    ("Answer: Paris", {"begins": "Answer:", "contains": "Paris"}, True),
    ("Sorry, no dog.", {"contains": "dog", "without": "sorry|I cannot"}, False),
    ("Le ciel est bleu.", {"language": "fr"}, True),
    ("The sky is blue.", {"language": "fr"}, False),
    ("1,2,3,4,5", {"same": "1, 2, 3, 4, 5"}, True),
    ('Here it is:\n{"a": "Red"}', {"json": '{"a": "red"}'}, True),
    ("[" * 5000, {"json": "{}"}, False),
    ("red, red, red", {"commas": "3"}, False),
    ("dog dog dog dog dog dog", {"contains": "dog"}, False),
    ("It opens at 5 p.m. every day. Come in.", {"sentences": 2}, True),
    ("The sum is 17.", {"contains": "7|seven"}, False),
    ("1. The sea is wide.", {"sentences": 2}, False),
    ("1. The sea is wide.\n2. It is blue.", {"sentences": 2}, True),
    ("It is blue. It is blue.", {"sentences": 2}, False),
    ("Berries, plums", {"commas": 2, "among": "berry|plum|fig"}, True),
    ("A, B", {"commas": 2, "among": "berry|plum|fig"}, False),
    ("- plum\n- stone", {"lines": 2, "among": "berry|plum|fig"}, False),
    ("- a red plum\n- fig\n- stone", {"lines": 3, "among": "berry|plum|fig"}, True),
    ('Here is one sentence:\n"Le ciel est bleu."', {"language": "fr", "contains": "ciel"}, True),
]


@pytest.mark.parametrize(
    ("check", "answer", "right", "ok"),
    [
        # A short answer is compared as SQuAD does.
        ("exact_match", " The Sunset Boulevard.\nIt is", ["Sunset Blvd", "sunset boulevard"], True),
        ("exact_match", "Answer: Paris", ["Paris"], True),
        ("exact_match", "", ["Paris"], False),
        ("exact_match", "the", ["...."], False),
        ("exact_match", "A.", ["A"], True),
        ("exact_match", "the", ["A"], False),
        ("exact_match", "a dog", ["dog"], True),
        ("exact_match", "+", ["+"], True),
        # Signs and points count.
        *(
            ("exact_match", answer, [right], ok)
            for answer, right, ok in [
                ("1.5", "15", False),
                ("1.5.", "1.5", True),
                ("1,500", "1500", True),
                ("1,5", "15", False),
                ("-5", "5", False),
                ("Answer: -5", "-5", True),
                ("**-5**", "\N{MINUS SIGN}5", True),
                ("C++", "C", False),
                ("Cafe\u0301", "Caf\u00e9", True),
                ("c++.", "C++", True),
                ("C#", "C", False),
                ("3/4", "34", False),
                ("10:30", "1030", False),
                ("$5", "5", True),
                ("5 - 3", "53", False),
                ("2-1", "21", False),
                ("O-", "O", False),
                ("Hand-writing", "handwriting", True),
                ("U.S.A.", "USA", True),
                ("four", "4", True),
                ("fourteen", "4", False),
                ("vitamin A", "vitamin C", False),
            ]
        ),
        # In rows of a user's file any script's punctuation and composition are ignored.
        ("own_match", "\u6771\u4eac\u3002", ["\u6771\u4eac"], True),
        ("own_match", "Answer\uff1a \u201cParis\u201d", ["Paris"], True),
        ("own_match", "cafe\u0301, s\u2019il", ["caf\xe9 s'il"], True),
        ("own_match", "Rome", ["Paris"], False),
        ("same_text", " 'GOOD MORNING'", ["GOOD MORNING"], True),
        ("same_text", '["red","green"]', ["['red', 'green']"], True),
        # A string ends at its closing quotation mark, and one full stop behind it is no part of it.
        *(
            ("same_text", answer, [right], ok)
            for answer, right, ok in [
                ("'look down'.", "look down", True),
                ("WORLD.", "WORLD", True),
                ("'5.'", "5", False),
                ("ok...", "ok", False),
                ("ok...", "ok...", True),
                ("ok", "ok...", False),
                ("['a', 'b'].", "['a', 'b']", True),
                ("'hello' (lowercase).", "hello", True),
                ("you 'WORLD'", "WORLD", True),
                ("'hello' or 'HELLO'", "hello", False),
                ("'HELLO', 'hello'", "hello", False),
                ("'ab'ab", "ab", False),
                ("'  world'", "world", False),
                ("'hi '", "hi", False),
                ("hello hello", "hello", False),
                ("2. The index is 2.", "2", True),
                ("'9   '", "9   ", True),
                ("'9'", "9   ", False),
                ("world", "WORLD", False),
            ]
        ),
        # The first number with "answer is" counts, or else the last one.
        ("same_number", "The answer is 18. Q: 5 + 7? The answer is 12.", "18", True),
        ("same_number", "The answer is 18. Q: 5 + 7? The answer is 12.", "12", False),
        ("same_number", "So the answer is 80 + 150 = 230 miles in 2 days.", "230", True),
        ("same_number", "The answer is:\n**18**", "18", True),
        ("same_number", "The answer is not 3, it is 4", "4", True),
        ("same_number", "The answer is unknown. So 3 and 4.", "4", True),
        ("same_number", "It is 3.50, so the answer is 3.5.", "3.5", True),
        ("same_number", "So she has 1,200 left. The answer is $1,200.", "1200", True),
        ("same_number", "\N{MINUS SIGN}5", "-5", True),
        ("same_number", "about 3.50", "3.5", True),
        ("same_number", "12 in all, of 7", "12", False),
        # A result is boxed, or stated last.
        ("same_result", r"so we get $\boxed{\frac{1}{2}}$.", r"It is $\boxed{\frac12}$.", True),
        ("same_result", r"first $\boxed{3}$, then $\boxed{4}$", r"\boxed{4}", True),
        ("same_result", r"It is $-\frac{2}{3}$. I hope so.", r"\boxed{-\frac{2}{3}}", True),
        ("same_result", r"It points to \(\text{east}\)", r"\boxed{\text{east}}", True),
        ("same_result", "the sum is 1234567", r"\boxed{1,\!234,\!567}", True),
        ("same_result", r"\boxed{1,000}", r"\boxed{1000}", True),
        ("same_result", r"\boxed{1{,}000}", r"\boxed{1000}", True),
        ("same_result", r"\boxed{(1,234)}", r"\boxed{(1234)}", False),
        ("same_result", r"\boxed{1,00}", r"\boxed{100}", False),
        ("same_result", "The answer is $4$. Next: $x = 7$", r"\boxed{4}", True),
        ("same_result", r"The answer is 4, so $\boxed{5}$", r"\boxed{5}", True),
        ("same_result", "the sum is 45", r"$\boxed{45}$", True),
        *(("as_requested", *row) for row in REQUESTS),
    ],
)
def test_answer_checks(check, answer, right, ok):
    assert getattr(checks, check)(answer, right) is ok


def test_results_match_the_harness():
    """Strings are compared exactly, whatever their characters."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    pieces = [
        "\\frac",
        "\\sqrt",
        "tfrac",
        "\\text{ ",
        "\\left",
        "^\\circ",
        "\\\\",
        "\\!",
        "\\%",
        "\\$",
        "{",
        "}",
        "/",
        "=",
        ".",
        "0.5",
        " ",
        "\n",
        "-",
        "x",
        "1",
        "2",
        "12",
    ]
    rng, same = random.Random(0), 0
    for _ in range(20_000):
        made = rng.choices(pieces, k=rng.randrange(1, 7))
        place = rng.randrange(len(made))
        other = [*made[:place], *rng.choices([*pieces, ""], k=2), *made[place + rng.randrange(2) :]]
        one, two = ("".join(parts) for parts in (made, other))
        wanted = is_equiv(one.strip(), two.strip()) and bool(one.strip())
        assert checks.same_formula(one.strip(), two.strip()) is wanted, (one, two)
        same += wanted
    assert 500 < same < 10_000


def test_program_extraction():
    head = "from typing import List\n\n\ndef f(x: int) -> int:\n"
    block = "Sure:\n```python\ndef f(x):\n    return x\n```\nDone."
    assert (
        checks.program(block, head, "f") == "from typing import List\n\n\ndef f(x):\n    return x\n"
    )
    helped = "def g():\n    return 1\n\n\n" + head
    assert checks.program(block, helped, "f").startswith("def g():")
    assert checks.program("def ff(x):\n    return x\n", head, "f").startswith(head)
    assert checks.program("    return x\n", head, "f") == head + "    return x\n"
    assert checks.program("```python\n    return x\n", head, "f") == head + "    return x\n"
    indented = "1. Code:\n   ``` python\n   def f(x):\n       return x\n   ```\nIt returns x."
    assert checks.program(indented, head, "f").endswith("\ndef f(x):\n    return x\n")
    # A fence that nothing opens ends the program too.
    assert checks.program("def f(x):\n    return x\n```\nDone.", "", "f") == (
        "def f(x):\n    return x\n"
    )
    assert checks.program("    return x\n```\n\nDone.", head, "f") == head + "    return x\n"
    talk = " First write\ndef f\n```python\ndef f(x):\n    return x\n```\n"
    assert checks.program(talk, "", "f") == "def f(x):\n    return x\n"


QUESTIONS = {  # answers to a question, whether they are right
    ("The green pigment of plants is", "chlorophyll"): {
        "known as chlorophyll": True,
        "a pigment called chlorophyll.": True,
        "chlorophyll. The colour of plants is red.": True,
        "blue. The pigment is chlorophyll.": False,
        "not chlorophyll": False,
        "chlorophyll or carotene": False,
        "carotene, chlorophyll": False,
        "carotene and chlorophyll": False,
        "chlorophyllin": False,
        "a plant that makes chlorophyll from light": False,
    },
    ("Where is the parliament of New Zealand?", "Wellington"): {
        "The parliament is in Wellington, New Zealand": True,
        "Wellington (the capital)": True,
        "Wellington, which is the capital": True,
        "Wellington Boots": False,
        "Wellington Ltd. Ltd. Ltd.": True,
        "Auckland. Wellington is smaller.": False,
    },
    ("Is Baga beach in North or South Goa?", "North"): {
        "North": True,
        "Baga beach is in North or South Goa": False,
    },
    ("Who wrote The Monkey's Paw?", "W. W. Jacobs"): {
        "W. W. Jacobs. He was English.": True,
        "the author W. W. Jacobs": True,
        "W. Jacobs": False,
    },
    ("A tool for nails is a", "hammer"): {
        "tool that is used to hammer nails": False,
        "claw hammer": True,
        "hammer handle": False,
        "drill, saw and hammer": False,
    },
}


@pytest.mark.parametrize(
    ("question", "right", "answer", "ok"),
    [(*key, *case) for key, cases in QUESTIONS.items() for case in cases.items()],
)
def test_short_answers(question, right, answer, ok):
    assert checks.short_match(answer, [right], question) is ok


def _result(text):
    return rf"\boxed{{{text}}}"


# Answers that are easily misjudged: check, answer, right answer, whether it is right.
HARD = [
    *(
        ("same_result", _result(answer), _result(right), ok)
        for answer, right, ok in [
            # units, with any space before them
            (r"5\text{ cm}", "5", True),
            (r"5\text{cm}", "5", True),
            (r"5\,\text{cm}", r"5\text{ centimeters}", True),
            (r"5~\mathrm{cm}", "5", True),
            (r"5\ \mathrm{cm}^2", r"5\text{ cm}^2", True),
            (r"5\text{ cm}", r"5\text{ m}", False),
            (r"5\text{ cm}^2", r"5\text{ cm}", False),
            (r"5\text{ cm}", r"6\text{ cm}", False),
            ("5 kg", r"5\text{ kilograms}", True),
            (r"5\text{ apples}", "5", True),
            (r"\text{east}", r"\text{west}", False),
            (r"90^\circ", "90", True),
            ("90\u00b0", r"90^{\circ}", True),
            (r"2\sqrt{3}\text{ cm}", r"2\sqrt3", True),
            (r"5m", "5", False),
            # numbers in other forms
            ("5.0", "5", True),
            ("5.", "5", True),
            ("5.01", "5", False),
            ("0.5", r"\frac{1}{2}", True),
            ("1/2", r"\dfrac12", True),
            (r"2\frac{1}{2}", r"\frac{5}{2}", True),
            ("0.33", r"\frac{1}{3}", False),
            (r"3 \times 10^{4}", "30000", True),
            (r"10\,000", "10000", True),
            ("10\u2009000", "10,000", True),
            ("(3,5)", "3.5", False),
            # percent and currency
            (r"50\%", "50", True),
            ("50%", "0.5", True),
            (r"50\%", "5", False),
            (r"\$5.00", "5", True),
            (r"\$5", r"5\text{ dollars}", True),
            ("\u20ac5", r"\$5", False),
            # exponents and indices
            ("x^{2}", "x^2", True),
            ("x**2", "x^2", True),
            ("x\u00b2", "x^2", True),
            ("x^10", "x^{10}", True),
            ("x^{2}", "x^3", False),
            ("x^{2}", "x2", False),
            ("a_{1}", "a_1", True),
            (r"3 \cdot x", "3x", True),
            ("3\u03c0", r"3\pi", True),
            (r"2\cdot 3", "23", False),
            # times, ranges, letters, equations
            ("3:15", "15", False),
            (r"3:15\text{ p.m.}", "3:15", True),
            (r"3:15\text{ a.m.}", r"3:15\text{ p.m.}", False),
            ("3-5", "5", False),
            (r"\text{(B)}", "B", True),
            (r"\text{(B)}", "C", False),
            ("2 + 3 = 5", "5", True),
        ]
    ),
    ("same_result", "It costs $5 + $3 = $8", r"\boxed{8}", True),
    ("same_result", "It leaves at 3:15.", r"\boxed{15}", False),
    ("same_result", "It leaves at 3:15.", r"\boxed{3:15}", True),
    ("same_result", r"So \[ x = 5 \]", r"\boxed{5}", True),
    *(
        ("same_number", answer, right, ok)
        for answer, right, ok in [
            ("It leaves at 3:15.", "15", False),
            ("The answer is 3:15 for 15 people.", "15", False),
            ("The answer is 5:00 PM.", "5", True),
            ("The ratio is 3:2.", "2", False),
            ("It was 2020-01-15.", "15", False),
            ("It was 15.01.2020.", "2020", False),
            ("The answer is 3-5.", "3", False),
            ("It takes 10\u201315 days", "15", False),
            ("between 3 and 5", "5", False),
            ("3 to 5 days", "5", False),
            ("It rose from 3 to 5", "5", True),
            ("20-5", "5", True),
            ("3-5 = -2", "-2", True),
            (r"5 \pm 2", "2", False),
            ("50%", "50", True),
            ("50 percent", "0.5", True),
            ("50%", "50 %", True),
            ("500%", "50", False),
            ("5 million", "5000000", True),
            ("5 million", "5", True),
            ("\u20ac1,200.50", "1200.5", True),
            ("-\u00a35", "-5", True),
            ("1,00,000 people", "100000", True),
            ("10'000", "10000", True),
            ("18\u2009000", "18000", True),
            ("3 x 10^4", "30000", True),
            (r"3 \times 10^{-2}", "0.03", True),
            ("5 cm\u00b2", "5", True),
            ("5m\u00b2", "2", False),
        ]
    ),
    *(
        ("short_match", answer, [right], ok)
        for answer, right, ok in [
            ("3:15", "15", False),
            ("3:15 p.m.", "3:15 PM", True),
            ("3:15pm", "3:15 pm", True),
            ("03:15", "3:15", True),
            ("3:15 am", "3:15 pm", False),
            ("3 pm", "3:00 p.m.", True),
            ("4 July 1776", "July 4, 1776", True),
            ("on July 4th, 1776", "4 July 1776", True),
            ("1776-07-04", "July 4, 1776", True),
            ("Dec. 25", "25 December", True),
            ("July 5, 1776", "July 4, 1776", False),
            ("July 4", "July 4, 1776", False),
            ("1914\u20131918", "1914-1918", True),
            ("from 1914 to 1918", "1914-1918", True),
            ("10-15", "15", False),
            ("5 %", "5%", True),
            ("5 percent", "5%", True),
            ("5", "5%", True),
            ("$5", "5 dollars", True),
            ("$5.00", "$5", True),
            ("\u20ac5", "$5", False),
            ("$5 million", "5 million dollars", True),
            ("5 kilometers", "5 km", True),
            ("5\u202fkm", "5km", True),
            ("5 km", "5 miles", False),
            ("It weighs 5 kg.", "5", True),
            ("18\u202f000", "18,000", True),
            ("18 000", "18000", True),
            ("5.0", "5", True),
            ("Web 2.0", "Web 2", False),
        ]
    ),
    ("own_match", "1914\u20131918", ["19141918"], False),
    ("own_match", "10\u00b2", ["102"], False),
]


@pytest.mark.parametrize(("check", "answer", "right", "ok"), HARD)
def test_hard_answers(check, answer, right, ok):
    assert getattr(checks, check)(answer, right) is ok


@pytest.mark.parametrize(
    ("question", "answer", "ok"),
    [
        ("How many hours does it take?", "5 hours", True),
        ("How many hours does it take?", "5 minutes", False),
        ("How long does it take?", "5 minutes", True),
    ],
)
def test_units_that_a_question_names(question, answer, ok):
    assert checks.short_match(answer, ["5"], question) is ok


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("x^2", []),
        ("x^{10} + 3", [3]),
        ("2**5", []),
        ("3/4 of it", [0.75]),
        ("1 1/2", [1.5]),
        (r"\frac{3}{4}", [0.75]),
        (r"m = -\frac{1}{4}, \frac12, x-\frac{1}{4}", [-0.25, 0.5, 0.25]),
        ("3½ or -¼", [3.5, -0.25]),
        ("10³ = x², 5", [5]),
        ("18 000", [18000]),
        ("18\u202f000", [18000]),
        (r"18\,000", [18000]),
        ("1,234,567.5", [1234567.5]),
        ("1, 2, 3", [1, 2, 3]),
        ("-.5", [-0.5]),
        ("$18", [18]),
        ("-$18.50", [-18.5]),
        ("5-3", [5, 3]),
        ("18kg", [18]),
        ("the 5th and 2nd", []),
        ("12/25/2020", []),
        ("1.2.3", []),
        ("1/0", []),
        ("1.5e3", [1500]),
        ("H2O", []),
        ("2019 500", [2019, 500]),
        ("9" * 5000, []),
    ],
)
def test_number_parsing(text, values):
    assert [float(one) for one in numbers(text)] == values


@pytest.mark.parametrize(
    ("check", "answer", "part"),
    [
        ("program", "Sure:\n```\ndef f(): 1\n```\nThis is", "Sure:\n```\ndef f(): 1\n```"),
        ("program", "```\ndef f(): 1\n```\n```\ndef f(", "```\ndef f(): 1\n```\n```"),
        ("program", "def f():\n    return 1\n\nThis", ""),
        ("text", "Paris. It is a", "Paris."),
        ("text", "Paris\nQuestion", "Paris"),
        ("text", "Paris is a city of", ""),
        ("text", "W. W. Jac", ""),
        ("exact", "'WORLD' (1000", "'WORLD'"),
        ("exact", "you 'WORLD' (1000", ""),
        ("exact", "5. The length of", "5."),
        ("number", "The answer is 3. The answer is 4. The", "The answer is 3."),
        ("number", "So 3 + 4 = 7. Then", ""),
        ("number", "The answer is 3.3333", ""),
        ("result", r"is $\boxed{5}$. Next \boxed{", r"is $\boxed{5}"),
        ("result", "The answer is $5$. Prob", "The answer is $5$."),
        ("request", "Coffee, tea.\nCoffee", ""),
    ],
)
def test_truncated_answers(check, answer, part):
    assert checks.finished(answer, check) == part
