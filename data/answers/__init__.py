"""Rules that say whether an answer is right: small pure functions, one for each type of answer (spec §4.4).

    model's text ──prompts.extract──► answer ──scorer(answer, truths)──► score in [0, 1] ──► right iff score > 0.9

text.py      exact match, ANLS (DocVQA), VQA accuracy        choice.py   letter of a multiple choice
numeric.py   numbers with a tolerance, relaxed (ChartQA)     latex.py    mathematics, by math-verify in a process
rules.py     the table of scorers by name                    prompts.py  how to ask, and where the answer stands
"""
