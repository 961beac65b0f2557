import random
import re
import runpy
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from calmix.evaluation import checks
from calmix.evaluation.quantities import readings

# By check: an answer, whether it matches, and the right answer (or several, parted by "or").
ANSWERS = {
    "own_match": r"""
The Sunset Boulevard. == Sunset Blvd or sunset boulevard | Answer: Paris == Paris | A. == A
a dog == dog | the != A | the != .... | + == + | 1.5. == 1.5 | 1.5 != 15 | 1,5 != 15 | $5 == 5
1,500 == 1500 | -5 != 5 | Answer: -5 == -5 | **-5** == −5 | c++. == C++ | C++ != C | C# != C
3/4 != 34 | 10:30 != 1030 | 5 - 3 != 53 | 2-1 != 21 | O- != O | Hand-writing == handwriting
U.S.A. == USA | four == 4 | fourteen != 4 | vitamin A != vitamin C
東京。 == 東京 | Answer： “Paris” == Paris | Rome != Paris | 1914–1918 != 19141918 | 10² != 102
""",  # as SQuAD compares, but signs and points count, and any script's punctuation is ignored
    "same_text": r"""
["red","green"] == ['red', 'green'] | ['a', 'b']. == ['a', 'b'] | 'look down'. == look down
WORLD. == WORLD | you 'WORLD' == WORLD | world != WORLD | '5.' != 5 | ok... != ok | ok... == ok...
ok != ok... | 'hello' (lowercase). == hello | 'hello' or 'HELLO' != hello | 'ab'ab != ab
'HELLO', 'hello' != hello | hello hello != hello | '  world' != world | 'hi ' != hi
2. The index is 2. == 2
""",  # a string ends at its closing quotation mark; one full stop behind it is no part of it
    "same_number": r"""
The answer is 18. Q: 5 + 7? The answer is 12. == 18 | The answer is not 3, it is 4 == 4
The answer is 18. Q: 5 + 7? The answer is 12. != 12 | The answer is unknown. So 3 and 4. == 4
So the answer is 80 + 150 = 230 miles in 2 days. == 230 | 12 in all, of 7 != 12 | −5 == -5
It is 3.50, so the answer is 3.5. == 3.5 | about 3.50 == 3.5 | -£5 == -5 | 3-5 = -2 == -2
So she has 1,200 left. The answer is $1,200. == 1200 | It leaves at 3:15. != 15
The answer is 3:15 for 15 people. != 15 | It was 2020-01-15. != 15 | It takes 10–15 days != 15
The ratio is 3:2. != 2 | 5 \pm 2 != 2 | 5m² != 2 | 5 cm² == 5 | It was 15.01.2020. != 2020
The answer is 3-5. != 3 | The answer is 5:00 PM. == 5 | It rose from 3 to 5 == 5 | 20-5 == 5
between 3 and 5 != 5 | 3 to 5 days != 5 | 5 million == 5 | 5 million == 5000000 | 50% == 50
500% != 50 | 50% == 50 % | 50 percent == 0.5 | €1,200.50 == 1200.5 | 1,00,000 people == 100000
10'000 == 10000 | 3 x 10^4 == 30000 | 3 \times 10^{-2} == 0.03
""",  # the first number with "answer is" counts, or else the last one
    "same_result": r"""
so we get $\boxed{\frac{1}{2}}$. == It is $\boxed{\frac12}$. | the sum is 45 == $\boxed{45}$
first $\boxed{3}$, then $\boxed{4}$ == \boxed{4} | The answer is $4$. Next: $x = 7$ == \boxed{4}
The answer is 4, so $\boxed{5}$ == \boxed{5} | It is $-\frac{2}{3}$. I hope so. == \boxed{-\frac23}
So \[ x = 5 \] == \boxed{5} | It points to \(\text{east}\) == \boxed{\text{east}}
the sum is 1234567 == \boxed{1,\!234,\!567} | \boxed{1,000} == \boxed{1000}
\boxed{1{,}000} == \boxed{1000} | \boxed{(1,234)} != \boxed{(1234)} | \boxed{1,00} != \boxed{100}
It costs $5 + $3 = $8 == \boxed{8} | It leaves at 3:15. == \boxed{3:15}
It leaves at 3:15. != \boxed{15}
""",  # boxed, or stated last
    "boxed": r"""
5\text{ cm} == 5 | 5\text{cm} == 5 | 5~\mathrm{cm} == 5 | 5\,\text{cm} == 5\text{ centimeters}
5\text{ apples} == 5 | 5\ \mathrm{cm}^2 == 5\text{ cm}^2 | 5 kg == 5\text{ kilograms} | 5m != 5
5\text{ cm}^2 != 5\text{ cm} | 5\text{ cm} != 5\text{ m} | 5\text{ cm} != 6\text{ cm}
\text{east} != \text{west} | 90^\circ == 90 | 90° == 90^{\circ} | 2\sqrt{3}\text{ cm} == 2\sqrt3
5.0 == 5 | 5. == 5 | 5.01 != 5 | 0.5 == \frac{1}{2} | 1/2 == \dfrac12 | 2\frac{1}{2} == \frac{5}{2}
0.33 != \frac{1}{3} | 3 \times 10^{4} == 30000 | 10\,000 == 10000 | (3,5) != 3.5 | 50\% == 50
50% == 0.5 | 50\% != 5 | \$5.00 == 5 | \$5 == 5\text{ dollars} | €5 != \$5 | 2 + 3 = 5 == 5
x^{2} == x^2 | x**2 == x^2 | x² == x^2 | x^10 == x^{10} | x^{2} != x^3 | x^{2} != x2
a_{1} == a_1 | 3 \cdot x == 3x | 3π == 3\pi | 2\cdot 3 != 23 | 3:15 != 15 | 3-5 != 5
3:15\text{ p.m.} == 3:15 | 3:15\text{ a.m.} != 3:15\text{ p.m.} | \text{(B)} == B | \text{(B)} != C
""",  # results, both of them boxed
    "short_match": r"""
3:15 != 15 | 10-15 != 15 | 3:15 p.m. == 3:15 PM | 3:15pm == 3:15 pm | 3:15 am != 3:15 pm
03:15 == 3:15 | 3 pm == 3:00 p.m. | 4 July 1776 == July 4, 1776 | on July 4th, 1776 == 4 July 1776
1776-07-04 == July 4, 1776 | July 5, 1776 != July 4, 1776 | July 4 != July 4, 1776
Dec. 25 == 25 December | 1914–1918 == 1914-1918 | from 1914 to 1918 == 1914-1918 | 5 % == 5%
5 percent == 5% | 5 == 5% | $5 == 5 dollars | $5.00 == $5 | €5 != $5 | 5 kilometers == 5 km
$5 million == 5 million dollars | 5 km != 5 miles | It weighs 5 kg. == 5 | 18 000 == 18000
5.0 == 5 | Web 2.0 != Web 2
""",
}
SPACES = [  # line ends, unusual spaces and parts of characters
    ("own_match", " The Sunset Boulevard.\nIt is", ["Sunset Blvd", "sunset boulevard"], True),
    ("own_match", "Cafe\u0301", ["Caf\u00e9"], True),
    ("own_match", "cafe\u0301, s\u2019il", ["caf\xe9 s'il"], True),
    ("same_text", " 'GOOD MORNING'", ["GOOD MORNING"], True),
    ("same_text", "'9'", ["9   "], False),
    ("same_number", "The answer is:\n**18**", "18", True),
    ("same_number", "18\u2009000", "18000", True),
    ("same_result", "\\boxed{10\u2009000}", r"\boxed{10,000}", True),
    ("short_match", "18\u202f000", ["18,000"], True),
]
# A question and its answer, then answers that match (==) or do not (!=).
QUESTIONS = """
The green pigment of plants is -> chlorophyll
== known as chlorophyll | a pigment called chlorophyll. | chlorophyll. The colour of plants is red.
!= blue. The pigment is chlorophyll. | not chlorophyll | chlorophyll or carotene | chlorophyllin
!= carotene, chlorophyll | carotene and chlorophyll | a plant that makes chlorophyll from light
Where is the parliament of New Zealand? -> Wellington
== The parliament is in Wellington, New Zealand | Wellington (the capital)
== Wellington, which is the capital | Wellington Ltd. Ltd. Ltd.
!= Wellington Boots | Auckland. Wellington is smaller.
Is Baga beach in North or South Goa? -> North != Baga beach is in North or South Goa
Who wrote The Monkey's Paw? -> W. W. Jacobs != W. Jacobs
== W. W. Jacobs. He was English. | the author W. W. Jacobs
A tool for nails is a -> hammer == claw hammer
!= tool that is used to hammer nails | hammer handle | drill, saw and hammer
How many hours does it take? -> 5 == 5 hours != 5 minutes
How long does it take? -> 5 == 5 minutes
"""
NUMBERS = r"""
x^2 -> | x^{10} + 3 -> 3 | 2**5 -> | 3/4 of it -> 0.75 | 1 1/2 -> 1.5 | \frac{3}{4} -> 0.75
m = -\frac{1}{4}, \frac12, x-\frac{1}{4} -> -0.25 0.5 0.25 | 3½ or -¼ -> 3.5 -0.25
10³ = x², 5 -> 5 | 18 000 -> 18000 | 18\,000 -> 18000 | 1,234,567.5 -> 1234567.5 | 1, 2, 3 -> 1 2 3
-.5 -> -0.5 | -$18.50 -> -18.5 | 5-3 -> 5 3 | 18kg -> 18 | the 5th and 2nd -> | 12/25/2020 ->
1.2.3 -> | 1/0 -> | 1.5e3 -> 1500 | H2O -> | 2019 500 -> 2019 500
"""


