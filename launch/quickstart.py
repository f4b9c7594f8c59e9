"""``evovlm quickstart``: the whole recipe on real data, small enough for a laptop, through the same commands as ever.

    data      real digits, fonts, photographs, text ─► InternVL meta JSON, jsonl, a Megatron corpus, a tokenizer
    index     evovlm index   ─► OUT/index/{pretrain,sft,val,test}
    pretrain  evovlm train quickstart/pretrain   ─► OUT/pretrain      random weights, text and images together
    sft       evovlm train quickstart/sft        ─► OUT/sft           conversations
    pairs     evovlm preference build, index     ─► OUT/pairs, OUT/index/mpo       its own right and wrong answers
    mpo       evovlm train quickstart/mpo        ─► OUT/mpo           preference optimisation
    labels    evovlm prm build, index            ─► OUT/labels, OUT/index/prm      its own solutions, step by step
    prm       evovlm train quickstart/prm        ─► OUT/prm           process reward model
    select    evovlm best-of-n, prm evaluate     ─► OUT/best_of_8     the best of eight solutions, by the reward model
    evaluate  evovlm evaluate, four times: random weights, after pre-training, after SFT, after MPO
                                                 ─► OUT/summary.json

A phase that is done is not done again; an interrupted one continues.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from evovlm.data.build_index import IndexSettings
from evovlm.data.index_format import Kind
from evovlm.data.index_progress import show_progress
from evovlm.data.synthetic import build_quickstart_data
from evovlm.data.synthetic.steps import PRM_SYSTEM_PROMPT
from evovlm.launch.indexing import build_with_progress
from evovlm.launch.quickstart_summary import summarize
from evovlm.launch.ranks import start_ranks
from evovlm.models.table import TINY

SYSTEM_PROMPT = "Look."
"""The published one has more tokens than a tiny model's whole answer."""
PARTS = ("pretrain", "sft", "val", "test")
BEFORE = {"sft": "pretrain", "mpo": "sft", "prm": "sft"}
"""Stage → whose export it starts from."""
SHORT_SCALE = 0.05
SHORT_STEPS = 12
PAIRS = {"mpo": "sft", "mpo_val": "val"}
"""Index of pairs → part of the data whose questions they answer."""
QUESTIONS, SAMPLES, MAX_PAIRS = 6000, 8, 4
"""Questions of each task, answers to each, and most pairs of one."""
LABELS = {"prm": "sft", "prm_val": "val"}
"""Index of judged solutions → part of the data whose questions of the task ``steps`` they solve."""
SOLVED, SOLUTIONS, ROLLOUTS = 2000, 4, 8
"""Questions that are solved step by step, solutions of each, and continuations from the end of each step."""
CANDIDATES = 8
SHORT_QUESTIONS = 40


