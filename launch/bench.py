"""Measures the machine at hand, part by part; ``make bench`` runs it.

| name | what is timed |
|---|---|
| `command` | `evovlm --help`, from start to end of the process |
| `matmul` | a float32 matrix product on all cores (or the GPU): what the model's numbers can be held against |
| `tiles` | a 1024 × 768 JPEG, decoded and cut into nine 448-pixel tiles and a thumbnail |
| `forward`, `training` | the `tiny` model on one pack of 2,048 tokens and 16 tiles: forward; forward and backward |

Run one with `python -m evovlm.launch.bench NAME`.
"""

import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from evovlm.launch.doctor import cpu_model
from evovlm.launch.ranks import num_cores

Work = Callable[[], object]
NUM_TOKENS = 2048


@dataclass(frozen=True)
class Measurement:
    """One line of the result.

    Attributes:
        name: what was measured.
        value: the rate, or the time.
        unit: of ``value``.
        seconds: median time of one repetition.
        spread: (slowest - fastest) / median of the repetitions.
        repetitions: how many were timed, after one that was not.
    """

    name: str
    value: float
    unit: str
    seconds: float
    spread: float
    repetitions: int


def command(repetitions: int) -> list[Measurement]:
    """Time the command line's start."""
    call = [sys.executable, "-m", "evovlm.launch", "--help"]
    seconds = _time(lambda: subprocess.run(call, check=True, capture_output=True), repetitions)
    return [_measurement("command", 1e3, "ms", seconds, inverse=True)]


def matmul(repetitions: int) -> list[Measurement]:
    """Time a square matrix product."""
    import torch

    device, size = _device(), 2048
    left, right = torch.randn(2, size, size, device=device, generator=torch.Generator(device).manual_seed(0))

    def work() -> None:
        torch.mm(left, right)
        _wait(device)

    return [_measurement("matmul", 2 * size**3 / 1e9, "GFLOP/s", _time(work, repetitions))]


def tiles(repetitions: int) -> list[Measurement]:
    """Time decoding and tiling of a photograph-like JPEG."""
    import numpy as np
    from PIL import Image

    from evovlm.csrc.random import keys, uniform
    from evovlm.data.images import load_tiles
    from evovlm.data.index_format import ImageRef

    coarse = (255 * uniform(keys("bench", "image", np.arange(96 * 128 * 3)))).astype(np.uint8).reshape(96, 128, 3)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.jpg")
        path.write_bytes(buffer.getvalue())
        ref = ImageRef(path=path, frame=-1, cols=3, rows=3, thumbnail=True, num_tiles=10, insert_at=0)
        seconds = _time(lambda: load_tiles(ref, 448), repetitions)
    return [_measurement("tiles", 10, "tiles/s on one core", seconds)]


def model(repetitions: int) -> list[Measurement]:
    """Time the tiny model on one pack."""
    import torch

    from evovlm.models.init import initial_value
    from evovlm.models.internvl import InternVL
    from evovlm.models.table import size

    device, config, num_tokens, num_tiles = _device(), size("tiny"), NUM_TOKENS, NUM_TOKENS // 128
    with torch.device("meta"):
        net = InternVL(config)
    net = net.to_empty(device=device)
    for name, parameter in net.named_parameters():
        parameter.data.copy_(initial_value(name, parameter.shape, config, 0))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.decoder.vocab_size, (num_tokens,), generator=generator).to(device)
    tile = torch.randn(num_tiles, 3, config.vision.tile_size, config.vision.tile_size, generator=generator).to(device)
    rows = torch.arange(num_tiles * config.tokens_per_tile, device=device)
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    borders = torch.tensor([0, num_tokens // 2, num_tokens], dtype=torch.int32)

    def forward() -> torch.Tensor:
        logits: torch.Tensor = net(tokens, positions, borders, tile, rows)
        _wait(device)
        return logits

    def training() -> None:
        loss = torch.nn.functional.cross_entropy(net(tokens, positions, borders, tile, rows), tokens)
        torch.autograd.grad(loss, list(net.parameters()))
        _wait(device)

    with torch.no_grad():
        forward_seconds = _time(forward, repetitions)
    return [
        _measurement("forward", num_tokens, "tokens/s", forward_seconds),
        _measurement("training", num_tokens, "tokens/s", _time(training, repetitions)),
    ]


BENCHMARKS: dict[str, Callable[[int], list[Measurement]]] = {
    "command": command,
    "matmul": matmul,
    "tiles": tiles,
    "model": model,
}


def machine() -> dict[str, Any]:
    """Return the hardware and the versions that numbers belong to."""
    import importlib.metadata

    import torch

    names = ("evovlm", "torch", "numpy", "pillow")
    return {
        "cpu": f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        **{name: importlib.metadata.version(name) for name in names},
    }


def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"Some of: {', '.join(BENCHMARKS)}; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="How often each is timed.")] = 7,
) -> None:
    """Measure and print a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    for name in names or ():
        if name not in BENCHMARKS:
            raise typer.BadParameter(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    results = [line for name in names or BENCHMARKS for line in BENCHMARKS[name](repetitions)]
    about = machine()
    table = Table("what", box=SIMPLE_HEAD, caption=", ".join(f"{key} {value}" for key, value in about.items() if value))
    for heading in ("value", "unit", "median", "spread"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for line in results:
        table.add_row(line.name, f"{line.value:,.4g}", line.unit, f"{line.seconds * 1e3:,.1f} ms", f"{line.spread:.0%}")
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": about, "results": [asdict(line) for line in results]}
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _time(work: Work, repetitions: int) -> list[float]:
    work()  # warm-up
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _measurement(name: str, amount: float, unit: str, seconds: list[float], *, inverse: bool = False) -> Measurement:
    middle = statistics.median(seconds)
    value = amount * middle if inverse else amount / middle
    return Measurement(name, value, unit, middle, (max(seconds) - min(seconds)) / middle, len(seconds))


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


if __name__ == "__main__":
    typer.run(run)
