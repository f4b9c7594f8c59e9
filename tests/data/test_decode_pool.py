"""Processes that decode: the same tiles, errors that name the sample, and an end with the rank, however it ends."""

import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evovlm.data import decode_pool
from evovlm.data.decode import DecodeOptions, TileJob
from evovlm.data.decode_pool import DecodePool, DecodingTime, InlineDecoder, WorkerDiedError
from evovlm.data.errors import Reason, SampleError
from evovlm.data.images import load_tiles
from evovlm.data.index_format import ImageRef
from evovlm.data.tile_buffers import TileBuffers

S = 28
OPTIONS = DecodeOptions(S, "clip", 1_000_000)
PATIENCE = 60.0  # seconds; a test that needs them fails

Decoder = DecodePool | InlineDecoder


def write_images(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (30 + i, 60, 3), dtype=np.uint8)).save(path)
    return paths


def job(path: Path, offset: int, begin: int = 0, end: int = 5, qualities: Sequence[int] | None = None) -> TileJob:
    name = f"chart/{path.stem}"
    return TileJob(name, str(path), -1, 2, 2, True, begin, end, list(qualities) if qualities else None, offset)


def submit(decoder: Decoder, buffers: TileBuffers, parts: Sequence[Any]) -> tuple[Any, "Future[DecodingTime]"]:
    """Decode (path, begin, end, qualities), one after the other in a new tensor."""
    tiles, offset = buffers.new_tiles(sum(end - begin for _, begin, end, _ in parts), S)
    jobs, where = [], offset
    for path, begin, end, qualities in parts:
        jobs.append(job(path, where, begin, end, qualities))
        where += (end - begin) * OPTIONS.tile_bytes
    return tiles, decoder.submit(jobs, tiles, offset)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def buffers() -> Iterator[TileBuffers]:
    made = TileBuffers()
    yield made
    made.close()


@pytest.fixture(params=[0, 1, 2])
def decoder(request: pytest.FixtureRequest, buffers: TileBuffers) -> Iterator[Decoder]:
    made = DecodePool(request.param, OPTIONS, buffers.file) if request.param else InlineDecoder(OPTIONS)
    yield made
    made.close()


@pytest.fixture
def pool(buffers: TileBuffers) -> Iterator[DecodePool]:
    made = DecodePool(1, OPTIONS, buffers.file)
    yield made
    made.close()


def test_tiles_are_those_of_this_process(decoder: Decoder, buffers: TileBuffers, tmp_path: Path) -> None:
    paths = write_images(tmp_path, 12)
    steps = []
    for size in (1, 12, 4):  # the shared memory grows after the workers have looked at it
        parts = [
            (path, i % 3, 5 - i % 2, range(75, 80 - i % 2 - i % 3) if i % 4 == 0 else None)
            for i, path in enumerate(paths[:size])
        ]
        steps.append((parts, *submit(decoder, buffers, parts)))
    for parts, tiles, future in steps:
        took = future.result(PATIENCE)
        assert took.seconds > 0
        assert took.cpu_seconds > 0
        expected = [
            load_tiles(
                ImageRef(path, -1, 2, 2, True, 5, 0), S, "clip", qualities and list(qualities), tiles=range(begin, end)
            )
            for path, begin, end, qualities in parts
        ]
        np.testing.assert_array_equal(tiles.numpy(), np.concatenate(expected))


def test_a_step_without_images_is_done_at_once(decoder: Decoder, buffers: TileBuffers) -> None:
    tiles, offset = buffers.new_tiles(0, S)
    assert decoder.submit([], tiles, offset).result(0) == DecodingTime()


