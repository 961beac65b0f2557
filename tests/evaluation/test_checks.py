"""Which answers are right."""

import random

import pytest

from calmix.evaluation import checks

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
    assert [float(one) for one in checks.numbers(text)] == values


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
