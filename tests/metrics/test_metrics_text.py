import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot_flwr.errors import DataError
from pilot_flwr.metrics import text


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("seven", "seven", 1),
        (" Seven\n", "seven", 1),
        ("seven  eight", "seven eight", 1),
        ("seven", "eight", 0),
        ("seven", "", 0),
        ("seven.", "seven", 0),
    ],
)
def test_exact_match(prediction, reference, score):
    assert text.exact_match(prediction, [reference]) == score
    assert text.exact_match(prediction, ["nine", reference]) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Yes.", "yes", 1),  # `text.rstrip('.').lower()` of LLaVA's conversion for GQA
        ("pepper shaker", "pepper shaker", 1),
        ("yes...", "yes", 1),
        ("Yes!", "yes", 0),
        ("the car", "car", 0),
        ("pepper  shaker", "pepper shaker", 0),
    ],
)
def test_gqa(prediction, reference, score):
    assert text.gqa(prediction, [reference]) == score


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        # Similarities 1 - edits / length by hand.
        ("coca cola", ["coca cola"], 1.0),
        ("Coca-Cola", ["coca cola"], 8 / 9),
        ("coke", ["pepsi", "coke zero"], 0.0),  # 1 - 5/9 is below the threshold
        ("pepsi", ["pepsis", "pep"], 5 / 6),
        ("abcd", ["abxy"], 0.5),  # at the threshold
        ("abcde", ["abxyz"], 0.0),
        (" a\n b ", ["A B"], 1.0),
        ("", ["word"], 0.0),
    ],
)
def test_anls(prediction, references, score):
    assert text.anls(prediction, references) == pytest.approx(score)


def edits(first, second):
    """Levenshtein distance, by its recursion over a table."""
    table = {(i, 0): i for i in range(len(first) + 1)} | {(0, j): j for j in range(len(second) + 1)}
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            other = table[i - 1, j - 1] + (a != b)
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, other)
    return table[len(first), len(second)]


LETTERS = st.text(alphabet="abC ", min_size=1, max_size=8).map(lambda t: f"x{t}y")


@given(LETTERS, st.lists(LETTERS, min_size=1, max_size=3))
def test_anls_is_its_formula(prediction, references):
    forms = [" ".join(t.lower().split()) for t in [prediction, *references]]
    best = max(1 - edits(forms[0], r) / max(len(forms[0]), len(r)) for r in forms[1:])
    expected = best if best > 0.5 - 1e-12 else 0
    assert text.anls(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # As LLaVA's eval_science_qa.py, whose model answers come without white space around.
        ("B", "B"),
        (" B\n", "B"),
        ("B. Because it is", "B"),
        ("B\nBecause it is", None),
        ("B.", None),  # it wants a blank behind the period
        ("F. Because", None),
        ("The answer is C.", "C"),
        ("The answer is C, because", "C"),  # its pattern's period is any character
        ("So the reason is heat. The answer is C", None),  # which must be there
        ("The answer is A. No, The answer is B.", None),  # exactly one
        ("The answer is A. The answer is A.", None),
        ("The answer is F. The answer is B.", None),
        ("The answer is A or B, so The answer is B.", None),
        ("B. Some say The answer is C.", "B"),
        ("the answer is C.", None),
        ("The answer is F.", None),
        ("F", None),
        ("AB", None),
        ("", None),
        ("Because. A. is right", None),
    ],
)
def test_the_letter_of_a_scienceqa_answer(answer, letter):
    assert text.option_letter(answer) == letter


def test_scienceqa():
    assert text.scienceqa("The answer is C.", ["C"]) == 1
    assert text.scienceqa("The answer is C.", ["The answer is C."]) == 1
    assert text.scienceqa("D", ["C"]) == 0
    assert text.scienceqa("heat", ["C"]) == 0
    assert text.scienceqa("heat", ["C", "D"]) == 0
    message = r"^Reference 2 names no option but must be a letter from A to E, or .*"
    with pytest.raises(DataError, match=message) as error:
        text.scienceqa("C", ["A", "heat"])
    assert "heat" not in str(error.value)  # errors go to the server