@pytest.mark.parametrize("check", ANSWERS)
def test_answer_checks(check):
    function, form = ("same_result", r"\boxed{%s}") if check == "boxed" else (check, "%s")
    made = [row[1:] for row in SPACES if row[0] == check]
    for case in re.split(r" \| |\n", ANSWERS[check].strip()):
        answer, sign, right = re.fullmatch(r"(.+) ([=!]=) (.+)", case).groups()
        listed = check in ("own_match", "same_text", "short_match")
        made.append((form % answer, right.split(" or ") if listed else form % right, sign == "=="))
    for answer, right, ok in made:
        assert getattr(checks, function)(answer, right) is ok, (answer, right)


def test_short_answers_to_a_question():
    question = right = ""
    for line in QUESTIONS.strip().splitlines():
        head, *rest = re.split(r" ?([=!]=) ", line)
        question, right = head.split(" -> ") if head else (question, right)
        for sign, answers in zip(rest[::2], rest[1::2], strict=True):
            for answer in answers.split(" | "):
                found = checks.short_match(answer, [right], question)
                assert found is (sign == "=="), (question, answer)


def test_requests():
    among, french = {"among": "berry|plum|fig"}, {"language": "fr"}
    for answer, request, ok in (  # what a request asks for
        ("**Paris**", {"words": 1, "is": "Paris"}, True),
        ("dogs", {"words": 1, "is": "dog|dogs"}, True),
        ("Paris.", {"is": "Rome|Paris."}, True),
        ("!", {"is": "."}, False),
        ("1. apple\n2. pear\n3. plum", {"lines": "3", "each_words": 4}, True),
        ("apple, pear", {"lines": 1, "commas": "2", "each_words": 4}, True),
        ('```json\n{"a": 1}\n```', {"json": '{"a": 1}'}, True),
        ('Here it is:\n{"a": "Red"}', {"json": '{"a": "red"}'}, True),
        ('{"a": 1', {"json": '{"a": 1}'}, False),
        ("[" * 5000, {"json": "{}"}, False),
        ("The list: [1, {}]", {"json": "[1, {}]"}, True),
        ("[1, {}]", {"json": "{}"}, True),
        ('"The train leaves at nine."', {"same": "The train leaves at nine."}, True),
        ("HELLO WORLD!", {"same": "HELLO WORLD", "case": True}, True),
        ("1,2,3,4,5", {"same": "1, 2, 3, 4, 5"}, True),
        ("Answer: Paris", {"begins": "Answer:", "contains": "Paris"}, True),
        ("Sorry, no dog.", {"contains": "dog", "without": "sorry|I cannot"}, False),
        ("dog dog dog dog dog dog", {"contains": "dog"}, False),
        ("The sum is 17.", {"contains": "7|seven"}, False),
        ("it costs $5 now", {"contains": "$5"}, True),
        ("it costs $5 now", {"without": "$5"}, False),
        ("a .env file (5)", {"contains": "(5)", "without": "gitignore|.git"}, True),
        ("The sky is blue.", french, False),
        ('Here is one sentence:\n"Le ciel est bleu."', {**french, "contains": "ciel"}, True),
        ("red, red, red", {"commas": "3"}, False),
        ("It opens at 5 p.m. every day. Come in.", {"sentences": 2}, True),
        ("1. The sea is wide.", {"sentences": 2}, False),
        ("Berries, plums", {"commas": 2, **among}, True),
        ("A, B", {"commas": 2, **among}, False),
        ("- a red plum\n- fig\n- stone", {"lines": 3, **among}, True),
        ("Paris, C++", {"among": r"Paris|C\+\+"}, True),
    ):
        assert checks.as_requested(answer, request) is ok, answer


