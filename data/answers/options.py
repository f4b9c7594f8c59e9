"""The option that an answer picks, where the question's options are known: MMMU, MMBench.

options {"A": "a cat", "B": "a dog"}
"(B)", "B is right"                  ─ letter in brackets, else alone, the last one ─┐
"I can clearly see a dog in there"   ─ text of an option ───────────────────────────┼─► "B"
"B. a dog"                           ─ choice_letter ────────────────────────────────┘
"""

import ast
import re
from collections.abc import Mapping

from evovlm.data.answers.choice import choice_letter, stated_letter

_ENDS = ",.!?;:'"
_LISTED = re.compile(r"^\(?([A-Z])[.):、．]\s*(.+)$", re.MULTILINE)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_USUAL = "ABCDEFGH"
_LONG_ANSWER = 5
_SHORT_ANSWER = 3
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def listed_options(question: str) -> dict[str, str]:
    """Read the options that a question lists line by line ("A. a cat"), if they run A, B, C …; otherwise none."""
    options = {letter: text.strip() for letter, text in _LISTED.findall(question)}
    letters = "".join(options)
    return options if len(letters) > 1 and letters == _LETTERS[: len(letters)] else {}


def mmmu_letter(response: str, options: Mapping[str, str]) -> str | None:
    """Find the option that a response picks, as MMMU does; None if it picks none.

    Official definition (MMMU): punctuation is taken off the ends; of the options whose letter stands in brackets the
    last one named, else of those whose letter stands alone between spaces, else (in a response of more than five words)
    of those whose text it contains. Where nothing is found the official code draws a letter at random; here
    ``choice_letter`` reads forms such as "B. a dog", and a response without any letter is wrong.

    Args:
        response: The model's text.
        options: Letter → text; if there are none, the letters A to H count.
    """
    letters = options or dict.fromkeys(_USUAL, "")
    for end in _ENDS:
        response = response.strip(end)
    text = f" {response} "
    for form in ("({})", " {} "):
        found = {letter: text.rfind(form.format(letter)) for letter in letters}
        if max(found.values()) >= 0:
            return max(found, key=lambda letter: found[letter])
    if len(response.split()) > _LONG_ANSWER:
        found = {letter: text.lower().rfind(words.lower()) for letter, words in options.items() if words}
        if found and max(found.values()) >= 0:
            return max(found, key=lambda letter: found[letter])
    letter = choice_letter(response)
    return letter if letter in letters else None


def mmbench_letter(response: str, options: Mapping[str, str]) -> str | None:
    """Find the option that a response picks, as MMBench does without a judge model; None if it picks none.

    Official definition (exact matching): the one option letter that is a word of its own, once punctuation is left out
    (an A among more than three words may be an article and does not count); otherwise the one option whose text the
    response contains, unless it is twice as long as all options together. Forms that ``stated_letter`` understands
    ("the answer is B, since A …") count before the texts are compared.

    Args:
        response: The model's text.
        options: Letter → text; if there are none, the letters A to H count.
    """
    words = response.translate(_SEPARATORS).split()
    letters = [letter for letter in options or _USUAL if letter in words]
    if len(letters) == 1 and not (letters == ["A"] and len(words) > _SHORT_ANSWER):
        return letters[0]
    stated = stated_letter(response)
    if stated is not None and (not options or stated in options):
        return stated
    text = response.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, option in options.items() if option and option.lower() in text]
    return named[0] if len(named) == 1 else None


def truth_list(text: str) -> list[str]:
    """Read a truth that MMMU writes as a Python list inside a text, "['24/7', '3.429']"; any other is one truth."""
    if text.startswith("[") and text.endswith("]"):
        try:
            values = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return [text]
        if isinstance(values, list) and values:
            return [str(value) for value in values]
    return [text]
