"""Rules that say whether an answer is right: small pure functions, one for each type of answer (spec §4.4).

    model's text ──prompts.extract──► answer ──scorer(answer, truths)──► score in [0, 1] ──► right iff score > 0.9

text.py      exact match, ANLS (DocVQA), VQA accuracy        choice.py   letter of a multiple choice
numeric.py   numbers with a tolerance, relaxed (ChartQA)     latex.py    mathematics, by math-verify in a process
contains.py  the truth inside the answer (OCRBench)          yes_no.py   yes or no (POPE)
boxes.py     boxes and points (RefCOCO, ScreenSpot)          relative.py mean relative accuracy (VSI-Bench)
mathvista.py extraction and form of MathVista's answers      options.py  the option picked (MMMU, MMBench)
open_ended.py  MMMU's open questions
rules.py     the table of scorers by name                    prompts.py  how to ask, and where the answer stands
"""
