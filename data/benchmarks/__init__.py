"""Benchmarks by their answer files: what a model said to each question, scored as each benchmark defines it.

    answers.json, .jsonl ──rows──► Row(answer, truths, …) ──judge──► Judged(score, groups) ──table──► group × metric
    annotations ──────────join──►   │ bad rows: counted and listed

rows.py         answer files, the keys that InternVL's evaluation scripts and others write
annotations.py  truths from a file of their own, joined by question
report.py       what was judged, means by group
registry.py     the table of benchmarks, and the whole way from files to a report
choice.py       MMMU, AI2D, MMBench           reading.py    ChartQA, DocVQA, InfoVQA, TextVQA, VQA, OCRBench
pope.py         POPE                          grounding.py  RefCOCO, ScreenSpot
vsibench.py     VSI-Bench                     mathvista.py  MathVista

A benchmark judges one row with a scorer of ``evovlm.data.answers`` and says how rows add up to its numbers.
"""
