"""Measures the loader against a plain loop over the same images, and what an index of millions of samples costs.

    JPEGs of about a megapixel ─► index ─► loader, workers decode ahead ──► images/s of each worker ─┐
                                    └────► for image in the same steps: decode, cut, normalise ──────┴► ratio

The clock runs from one step's arrival to another's, when as much has been made ahead at both. A plain loop then decodes
the images of the steps between, into one array that it uses again and again: the fastest loop that there is. Against
several workers stand as many such loops, side by side in processes of their own, since cores share caches, memory and,
as hyperthreads, themselves. Where other programs run, they slow both; the ratio of processor times suffers least. It
counts everything that the loader does: decoding in workers, and planning, tokens and messages in this process.
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from evovlm.csrc.random import keys, uniform
from evovlm.data.build_index import build_index
from evovlm.data.images import load_tiles
from evovlm.data.index import Index
from evovlm.data.index_format import ImageRef
from evovlm.data.index_settings import IndexSettings
from evovlm.data.loader import Loader, LoaderSettings
from evovlm.data.mixture import Mixture, MixtureSettings
from evovlm.data.plan import Planner
from evovlm.data.plan_settings import PlanSettings
from evovlm.data.step_plan import DataLayout
from evovlm.data.tokenizer import Tokenizer
from evovlm.data.tokenizer_training import build_tokenizer
from evovlm.launch.report import make_report
from evovlm.parallel.fork import run_ranks
from evovlm.parallel.world import World

_ASPECTS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (3, 1))


@dataclass(frozen=True)
class Mix:
    """The data and the steps that are measured.

    Attributes:
        images: files, each a sample of its own.
        pixels: of an image, about; half of it to one and a half times it.
        tile_size: side of a tile in pixels.
        max_tiles: most tiles of an image, without the thumbnail.
        packs_per_step: packs of a step.
        pack_tiles: most tiles of a pack.
        warm_steps: steps before the clock runs.
        steps: steps that are timed.
        prefetch: steps made ahead.
    """

    images: int = 64
    pixels: int = 1_000_000
    tile_size: int = 448
    max_tiles: int = 12
    packs_per_step: int = 2
    pack_tiles: int = 48
    warm_steps: int = 10
    steps: int = 12
    prefetch: int = 2


def draw_image(number: int, pixels: int) -> Image.Image:
    """Draw a picture with large shapes and small detail, as a photograph has; its number decides its size and shape."""
    wide, high = _ASPECTS[number % len(_ASPECTS)]
    scale = (pixels * (0.5 + float(uniform(keys("bench_loader", "size", number)))) / (wide * high)) ** 0.5
    size = (round(wide * scale), round(high * scale))
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for octave, share in ((6, 0.6), (40, 0.25), (200, 0.15)):
        values = 255 * uniform(keys("bench_loader", "pixels", number, octave, np.arange(octave * octave * 3)))
        coarse = Image.fromarray(values.reshape(octave, octave, 3).astype(np.uint8))
        picture += np.float32(share) * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray(picture.astype(np.uint8))


def write_data(folder: Path, mix: Mix) -> tuple[Index, Tokenizer]:
    """Write images, annotations and tokenizer, and index them."""
    lines = []
    for number in range(mix.images):
        draw_image(number, mix.pixels).save(folder / f"{number}.jpg", quality=90)
        turns = [("human", "<image>\nWhat is this?"), ("gpt", "A picture.")]
        talk = [{"from": speaker, "value": text} for speaker, text in turns]
        lines.append(json.dumps({"image": f"{number}.jpg", "conversations": talk}) + "\n")
    (folder / "images.jsonl").write_text("".join(lines), encoding="utf-8")
    meta = {"images": {"root": str(folder), "annotation": str(folder / "images.jsonl"), "data_augment": False}}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    tokenizer = build_tokenizer(["What is this? A picture."], folder / "tokenizer", vocab_size=384)
    settings = IndexSettings(
        meta=folder / "meta.json",
        tokenizer=tokenizer,
        out=folder / "index",
        tile_size=mix.tile_size,
        max_tiles=mix.max_tiles,
        num_workers=1,
    )
    build_index(settings)
    return Index.open(folder / "index"), Tokenizer.load(tokenizer)


def measure(index: Index, tokenizer: Tokenizer, mix: Mix, workers: int) -> dict[str, Any]:
    """Load steps, then decode the same images in plain loops, as many as there are workers.

    Args:
        index: of ``write_data``.
        tokenizer: of ``write_data``.
        mix: how many steps, and of what size.
        workers: processes that decode for the loader.

    Returns:
        Images and tiles of the steps; seconds, processor seconds of the loader; means of both over the plain loops,
        each of which decodes all images; memory of the loader's tiles and what bounds it.
    """
    planner = Planner(
        index,
        Mixture(index, MixtureSettings(language_ratio=None), 0),
        PlanSettings(packs_per_step=mix.packs_per_step, pack_tiles=mix.pack_tiles, window=max(mix.images, 16)),
    )
    loader = Loader(
        index,
        planner,
        DataLayout(1, mix.packs_per_step),
        0,
        0,
        image_context=tokenizer.image_context,
        padding=tokenizer.end_of_text,
        settings=LoaderSettings(num_workers=workers, prefetch=mix.prefetch),
    )
    refs: list[ImageRef] = []
    cpu = largest = tiles = buffers = buffer_bytes = 0.0
    steps = loader.steps()
    for _ in range(mix.warm_steps):
        next(steps)
    began, own_cpu, waited = time.perf_counter(), time.process_time(), loader.total_wait_seconds
    for _ in range(mix.steps):
        plan, batch = next(steps)
        refs += [ref for sample in plan.packs.samples.tolist() for ref in index.image_refs(sample)]
        largest = max(largest, batch.tiles.nbytes)
        timings = loader.timings
        assert timings is not None
        cpu += timings.decoding_cpu
        tiles += timings.tiles
        buffers, buffer_bytes = max(buffers, timings.buffers), max(buffer_bytes, timings.buffer_bytes)
    seconds, own_cpu = time.perf_counter() - began, time.process_time() - own_cpu
    waited = loader.total_wait_seconds - waited
    steps.close()
    loops = run_ranks(workers, lambda world: plain_loop(world, refs, mix), timeout=3600.0)
    return {
        "images": len(refs),
        "tiles": int(tiles),
        "seconds": seconds,
        "waited_s": waited,
        "worker_cpu_s": cpu,
        "rank_cpu_s": own_cpu,
        "plain_seconds": statistics.mean(loop[0] for loop in loops),
        "plain_cpu_s": statistics.mean(loop[1] for loop in loops),
        "plain_tiles": loops[0][2],
        "buffers": int(buffers),
        "tile_memory_mb": buffer_bytes / 1e6,
        "tile_memory_bound_mb": (mix.prefetch + 2) * largest / 1e6,
    }


def plain_loop(world: World, refs: list[ImageRef], mix: Mix) -> tuple[float, float, int]:
    """Decode images one after the other; returns seconds, processor seconds and tiles."""
    room = np.full((mix.max_tiles + 1, 3, mix.tile_size, mix.tile_size), np.float32(1))
    tiles = 0
    world.barrier()
    began, cpu_began = time.perf_counter(), time.thread_time()
    for ref in refs:
        tiles += len(load_tiles(ref, mix.tile_size, out=room[: ref.num_tiles]))
    return time.perf_counter() - began, time.thread_time() - cpu_began, tiles


def summarize(workers: int, repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the repetitions of one number of workers together: rates and ratios are medians over them.

    Returns:
        ``images_per_s_per_core`` of a worker, ``plain_loop_images_per_s`` of a loop, their ``ratio``; ``cpu_ratio``: a
        plain loop's processor time to the loader's, planning and messages included; the most memory of tiles, and
        the bound that the number of buffers sets; and the repetitions.
    """

    def median(values: list[float]) -> float:
        return statistics.median(values)

    rates = [r["images"] / r["seconds"] / workers for r in repetitions]
    plain = [r["images"] / r["plain_seconds"] for r in repetitions]
    return {
        "workers": workers,
        "images_per_s_per_core": median(rates),
        "plain_loop_images_per_s": median(plain),
        "ratio": median([rate / other for rate, other in zip(rates, plain, strict=True)]),
        "cpu_ratio": median([r["plain_cpu_s"] / (r["worker_cpu_s"] + r["rank_cpu_s"]) for r in repetitions]),
        "worker_cpu_ms_per_image": median([1e3 * r["worker_cpu_s"] / r["images"] for r in repetitions]),
        "rank_cpu_ms_per_image": median([1e3 * r["rank_cpu_s"] / r["images"] for r in repetitions]),
        "plain_cpu_ms_per_image": median([1e3 * r["plain_cpu_s"] / r["images"] for r in repetitions]),
        "tile_memory_mb": max(r["tile_memory_mb"] for r in repetitions),
        "tile_memory_bound_mb": max(r["tile_memory_bound_mb"] for r in repetitions),
        "repetitions": repetitions,
    }


