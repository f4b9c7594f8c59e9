"""Rules by name, for all datasets or for one; an answer is right above a score of 0.9."""

import pytest

from evovlm.data.answers.prompts import PromptStyle
from evovlm.data.answers.rules import CORRECT_ABOVE, RULES, Rules, Verdict, judge, open_scorers, parse_rules


def test_rules_for_all_and_for_some() -> None:
    rules = parse_rules(["charts=relaxed", "numeric:0.02", "a=b=anls"])
    assert rules == Rules("numeric:0.02", {"charts": "relaxed", "a=b": "anls"})
    assert [rules.of(name) for name in ("charts", "words")] == ["relaxed", "numeric:0.02"]
    assert parse_rules([]) == Rules("exact", {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exakt"], "'exakt' is no rule for answers: did you mean 'exact'"),
        (["charts=zzz"], "'zzz' is no rule for answers: rules are exact, choice"),
        (["exact:1"], "rule 'exact:1': only 'numeric' takes a tolerance"),
        (["numeric:much"], "rule 'numeric:much': only 'numeric' takes a tolerance, from 0 to below 1"),
        (["numeric:1"], "from 0 to below 1"),
        (["exact", "math"], "two rules for all datasets, 'exact' and 'math'"),
        (["a=exact", "a=math"], "two rules for dataset 'a': 'exact' and 'math'"),
    ],
)
def test_mistakes_in_rules(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rules(words)


def test_a_rule_for_a_dataset_that_is_not_there() -> None:
    rules = parse_rules(["chart=relaxed"])
    rules.check_datasets(["chart", "words"])
    with pytest.raises(ValueError, match="dataset 'chart', which the meta JSON does not have: did you mean 'charts'"):
        rules.check_datasets(["charts", "words"])


def test_every_rule_scores_its_own_kind_of_answer() -> None:
    pure = [rule for rule in RULES if rule != "math"]
    with open_scorers([*pure, "numeric:0.02"]) as scorers:
        assert {rule: scorers[rule]("105", ["100"]) for rule in scorers} == {
            **dict.fromkeys(("exact", "choice", "numeric", "vqa", "numeric:0.02"), 0),
            **dict.fromkeys(("contains", "iou", "point", "mathvista"), 0),
            **dict.fromkeys(("relaxed", "yes_no", "mra"), 1),
            "anls": pytest.approx(2 / 3),
        }
        assert scorers["numeric:0.02"]("101", ["100"]) == 1
        assert scorers["choice"]("The answer is (B).", ["B"]) == 1
        assert scorers["contains"]("It says STOP here.", ["stop"]) == 1
        assert scorers["yes_no"]("No, there is none.", ["yes"]) == 0
        assert scorers["iou"]("<box>[[0, 0, 10, 10]]</box>", ["[[0, 0, 10, 20]]"]) == 1
        assert scorers["point"]("[[5, 5]]", ["[[0, 0, 10, 10]]"]) == 1
        assert scorers["mathvista"]("The answer is 1.449 cm.", ["1.45"]) == 1


def test_a_verdict() -> None:
    with open_scorers(["anls"]) as scorers:
        score = scorers["anls"]
        assert judge("Answer: \\boxed{Hello}", "hello", score, PromptStyle.EN_V2) == Verdict("Hello", 1.0)
        assert judge("Hello", "hello", score, PromptStyle.EN_V2) == Verdict(None, 0.0)
        assert judge("Hello", "hello", score, PromptStyle.DIRECT, finished=False) == Verdict(None, 0.0)
        assert judge("4", "Steps.\nFinal answer: 4", score, PromptStyle.DIRECT).correct
    assert Verdict("a", CORRECT_ABOVE).correct is False
    assert Verdict("a", 0.91).correct is True
