"""The commands under ``evovlm bench``: each measures one part side by side with its alternatives."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

bench_app = typer.Typer(
    help="Measure a part side by side with its alternatives; results as a table and, with --json, as a file.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
JsonFile = Annotated[Path | None, typer.Option("--json", help="JSON file to write, too.")]


@bench_app.command("exchange")
def bench_exchange(
    json_file: JsonFile = None,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks to fork, a power of two.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 5,
) -> None:
    """Bytes and times of the vision exchange, an all-gather, and two exchanges."""
    from evovlm.launch import bench_exchange

    bench_exchange.run(json_file, ranks, repetitions)


@bench_app.command("overlap")
def bench_overlap(
    json_file: JsonFile = None,
    out: Annotated[Path | None, typer.Option("--out", help="Chrome trace to write.")] = None,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks to fork: 2 or 4.")] = 2,
) -> None:
    """How far the gathers of weights lie under computation, from a trace."""
    from evovlm.launch import bench_overlap

    bench_overlap.run(out, json_file, ranks)


@bench_app.command("packing")
def bench_packing(
    json_file: JsonFile = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to pack.")] = 1_000_000,
    repetitions: Annotated[int, typer.Option(min=1, help="How often ours is timed.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=16_384, help="Most tokens of a pack.")] = 16_384,
    max_tiles: Annotated[int, typer.Option(min=32, help="Most tiles of a pack.")] = 48,
    window: Annotated[int, typer.Option(min=1, help="Samples packed together by ours.")] = 65_536,
) -> None:
    """Fill and speed of packing, beside other algorithms."""
    from evovlm.launch import bench_packing

    bench_packing.run(json_file, samples, repetitions, max_tokens, max_tiles, window)


@bench_app.command("balance")
def bench_balance(
    json_file: JsonFile = None,
    real: Annotated[
        bool, typer.Option("--real", help="Train on 2 and 4 gloo ranks instead, with balance on and off (minutes).")
    ] = False,
    packs_per_rank: Annotated[int, typer.Option(min=1, help="Packs of each simulated rank in a step.")] = 8,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="How often everything is timed; by default 9, or 3 with --real.")
    ] = None,
) -> None:
    """Largest load over the mean for LLM and ViT, at up to 2,560 simulated ranks or on real ones."""
    from evovlm.launch import bench_balance, bench_balance_real

    if real:
        bench_balance_real.run(json_file, repetitions=repetitions or 3)
    else:
        bench_balance.run(json_file, packs_per_rank=packs_per_rank, repetitions=repetitions or 9)


@bench_app.command("loader")
def bench_loader(
    json_file: JsonFile = None,
    images: Annotated[int, typer.Option(min=16, help="Image files to make.")] = 64,
    workers: Annotated[
        list[int] | None, typer.Option(min=1, help="Processes that decode; repeatable. Default: 1 and 2.")
    ] = None,
    index_samples: Annotated[int, typer.Option(min=0, help="Samples of the large index; 0: none.")] = 10_000_000,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 3,
) -> None:
    """Images a second beside a plain loop, and time and memory of an index of ten million samples."""
    from evovlm.launch import bench_loader

    bench_loader.run(json_file, images, workers, index_samples, repetitions)


@bench_app.command("train")
def bench_train(
    json_file: JsonFile = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Compare our own step with images and without, instead.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of different samples.")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each step is timed in each way.")] = 2,
    zero: Annotated[int, typer.Option(min=1, max=3, help="ZeRO level of ours.")] = 1,
    batch: Annotated[int, typer.Option(min=2, help="Samples of a padded batch of a baseline.")] = 4,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Baseline to train, such as ddp-one-eager; repeatable. Default: all.")
    ] = None,
) -> None:
    """A training step beside transformers under DDP and FSDP2, on 2 ranks (minutes)."""
    from evovlm.launch import bench_train

    settings = bench_train.Settings(
        steps=steps,
        repetitions=repetitions,
        zero=cast(Any, zero),
        batch=batch,
        baselines=None if baseline is None else tuple(baseline),
    )
    bench_train.run(json_file, settings, text_only=text_only)


@bench_app.command("mpo")
def bench_mpo(
    json_file: JsonFile = None,
    pairs: Annotated[int, typer.Option(min=4, help="Preference pairs of an epoch, a multiple of 4.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 2,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=4, help="Pairs of a forward pass of TRL's; repeatable: the best of them. [1, 2, 4]"),
    ] = None,
    trl: Annotated[bool, typer.Option("--trl/--no-trl", help="Compare with TRL's DPOTrainer.")] = True,
) -> None:
    """Mixed preference optimisation beside TRL's DPOTrainer, and what each idea gains (minutes)."""
    from evovlm.launch import bench_mpo
    from evovlm.launch.bench_mpo_pairs import Task

    batches = (1, 2, 4) if batch is None else tuple(batch)
    settings = bench_mpo.Settings(repetitions=repetitions, batches=batches, trl=trl)
    bench_mpo.run(json_file, Task(num_pairs=pairs), settings)


@bench_app.command("score")
def bench_score(
    json_file: JsonFile = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions with images.")] = 4,
    candidates: Annotated[int, typer.Option("-n", "--candidates", min=1, help="Solutions of each question.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 2,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Candidates of a batch of transformers'; repeatable: the best of them. [2, 4, 8]"),
    ] = None,
) -> None:
    """Candidates scored by a critic beside transformers on the same weights, and what each idea gains (minutes)."""
    from evovlm.launch import bench_score
    from evovlm.launch.bench_score_task import Task

    settings = bench_score.Settings(repetitions, (2, 4, 8) if batch is None else tuple(batch))
    bench_score.run(json_file, Task(num_questions=questions, num_candidates=candidates), settings)


@bench_app.command("ops")
def bench_ops(
    json_file: JsonFile = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Operators whose names begin so; repeatable. Default: all.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default as many as there are cores.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way has its turn, at most.")] = 15,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the compositions, too.")] = True,
) -> None:
    """Each operator beside PyTorch's operators, compiled ones, and what the machine can do."""
    from evovlm.launch import bench_ops

    bench_ops.run(json_file, only or (), threads, repetitions, compiled=compiled)