def test_results_match_the_harness(monkeypatch):
    """Strings are compared exactly, whatever their characters."""
    # Its file alone: the packages around it take long to load.
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=None))
    (folder,) = find_spec("lm_eval").submodule_search_locations
    is_equiv = runpy.run_path(f"{folder}/tasks/hendrycks_math/utils.py")["is_equiv"]
    words = r"\frac \sqrt tfrac \left ^\circ \\ \! \% \$ { } / = . 0.5 - x 1 2 12"
    pieces = [*words.split(), r"\text{ ", " ", "\n"]
    rng, same = random.Random(0), 0
    for _ in range(5_000):
        made = rng.choices(pieces, k=rng.randrange(1, 7))
        place = rng.randrange(len(made))
        other = [*made[:place], *rng.choices([*pieces, ""], k=2), *made[place + rng.randrange(2) :]]
        one, two = ("".join(parts).strip() for parts in (made, other))
        wanted = is_equiv(one, two) and bool(one)
        assert checks.same_formula(one, two) is wanted, (one, two)
        same += wanted
    assert 125 < same < 2_500


def test_program_extraction():
    head = "from typing import List\n\n\ndef f(x: int) -> int:\n"
    code, body = "def f(x):\n    return x\n", "    return x\n"
    block, other = f"Sure:\n```python\n{code}```\nDone.", "def ff(x):\n    return x\n"
    indented = "1. Code:\n   ``` python\n   def f(x):\n       return x\n   ```\nIt returns x."
    imports, helper = "from typing import List\n\n\n", "def g():\n    return 1\n\n\n"
    for answer, given, wanted in (
        (block, head, imports + code),
        (block, helper + head, helper + imports + code),
        (indented, head, imports + code),
        (other, head, head + other),
        (body, head, head + body),
        (f"```python\n{body}", head, head + body),
        # A fence that nothing opens ends the program too.
        (f"{code}```\nDone.", "", code),
        (f"{body}```\n\nDone.", head, head + body),
        (f" First write\ndef f\n```python\n{code}```\n", "", code),
    ):
        assert checks.program(answer, given, "f") == wanted