def test_the_first_bad_image_of_a_step_is_its_error(decoder: Decoder, buffers: TileBuffers, tmp_path: Path) -> None:
    paths = write_images(tmp_path, 8)
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    paths[6].unlink()
    parts = [(path, 0, 1 if path == paths[3] else 5, None) for path in paths]  # the missing one is decoded first
    tiles, future = submit(decoder, buffers, parts)
    for bad, reason, text in ((3, Reason.BAD_IMAGE, "is truncated or damaged"), (6, Reason.MISSING_IMAGE, "not exist")):
        with pytest.raises(SampleError, match=text) as caught:
            future.result(PATIENCE)
        assert (caught.value.reason, caught.value.name) == (reason, f"chart/{bad}")
        assert str(caught.value) == f"sample 'chart/{bad}': {caught.value.detail}"
        assert f"{bad}." in caught.value.detail
        if bad == 3:
            good = load_tiles(ImageRef(paths[7], -1, 2, 2, True, 5, 0), S, "clip")
            np.testing.assert_array_equal(tiles.numpy()[-5:], good)  # the others were done
            _, future = submit(decoder, buffers, parts[4:])  # and the workers live on


def test_other_errors_are_named_too(decoder: Decoder, buffers: TileBuffers, tmp_path: Path) -> None:
    (path,) = write_images(tmp_path, 1)
    _, future = submit(decoder, buffers, [(path, 0, 6, None)])
    message = r"sample 'chart/0': decoding image '.*0.png' failed: ValueError: tiles 0 to 5 of an image of 5 tiles"
    with pytest.raises(RuntimeError, match=message):
        future.result(PATIENCE)


def pipe_image(folder: Path) -> Path:
    """An image that takes as long to read as somebody wants."""
    path = folder / "slow.png"
    os.mkfifo(path)
    return path


def test_a_killed_worker_is_an_error_that_names_the_sample(
    pool: DecodePool, buffers: TileBuffers, tmp_path: Path
) -> None:
    slow = pipe_image(tmp_path)
    _, future = submit(pool, buffers, [(slow, 0, 5, None)])
    _, later = submit(pool, buffers, [(path, 0, 5, None) for path in write_images(tmp_path, 3)])
    with slow.open("wb"):  # the worker has opened it
        os.kill(pool.processes[0], signal.SIGKILL)
        message = (
            rf"process {pool.processes[0]}, which decodes images, was killed by SIGKILL while decoding image "
            r"'.*slow.png' of sample 'chart/slow'; was the machine short of memory"
        )
        for each in (future, later):
            with pytest.raises(WorkerDiedError, match=message):
                each.result(PATIENCE)
    with pytest.raises(WorkerDiedError, match=message):
        submit(pool, buffers, [(slow, 0, 5, None)])


def test_one_of_two_workers_killed_is_an_error(buffers: TileBuffers, tmp_path: Path) -> None:
    pool = DecodePool(2, OPTIONS, buffers.file)
    slow = pipe_image(tmp_path)
    _, future = submit(pool, buffers, [(slow, 0, 5, None)])
    with slow.open("wb"):
        for process in pool.processes:
            os.kill(process, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="was killed by SIGKILL"):
            future.result(PATIENCE)
    pool.close()


