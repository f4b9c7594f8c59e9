"""``evovlm evaluate``: scores a run's checkpoint, or its random start, on its test index and files the result.

RUN/evaluations/step-00000400.json            scores by task
RUN/evaluations/step-00000400.answers.jsonl   every question's expected and given answer
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evovlm.data.index import Index
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.evaluate import Evaluator, answer_v2pe, summary
from evovlm.engine.model_source import open_source
from evovlm.engine.runs import load_model, newest_checkpoint, read_settings
from evovlm.models.internvl import InternVL
from evovlm.parallel.world import World

INITIAL = "initial"
"""Stands for the weights that a run started from."""


def score_run(
    run: Path,
    world: World,
    *,
    checkpoint: str = "newest",
    test_index: Path | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Score a run's model; every rank calls this, questions are shared out.

    Args:
        run: Run directory.
        world: The ranks.
        checkpoint: ``newest``, ``initial`` (the weights the run started from) or a checkpoint directory.
        test_index: By default the run's own ``[data] test_index``.
        batch_size: Questions answered together on a rank.
        max_new_tokens: Longest answer; by default a little more than the longest expected one.

    Returns:
        ``{"checkpoint", "test_index", "tasks": {task: {"exact_match", "constant_baseline", "num_test"}}}``, also
        written to ``RUN/evaluations``.

    Raises:
        FileNotFoundError: No such run, checkpoint or index.
        ValueError: No test index is known, or it is one of another tokenizer or tile size.
    """
    settings = read_settings(run)
    path = test_index or settings.data.test_index
    if path is None:
        raise ValueError(f"{run} names no test index: give one with --test-index, or set [data] test_index")
    index = Index.open(path)
    tokenizer = Tokenizer.load(run / "tokenizer")
    model, name = _model(run, checkpoint, world.device)
    config = model.config
    index.check_model(config.decoder.vocab_size, config.vision.tile_size, config.tokens_per_tile)
    evaluator = Evaluator(
        index,
        tokenizer,
        v2pe=answer_v2pe(settings.stage.v2pe),
        normalize=settings.data.normalize,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    answers = evaluator.run(model, world)
    result = {"checkpoint": name, "test_index": str(path), "tasks": summary(answers)}
    if world.is_main:
        folder = run / "evaluations"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        lines = (json.dumps({**asdict(answer), "correct": answer.correct}, ensure_ascii=False) for answer in answers)
        (folder / f"{name}.answers.jsonl").write_text("".join(f"{line}\n" for line in lines))
    world.barrier()
    return result


def _model(run: Path, checkpoint: str, device: torch.device) -> tuple[InternVL, str]:
    if checkpoint == INITIAL:
        settings = read_settings(run)
        source = open_source(settings.model, settings.seed)
        model = InternVL(source.config).to(device)
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, value in source.weights:
                parameters[name].copy_(value)
        return model.eval(), INITIAL
    path = newest_checkpoint(run) if checkpoint == "newest" else Path(checkpoint)
    return load_model(run, path, device), path.name
