"""The table of scorers, by the names that settings and the command line use.

"charts=relaxed", "math" ──parse_rules──► Rules(default, by dataset) ──open_scorers──► {rule: scorer}
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from evovlm.data.answers.boxes import iou_match, point_match
from evovlm.data.answers.choice import multiple_choice
from evovlm.data.answers.contains import contains
from evovlm.data.answers.latex import LatexScorer
from evovlm.data.answers.mathvista import mathvista
from evovlm.data.answers.numeric import numeric, relaxed_accuracy
from evovlm.data.answers.prompts import PromptStyle, extract, true_answer
from evovlm.data.answers.relative import mean_relative_accuracy
from evovlm.data.answers.text import anls, exact_match, vqa_accuracy
from evovlm.data.answers.yes_no import yes_no

Scorer = Callable[[str, Sequence[str]], float]
"""Called as (prediction, truths), at least one truth; returns a score in [0, 1]."""

CORRECT_ABOVE = 0.9
"""An answer is right iff its score is above this (spec §4.4)."""

RULES = {
    "exact": "the same text, apart from case and space",
    "choice": "the letter of a multiple choice",
    "numeric": "a number within 0.1 %; numeric:0.02 within 2 %",
    "relaxed": "a number within 5 %, or the same text (ChartQA)",
    "anls": "normalised edit similarity of at least 0.5 (DocVQA)",
    "vqa": "VQA accuracy",
    "contains": "the truth stands somewhere in the answer (OCRBench)",
    "yes_no": "yes or no, by the first sentence (POPE)",
    "iou": "a box that overlaps the true one by half (RefCOCO)",
    "point": "a point, or the centre of a box, in the true box (ScreenSpot)",
    "mra": "a number, by its mean relative accuracy (VSI-Bench)",
    "mathvista": "a number, list or text, extracted by rules (MathVista)",
    "math": "equal mathematics, by math-verify",
}
_PURE: dict[str, Scorer] = {
    "exact": exact_match,
    "choice": multiple_choice,
    "numeric": numeric,
    "relaxed": relaxed_accuracy,
    "anls": anls,
    "vqa": vqa_accuracy,
    "contains": contains,
    "yes_no": yes_no,
    "iou": iou_match,
    "point": point_match,
    "mra": mean_relative_accuracy,
    "mathvista": mathvista,
}


@dataclass(frozen=True)
class Rules:
    """Which rule checks which dataset's answers.

    Attributes:
        default: Rule of datasets that are not named.
        by_dataset: Dataset → rule.
    """

    default: str
    by_dataset: Mapping[str, str]

    def of(self, dataset: str) -> str:
        """Return a dataset's rule."""
        return self.by_dataset.get(dataset, self.default)

    def check_datasets(self, datasets: Iterable[str]) -> None:
        """Raise a ``ValueError`` if a rule is given for a dataset that is not there."""
        known = list(datasets)
        for name in self.by_dataset:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"a rule is given for dataset '{name}', which the meta JSON does not have: {hint}")


@dataclass(frozen=True)
class Verdict:
    """What a rule says about a reply.

    Attributes:
        answer: What was found in it; None: the reply is not in the form that was asked for, or was cut off.
        score: In [0, 1]; 0 without an answer.
    """

    answer: str | None
    score: float

    @property
    def correct(self) -> bool:
        """Whether the score is above ``CORRECT_ABOVE``."""
        return self.score > CORRECT_ABOVE


def judge(text: str, truth: str, scorer: Scorer, style: PromptStyle, *, finished: bool = True) -> Verdict:
    """Find the answer in a reply and score it against a reference reply; a reply that was cut off has none."""
    answer = extract(text, style) if finished else None
    return Verdict(answer, 0.0 if answer is None else scorer(answer, [true_answer(truth)]))


def parse_rules(words: Sequence[str], default: str = "exact") -> Rules:
    """Read rules as the command line gives them: ``RULE`` for all datasets, ``DATASET=RULE`` for one.

    Raises:
        ValueError: Unknown rule, bad tolerance, or two rules for the same.
    """
    general: str | None = None
    by_dataset: dict[str, str] = {}
    for word in words:
        dataset, equals, rule = word.rpartition("=")
        _check(rule)
        if not equals:
            if general not in (None, rule):
                raise ValueError(f"two rules for all datasets, '{general}' and '{rule}': name a dataset, DATASET=RULE")
            general = rule
        elif by_dataset.setdefault(dataset, rule) != rule:
            raise ValueError(f"two rules for dataset '{dataset}': '{by_dataset[dataset]}' and '{rule}'")
    return Rules(general or default, by_dataset)


@contextmanager
def open_scorers(rules: Iterable[str]) -> Iterator[dict[str, Scorer]]:
    """Give the scorer of each rule; what they hold (a process for ``math``) is let go after the block.

    Raises:
        ValueError: Unknown rule, or a package that one needs is not installed.
    """
    with ExitStack() as stack:
        scorers: dict[str, Scorer] = {}
        for rule in rules:
            name, tolerance = _check(rule)
            if name == "math":
                scorers[rule] = stack.enter_context(LatexScorer())
            else:
                scorers[rule] = _PURE[name] if tolerance is None else partial(numeric, tolerance=tolerance)
        yield scorers


def _check(rule: str) -> tuple[str, float | None]:
    name, colon, argument = rule.partition(":")
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"rules are {', '.join(RULES)}"
        raise ValueError(f"'{rule}' is no rule for answers: {hint}")
    if not colon:
        return name, None
    try:
        tolerance = float(argument)
    except ValueError:
        tolerance = math.nan
    if name != "numeric" or not 0 <= tolerance < 1:
        raise ValueError(f"rule '{rule}': only 'numeric' takes a tolerance, from 0 to below 1, as in numeric:0.02")
    return name, tolerance
