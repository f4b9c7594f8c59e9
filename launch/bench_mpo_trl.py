"""The peer in ``evovlm bench mpo``: TRL's DPOTrainer on transformers' InternVL, with the settings that are best for it.

index ─► token ids of prompt, chosen, rejected; pixels, decoded before ─► DataCollatorForPreference + tiles, twice
                                                                            │
exported weights ─► policy, reference ─► DPOTrainer: sigmoid, bco_pair, sft ◄┘  precomputed or resident reference

TRL takes samples with images to a collator that needs a processor, and that needs torchvision; and it refuses to score
such samples before training. Here its text collator is given token ids, and the tiles are added: both work, and no
image is processed while the clock runs. No gradient checkpointing, fused AdamW, length-grouped batches, float32.
"""

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evovlm.data.images import load_tiles
from evovlm.data.index import Index
from evovlm.data.sample import IGNORE, expand_sample
from evovlm.data.tokenizer import Tokenizer
from evovlm.launch.bench_mpo_ours import LOSS, Epoch
from evovlm.launch.bench_mpo_pairs import Task

VERSION = "1.16.0"


def check_installed() -> None:
    """Make sure that TRL is there.

    Raises:
        ValueError: It is not.
    """
    if importlib.util.find_spec("trl") is None:
        raise ValueError(
            f"bench mpo: TRL is not installed: pip install trl=={VERSION}, or give --no-trl to measure evovlm alone"
        )


class Pairs:
    """Preference pairs as TRL wants them.

    Args:
        data: Index and tokenizer.

    Attributes:
        examples: Token ids of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` of each pair.
        tiles: Float32 ``[N, 3, S, S]`` of each pair.
        lengths: Tokens of the prompt and the longer answer.
    """

    def __init__(self, data: tuple[Index, Tokenizer]) -> None:
        index, tokenizer = data
        self.examples: list[dict[str, list[int]]] = []
        self.tiles: list[Tensor] = []
        for sample in range(len(index)):
            expanded = expand_sample(index, sample, image_context=tokenizer.image_context)
            assert expanded.branches is not None
            at, after = expanded.branches
            prefix, end = np.arange(at), len(expanded.tokens)
            answers = [np.concatenate((prefix, branch)) for branch in (np.arange(at, after), np.arange(after, end))]
            # A row's label is the next token, so an answer begins after the first row that has one.
            targets = [rows[expanded.labels[rows] != IGNORE] for rows in answers]
            prompt = expanded.tokens[: targets[0][0] + 1]
            chosen, rejected = (expanded.labels[rows] for rows in targets)
            named = (("prompt_ids", prompt), ("chosen_ids", chosen), ("rejected_ids", rejected))
            self.examples.append({name: tokens.tolist() for name, tokens in named})
            tiles = [load_tiles(ref, index.meta.tile_size) for ref in expanded.refs]
            self.tiles.append(torch.from_numpy(np.concatenate(tiles)))
        self.lengths = [
            len(one["prompt_ids"]) + max(len(one["chosen_ids"]), len(one["rejected_ids"])) for one in self.examples
        ]