def test_a_dead_worker_is_missed_though_others_hold_its_socket(
    buffers: TileBuffers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when this process was forked while the worker was started."""
    kept = []
    socketpair = socket.socketpair

    def keep(*args: Any) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socketpair(*args)
        kept.append(theirs.dup())
        return ours, theirs

    monkeypatch.setattr(decode_pool.socket, "socketpair", keep)
    monkeypatch.setattr(decode_pool, "_PATIENCE", 0.05)
    pool = DecodePool(2, OPTIONS, buffers.file)
    slow = pipe_image(tmp_path)
    _, future = submit(pool, buffers, [(slow, 0, 5, None)])
    with slow.open("wb"):
        os.kill(pool.processes[0], signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match=rf"process {pool.processes[0]}, .* was killed by SIGKILL"):
            future.result(PATIENCE)
        pool.close()
    for each in kept:
        each.close()


def test_a_worker_that_cannot_start_is_an_error(
    buffers: TileBuffers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_pool.sys, "executable", "/bin/false")
    pool = DecodePool(1, OPTIONS, buffers.file)
    with pytest.raises(WorkerDiedError, match="ended with exit code 1 while idle"):
        submit(pool, buffers, [(write_images(tmp_path, 1)[0], 0, 5, None)])[1].result(PATIENCE)
    pool.close()


def test_signals_to_the_group_do_not_reach_workers(pool: DecodePool, buffers: TileBuffers, tmp_path: Path) -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for number in signals:  # while it starts
        os.kill(pool.processes[0], number)
    (path,) = write_images(tmp_path, 1)
    slow = pipe_image(tmp_path)
    tiles, future = submit(pool, buffers, [(slow, 0, 5, None)])
    with slow.open("wb") as file:
        for number in signals:  # while it decodes
            os.kill(pool.processes[0], number)
        file.write(path.read_bytes())
    future.result(PATIENCE)
    np.testing.assert_array_equal(tiles, load_tiles(ImageRef(path, -1, 2, 2, True, 5, 0), S, "clip"))


def test_signals_of_this_thread_stay_as_they_were(buffers: TileBuffers) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        DecodePool(1, OPTIONS, buffers.file).close()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_closing_ends_workers_that_are_busy_and_leaves_nothing(tmp_path: Path) -> None:
    gc.collect()
    files = open_files()
    buffers = TileBuffers()
    pool = DecodePool(2, OPTIONS, buffers.file)
    slow = pipe_image(tmp_path)
    tiles, future = submit(
        pool, buffers, [(slow, 0, 5, None), *((path, 0, 5, None) for path in write_images(tmp_path, 3))]
    )
    with slow.open("wb"):
        assert all(is_alive(process) for process in pool.processes)
        pool.close()
    del tiles  # a mapping keeps a file number
    buffers.close()
    assert not any(is_alive(process) for process in pool.processes)
    assert not future.done()
    assert open_files() == files
    assert list(Path("/dev/shm").glob("*evovlm*")) == []


def _rank(pids: Any, slow: Path) -> None:
    buffers = TileBuffers()
    pool = DecodePool(2, OPTIONS, buffers.file)
    submit(pool, buffers, [(slow, 0, 5, None)])
    pids.send(pool.processes)
    time.sleep(PATIENCE)


def test_workers_end_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    slow = pipe_image(tmp_path)
    ours, theirs = multiprocessing.Pipe()
    # Daemonic, as the ranks of `run_ranks`: multiprocessing forbids those to have children of its own kind.
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(theirs, slow), daemon=True)
    rank.start()
    with slow.open("wb"):
        processes = ours.recv()
        rank.kill()
        rank.join()
    deadline = time.monotonic() + PATIENCE
    while any(is_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [process for process in processes if is_alive(process)] == []


def test_workers_import_neither_torch_nor_pydantic() -> None:
    code = "import json, sys, evovlm.data.decode_worker, evovlm.data.decode; print(json.dumps(list(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert {"numpy", "PIL.Image"} <= set(modules)
    assert not {"torch", "pydantic"} & set(modules)


@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_chunks_hold_every_job_once_and_the_largest_go_first(num_workers: int) -> None:
    path = Path("a.png")
    for sizes in ([1] * 200, [13] * 3 + [1] * 30, [1, 13, 2, 5, 1, 1, 9] * 9, [4]):
        jobs = [job(path, 0, 0, size) for size in sizes]
        chunks = list(decode_pool._split(jobs, num_workers))
        assert sorted(n for chunk in chunks for n in chunk) == list(range(len(jobs)))
        tiles = [sum(sizes[n] for n in chunk) for chunk in chunks]
        assert tiles == sorted(tiles, reverse=True)
        limit = min(8, sum(sizes) // (4 * num_workers))
        assert all(len(chunk) == 1 or count <= limit for chunk, count in zip(chunks, tiles, strict=True))
        if max(sizes) == 1:
            assert len(chunks) >= 4 * num_workers