def test_number_parsing():
    for case in re.split(r" \| |\n", NUMBERS.strip()):
        text, values = case.split(" ->")
        numbers = [float(one.value) for one in readings(text) if one.value is not None]
        assert numbers == [*map(float, values.split())], text
    assert [one.value for one in readings("18\u202f000")] == [18000]
    assert not readings("9" * 5000)


def test_truncated_answers():
    for check, answer, part in (  # what counts of an answer that was cut
        ("program", "Sure:\n```\ndef f(): 1\n```\nThis is", "Sure:\n```\ndef f(): 1\n```"),
        ("program", "```\ndef f(): 1\n```\n```\ndef f(", "```\ndef f(): 1\n```\n```"),
        ("program", "def f():\n    return 1\n\nThis", ""),
        ("text", "Paris. It is a", "Paris."),
        ("text", "Paris\nQuestion", "Paris"),
        ("text", "W. W. Jac", ""),
        ("exact", "'WORLD' (1000", "'WORLD'"),
        ("exact", "5. The length of", "5."),
        ("number", "The answer is 3. The answer is 4. The", "The answer is 3."),
        ("number", "The answer is 3.3333", ""),
        ("result", r"is $\boxed{5}$. Next \boxed{", r"is $\boxed{5}"),
        ("result", "The answer is $5$. Prob", "The answer is $5$."),
        ("request", "Coffee, tea.\nCoffee", ""),
    ):
        assert checks.judgeable_part(answer, check) == part, answer
