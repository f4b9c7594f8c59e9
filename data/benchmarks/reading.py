"""ChartQA, DocVQA, InfoVQA, TextVQA, VQA and OCRBench: short answers to what stands in an image.

row ─► scorer of its benchmark(answer, truths) ─► mean; ChartQA: of human and augmented; OCRBench: counts by type
"""

from collections.abc import Callable, Sequence

from evovlm.data.answers.contains import contains, contains_formula
from evovlm.data.answers.numeric import relaxed_accuracy
from evovlm.data.answers.rules import Scorer
from evovlm.data.answers.text import anls, vqa_accuracy
from evovlm.data.benchmarks.report import NUM, NUM_RIGHT, Judged, Table, means
from evovlm.data.benchmarks.rows import Row

CHARTQA_SPLITS = ("human", "augmented")
OCRBENCH_TYPES = {
    "Regular Text Recognition": "Text Recognition",
    "Irregular Text Recognition": "Text Recognition",
    "Artistic Text Recognition": "Text Recognition",
    "Handwriting Recognition": "Text Recognition",
    "Digit String Recognition": "Text Recognition",
    "Non-Semantic Text Recognition": "Text Recognition",
    "Scene Text-centric VQA": "",
    "Doc-oriented VQA": "",
    "Key Information Extraction": "",
    "Handwritten Mathematical Expression Recognition": "",
}
"""OCRBench's ten types of question, and the sum that six of them are part of."""


def judge_by(scorer: Scorer) -> Callable[[Row], Judged]:
    """Return a judge that applies one scorer to every row; files that are scored together are groups."""

    def judge(row: Row) -> Judged:
        answer, truths = row.answer(), row.truths()
        groups = () if row.split is None else (row.split,)
        return Judged(row.where, answer, " / ".join(truths), scorer(answer, truths), groups)

    return judge


judge_anls = judge_by(anls)
judge_vqa = judge_by(vqa_accuracy)


def judge_chartqa(row: Row) -> Judged:
    """Judge a row of ChartQA by ``relaxed_accuracy``.

    Group: human or augmented, from ``split`` or ``type``, else from the file's name where several are scored.
    """
    answer, truths = row.answer(), row.truths()
    named = (row.text("split", "type") or row.split or "").lower()
    groups = tuple(split for split in CHARTQA_SPLITS if split in named)
    return Judged(row.where, answer, " / ".join(truths), relaxed_accuracy(answer.strip(), truths), groups)


def judge_ocrbench(row: Row) -> Judged:
    """Judge a row of OCRBench by ``contains``, or ``contains_formula`` where ``dataset_name`` is HME100k.

    Groups: ``type``, and Text Recognition for six of the ten types; without a type, the dataset's name.
    """
    answer, truths = row.answer(), row.truths()
    dataset, kind = row.text("dataset_name", "dataset"), row.text("type", "question_type", "category")
    scorer = contains_formula if dataset == "HME100k" else contains
    part_of = OCRBENCH_TYPES.get(kind or "", "")
    groups = tuple(name for name in (part_of, kind or dataset) if name)
    return Judged(row.where, answer, " / ".join(truths), scorer(answer, truths), groups)


def table_chartqa(judged: Sequence[Judged]) -> Table:
    """Return relaxed accuracy; overall it is the mean of both splits, as ChartQA is quoted, where rows name them."""
    return means(judged, "relaxed accuracy", over_groups=True)


def table_anls(judged: Sequence[Judged]) -> Table:
    """Return ANLS, the mean over questions."""
    return means(judged, "ANLS")


def table_vqa(judged: Sequence[Judged]) -> Table:
    """Return VQA accuracy, the mean over questions."""
    return means(judged, "accuracy")


def table_ocrbench(judged: Sequence[Judged]) -> Table:
    """Return the number of right answers, as OCRBench is quoted (of 1,000 in all), and their share."""
    table = means(judged, "accuracy")
    return {
        name: {NUM_RIGHT: float(round(values["accuracy"] * values[NUM])), **values} for name, values in table.items()
    }