class Quickstart:
    """The phases over one output directory.

    Args:
        out: Directory of everything that is made.
        short: A few steps of everything: checks that it runs, learns little.
        ranks: Processes that train and evaluate.
        seed: Of data, weights, order and sampling.
    """

    def __init__(self, out: Path, *, short: bool, ranks: int, seed: int) -> None:
        self.out, self.short, self.ranks, self.seed = out, short, ranks, seed
        self.console = Console()
        self.seconds: dict[str, float] = {}

    def data(self) -> None:
        """Make the data, unless it is there."""
        marker = self.out / "data" / "summary.json"
        scale = SHORT_SCALE if self.short else 1.0
        if not marker.is_file():
            with show_progress(self.console) as progress:
                build_quickstart_data(
                    self.out / "data", seed=self.seed, scale=scale, num_workers=self.ranks, progress=progress
                )

    def index(self) -> None:
        """Index every part of the data."""
        for part in PARTS:
            self._index(self.out / "data" / f"{part}.json", part, "conversations")

    def _index(self, meta: Path, name: str, kind: Kind) -> None:
        settings = IndexSettings(
            meta=meta,
            tokenizer=self.out / "data" / "tokenizer",
            out=self.out / "index" / name,
            kind=kind,
            tile_size=TINY.vision.tile_size,
            tokens_per_tile=TINY.tokens_per_tile,
            max_tiles=TINY.max_tiles,
            system_prompt=SYSTEM_PROMPT,
            num_workers=self.ranks,
        )
        build_with_progress(settings, self.console)

    def pairs(self) -> None:
        """Let the tuned model answer training and held-out questions, and pair its right and wrong answers."""
        for name, part in PAIRS.items():
            folder = self.out / "pairs" / name
            words = [
                f"--out={folder}",
                f"--model={self.out / 'sft'}",
                f"--limit={SHORT_QUESTIONS if self.short else QUESTIONS}",
                f"--num-samples={SAMPLES}",
                f"--max-pairs={MAX_PAIRS}",
                "--temperature=1",
                "--max-new-tokens=32",
                "--verify=exact",
                f"--system-prompt={SYSTEM_PROMPT}",
                f"--seed={self.seed}",
                # A model that has hardly been trained gives no right answer: right ones are then those of the data.
                f"--method={'dropout-ntp' if self.short else 'correctness'}",
            ]
            if not (folder / "meta.json").is_file():
                self._command(["preference", "build", str(self._questions(part, "digits", "words", "charts")), *words])
            self._index(folder / "meta.json", name, "preference")

    def labels(self) -> None:
        """Let the tuned model solve questions in steps, and label each step by how its continuations end."""
        for name, part in LABELS.items():
            folder = self.out / "labels" / name
            words = [
                f"--out={folder}",
                f"--model={self.out / 'sft'}",
                f"--limit={SHORT_QUESTIONS if self.short else SOLVED}",
                f"--num-solutions={SOLUTIONS}",
                f"--rollouts={ROLLOUTS}",
                *self._solving,
                f"--prm-system-prompt={PRM_SYSTEM_PROMPT}",
                # Scores are given behind "+" alone: a small model that sees "-" in training would only repeat it.
                "--until-first-error",
            ]
            if not (folder / "meta.json").is_file():
                self._command(["prm", "build", str(self._questions(part, "steps")), *words])
            self._index(self._with_checks(folder) if name == "prm" else folder / "meta.json", name, "conversations")

    def _with_checks(self, folder: Path) -> Path:
        """Write a meta JSON of labels, and of the checks that a reward model practises with."""
        datasets = {}
        for meta in (folder / "meta.json", self.out / "data" / "checks.json"):
            for name, dataset in json.loads(meta.read_text()).items():
                files = {key: str((meta.parent / dataset[key]).absolute()) for key in ("root", "annotation")}
                datasets[name] = dataset | files
        path = folder / "with_checks.json"
        path.write_text(json.dumps(datasets, indent=2) + "\n")
        return path

    @property
    def _solving(self) -> list[str]:
        """How solutions are sampled and checked."""
        return [
            # At 1 the tuned model is nearly always right, which leaves nothing to choose. So its five likeliest tokens,
            # mostly digits that look alike, are drawn more evenly than it means them.
            "--temperature=3",
            "--top-k=5",
            "--max-new-tokens=32",
            "--prompt=direct",
            "--verify=exact",
            f"--system-prompt={SYSTEM_PROMPT}",
            f"--seed={self.seed}",
        ]

    def _questions(self, part: str, *tasks: str) -> Path:
        """Write a meta JSON of some tasks of a part."""
        path = self.out / "data" / f"{part}_{'_'.join(tasks)}.json"
        meta = json.loads((self.out / "data" / f"{part}.json").read_text())
        path.write_text(json.dumps({task: meta[task] for task in tasks}, indent=2) + "\n")
        return path

    def select(self) -> None:
        """Solve held-out questions eight times each, and choose; measure how well steps are judged."""
        words = [
            str(self._questions("test", "steps")),
            f"--out={self.out / 'best_of_8'}",
            f"--model={self.out / 'sft'}",
            f"--critic-model={self.out / 'prm'}",
            *(f"--critic={critic}" for critic in ("prm", "majority", "random")),
            f"--num={CANDIDATES}",
            *self._solving,
            f"--critic-system-prompt={PRM_SYSTEM_PROMPT}",
        ]
        self._command(["best-of-n", *words])
        judged = self.out / "labels" / "prm_val" / "steps" / "steps.jsonl"
        words = [
            f"--model={self.out / 'prm'}",
            f"--system-prompt={PRM_SYSTEM_PROMPT}",
            "--threshold=0.5",
            "--until-first-error",
            f"--json={self.step_scores}",
        ]
        self._command(["prm", "evaluate", str(judged), *words])

    @property
    def step_scores(self) -> Path:
        """Where it says how well steps are judged."""
        return self.out / "prm" / "evaluations" / "steps.json"

    def train(self, stage: str) -> None:
        """Train a stage, or continue it, unless its export is there."""
        run, index = self.out / stage, self.out / "index"
        if (run / "export" / "config.json").is_file():
            return
        words = [
            f"--out={run}",
            f"--seed={self.seed}",
            f"--data.index={index / stage}",
            f"--data.val_index={index / (f'{stage}_val' if stage in ('mpo', 'prm') else 'val')}",
            f"--data.test_index={index / 'test'}",
            f"--ranks={self.ranks}",
        ]
        if stage == "pretrain":
            words += [f"--model.tokenizer={self.out / 'data' / 'tokenizer'}"]
        else:
            words += [f"--model.from_dir={self.out / BEFORE[stage] / 'export'}"]
        if self.short:
            words += [f"--steps={SHORT_STEPS}", "--validate_every=6", "--checkpoint.every=6", "--data.phases=[]"]
        self._command(["train", f"quickstart/{stage}", "--resume=auto", *words])

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """Score random weights, and the model after each stage."""
        wanted = [
            ("before", "pretrain", "initial"),
            *((stage, stage, "newest") for stage in ("pretrain", "sft", "mpo")),
        ]
        scores: dict[str, dict[str, Any]] = {}
        for name, stage, checkpoint in wanted:
            run = self.out / stage
            self._command(["evaluate", str(run), f"--checkpoint={checkpoint}", f"--ranks={self.ranks}"])
            files = sorted(
                (run / "evaluations").glob("initial.json" if checkpoint == "initial" else "step-*[0-9].json")
            )
            scores[name] = json.loads(files[-1].read_text())["tasks"]
        return scores

    def claim(self) -> None:
        """Write down what the folder is made with, or see that it is the same.

        Raises:
            ValueError: It holds phases of another seed, or of a short run where a whole one is wanted.
        """
        file, mine = self.out / "quickstart.json", {"seed": self.seed, "short": self.short}
        if file.is_file() and (there := json.loads(file.read_text())) != mine:
            raise ValueError(
                f"{self.out} holds a quickstart with {there}, not {mine}: name another folder with --out, or delete it"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mine) + "\n")

    def run(self) -> None:
        """Run all phases; see :meth:`claim` for the error."""
        self.claim()
        with self._phase("data", "make data from real digits, fonts, photographs and text"):
            self.data()
        with self._phase("index", "scan it all into memory-mapped indexes"):
            self.index()
        with self._phase("pretrain", "native multimodal pre-training from random weights"):
            self.train("pretrain")
        with self._phase("sft", "supervised fine-tuning"):
            self.train("sft")
        with self._phase("pairs", "the tuned model's right and wrong answers to training questions"):
            self.pairs()
        with self._phase("mpo", "mixed preference optimisation on these pairs"):
            self.train("mpo")
        with self._phase("labels", "its own solutions step by step, every step labelled by where it leads"):
            self.labels()
        with self._phase("prm", "a process reward model, trained on these labels"):
            self.train("prm")
        with self._phase("select", "eight solutions of each held-out question, and which of them is best"):
            self.select()
        with self._phase("evaluate", "greedy answers on held-out questions"):
            scores = self.evaluate()
        summarize(self, scores)

    @contextmanager
    def _phase(self, name: str, what: str) -> Iterator[None]:
        self.console.rule(f"{name}: {what}", align="left")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self.console.print(f"{name} took {self.seconds[name]:.1f} s", highlight=False)

    def _command(self, words: Sequence[str]) -> None:
        """Run an evovlm command in processes of its own, as a user would."""
        start_ranks(self.ranks, words)


def run_quickstart(out: Path, *, short: bool, ranks: int, seed: int = 0) -> None:
    """Run the quickstart; see :class:`Quickstart`."""
    Quickstart(out, short=short, ranks=ranks, seed=seed).run()