def run(
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file to write.")] = None,
    images: Annotated[int, typer.Option(min=16, help="Image files to make.")] = 64,
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Processes that decode; may be repeated.")] = None,
    index_samples: Annotated[int, typer.Option(min=0, help="Samples of the large index; 0: none.")] = 10_000_000,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each way is timed.")] = 3,
) -> dict[str, Any]:
    """Measure the loader and print tables."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from evovlm.launch.bench_index import measure_index
    from evovlm.launch.bench_index import rows as index_rows

    mix = Mix(images=images)
    counts = workers or [1, 2]
    measured: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        index, tokenizer = write_data(Path(folder), mix)
        for _ in range(repetitions):
            for count in counts:
                measured[count].append(measure(index, tokenizer, mix, count))
        decode = [summarize(count, measured[count]) for count in counts]
        large = measure_index(Path(folder, "large"), index_samples) if index_samples else None
    report = make_report("loader", {"mix": asdict(mix), "decode": decode, "index": large}, json_file)
    table = Table("workers", box=SIMPLE_HEAD, caption=f"tiles of {mix.tile_size} pixels; {report['machine']['cpu']}")
    for heading in ("images/s per worker", "plain loop", "ratio", "ratio of CPU time", "tile memory", "bound"):
        table.add_column(heading, justify="right")
    for line in decode:
        memory = [f"{line[name]:,.0f} MB" for name in ("tile_memory_mb", "tile_memory_bound_mb")]
        table.add_row(
            str(line["workers"]),
            f"{line['images_per_s_per_core']:.1f}",
            f"{line['plain_loop_images_per_s']:.1f}",
            f"{line['ratio']:.2f}",
            f"{line['cpu_ratio']:.2f}",
            *memory,
        )
    console = Console()
    console.print(table)
    if large is not None:
        table = Table("index", "", box=SIMPLE_HEAD)
        for row in index_rows(large):
            table.add_row(*row)
        console.print(table)
    return report