class TrlTrainer:
    """Trains with TRL in this process, with all of its threads.

    Args:
        data: Index and tokenizer.
        task: Model and pairs.
        directory: The exported model.
        step_pairs: Pairs of an optimizer step.
    """

    def __init__(self, data: tuple[Index, Tokenizer], task: Task, directory: Path, step_pairs: int) -> None:
        self._task, self._directory, self._step_pairs = task, directory, step_pairs
        self._pairs = Pairs(data)
        self._order: list[list[int]] = []

    def epoch(self, batch: int, scored: int | None, *, answer_rows: bool = False) -> Epoch:
        """Train on all pairs once, from the exported weights.

        Args:
            batch: Pairs of a forward pass; an optimizer step accumulates as many as it needs.
            scored: Pairs of a forward pass of the reference model, which scores all pairs before; None: it scores each
                batch when that is trained on.
            answer_rows: Pass only rows of answers through the output head, which TRL does on CUDA, but not on a CPU.
        """
        _be_quiet()
        head = _head_on_answer_rows() if answer_rows else nullcontext()
        with head, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._epoch(Path(folder), batch, scored)

    def _epoch(self, folder: Path, batch: int, scored: int | None) -> Epoch:
        trainer = _timed_trainer(
            model=self._model(),
            ref_model=self._model(),
            args=self._config(folder, batch, scored),
            data_collator=self._collate,
            train_dataset=self._dataset(folder),
            processing_class=self._tokenizer(),
        )
        self._order.clear()
        trainer.train()
        logs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        reference = None
        if scored is not None:
            table = trainer.train_dataset
            reference = np.empty((len(table), 2))
            reference[table["row"]] = np.stack((table["ref_chosen_logps"], table["ref_rejected_logps"]), 1)
        first = self._order[: self._step_pairs // batch]
        return Epoch(trainer.reference_seconds, trainer.train_seconds, [float(x) for x in logs], first, reference)

    def _model(self) -> Any:
        from transformers import InternVLForConditionalGeneration

        return InternVLForConditionalGeneration.from_pretrained(
            self._directory, dtype=torch.float32, attn_implementation="sdpa"
        )

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._directory)

    def _config(self, folder: Path, batch: int, scored: int | None) -> Any:
        from trl import DPOConfig

        return DPOConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=batch,
            precompute_ref_batch_size=scored,
            gradient_accumulation_steps=self._step_pairs // batch,
            num_train_epochs=1,
            train_sampling_strategy="group_by_length" if batch > 1 else "random",
            learning_rate=self._task.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[LOSS.dpo_weight, LOSS.bco_weight, LOSS.nll_weight],
            beta=LOSS.beta,
            precompute_ref_log_probs=scored is not None,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            max_length=None,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=self._task.seed,
        )

    def _dataset(self, folder: Path) -> Any:
        """The pairs' numbers, long pairs first; texts are only there because TRL tokenizes them."""
        from datasets import Dataset

        count = len(self._pairs.examples)
        order = sorted(range(count), key=lambda row: -self._pairs.lengths[row])
        columns = {"row": order, "length": [self._pairs.lengths[row] for row in order]}
        texts = {name: ["0"] * count for name in ("prompt", "chosen", "rejected")}
        # On disk, in a folder of its own: scores that TRL keeps beside it are not those of another epoch.
        Dataset.from_dict({**texts, **columns}).save_to_disk(str(folder / "pairs"))
        return Dataset.load_from_disk(str(folder / "pairs"))

    def _collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch with TRL's collator, and put the tiles of chosen and rejected answers beside it."""
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        rows = [example["row"] for example in examples]
        self._order.append(rows)
        scores = ("ref_chosen_logps", "ref_rejected_logps")
        full = [
            {**self._pairs.examples[row], **{name: example[name] for name in scores if name in example}}
            for row, example in zip(rows, examples, strict=True)
        ]
        # Padding is masked, so any id will do.
        made: dict[str, Tensor] = DataCollatorForPreference(pad_token_id=0)(full)
        made["pixel_values"] = torch.cat([self._pairs.tiles[row] for row in rows] * 2)
        return made


@contextmanager
def _head_on_answer_rows() -> Iterator[None]:
    """Let TRL's forward take for CUDA what it is on; its kernels ask on their own."""
    from trl.trainer import utils

    name = "_use_triton"
    asked = getattr(utils, name)
    setattr(utils, name, lambda _device: True)
    try:
        yield
    finally:
        setattr(utils, name, asked)


def _be_quiet() -> None:
    """Keep progress bars and warnings of these packages out of the way."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of our process group, which it does not use
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"  # TRL looks here when it scores


def _timed_trainer(**settings: Any) -> Any:
    """A DPOTrainer that notes ``reference_seconds`` and ``train_seconds``: its steps, not what goes before."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOTrainer

    class Timed(DPOTrainer):  # type: ignore[misc]  # TRL is not installed everywhere
        reference_seconds = train_seconds = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return super()._precompute_ref_logps(*args, **kwargs)
            finally:
                self.reference_seconds += time.perf_counter() - began

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
            trainer.train_seconds = time.perf_counter() - self.began

    trainer = Timed(**settings)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    return trainer
