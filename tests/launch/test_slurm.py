"""``evovlm submit``: what is written into the script, what is refused, and a real SLURM of two nodes that trains."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evovlm.engine.settings import RunSettings
from evovlm.engine.trainer import train
from evovlm.launch import cli, slurm
from evovlm.launch.settings import find_recipe, load_settings
from evovlm.parallel.fork import run_ranks

from .slurm.cluster import Cluster, why_not
from .slurm.small_run import build_small_run

JOB = slurm.Job(nodes=2, ranks_per_node=4, cpus_per_task=24, name="mine", options={})
FIRST = ["quickstart/pretrain", "--nodes", "2"]
WORDS = st.text(st.characters(min_codepoint=32, exclude_categories=["C", "Z"], include_characters=" "), max_size=12)


def directives(script: str) -> dict[str, str]:
    """Read ``#SBATCH`` lines back as sbatch does: words in double quotes, backslashes escape."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    found = {}
    for line in lines:
        key, _, value = line.partition("=")
        (found[key],) = shlex.split(value) or [""]
    return found


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["submit", *words, "--print"]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is said about a user's mistake."""
    assert cli.main(["submit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("evovlm: ")


def test_what_is_asked_of_slurm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = printed(
        capsys,
        *("quickstart/sft", "--nodes", "16", "--gpus-per-node", "8", "--cpus-per-task", "96", "--time", "1-00:00:00"),
        *("--partition", "big,small", "--account", "us", "--sbatch", "mem=0", "--sbatch", "exclusive"),
        *("--out", str(tmp_path / "run"), "--optim.lr", "1e-5"),
    )
    assert directives(script) == {
        "job-name": "run",
        "nodes": "16",
        "ntasks-per-node": "1",
        "cpus-per-task": "96",
        "gpus-per-node": "8",
        "time": "1-00:00:00",
        "partition": "big,small",
        "account": "us",
        "chdir": str(Path.cwd()),
        "output": f"{tmp_path}/run/logs/%j.txt",
        "open-mode": "append",
        "mem": "0",
        "exclusive": "",
    }
    assert "--nproc-per-node 8 " in script
    assert "srun --nodes=16 --ntasks-per-node=1 --cpus-per-task=96 --kill-on-bad-exit=1" in script
    assert "export OMP_NUM_THREADS=12\n" in script
    assert f"\npython={sys.executable}\n" in script
    assert f"\ntrain=(train quickstart/sft --out {tmp_path}/run --optim.lr 1e-5)\n" in script
    assert not (tmp_path / "run").exists()


def test_defaults_come_from_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, *FIRST)
    asked = directives(script)
    assert "--nproc-per-node 2 " in script  # its `ranks`
    assert asked["cpus-per-task"] == "2"  # it decodes in the ranks
    assert asked["job-name"] == "pretrain"
    assert not {"gpus-per-node", "time", "partition", "account"} & set(asked)


def test_a_recipes_file_is_named_whole(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Path(slurm.__file__).parent / "recipes" / "quickstart"
    for file in shipped.glob("*.toml"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    assert f"train=(train {tmp_path}/sft.toml)" in printed(capsys, "sft.toml", "--nodes", "1")


@given(WORDS, WORDS, st.lists(WORDS, max_size=3))
def test_any_word_survives(name: str, comment: str, overrides: list[str]) -> None:
    """Bash and sbatch each read back what was meant, and nothing of it is run."""
    job = slurm.Job(nodes=1, ranks_per_node=1, cpus_per_task=1, name=name, options={"comment": comment})
    folder = Path("runs") / (name.replace("/", "").replace("\\", "") or "x")
    script = slurm.render(job, folder, "no/recipe", overrides, python="/a b/python")
    asked = directives(script)
    assert (asked["job-name"], asked["comment"]) == (name, comment)
    assert asked["output"].replace("%%", "%") == f"{Path.cwd() / folder}/logs/%j.txt"
    beginning = script[: script.index("# All ranks meet")] + 'printf "%s\\0" "$python" "$logs" "${train[@]}"'
    done = subprocess.run(["bash", "-c", beginning], env={"SLURM_JOB_ID": "7"}, capture_output=True, check=True)
    said = done.stdout.decode().split("\0")[:-1]
    assert said == ["/a b/python", f"{Path.cwd() / folder}/logs/7", "train", "no/recipe", *overrides]


def test_script_is_bash(capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["bash", "-n"], input=printed(capsys, *FIRST), text=True, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such.toml", "--nodes", "2"], "no recipe at no/such.toml; evovlm brings along: "),
        ([*FIRST, "--optim.lrr", "1"], "command line: unknown key 'optim.lrr'; the nearest valid key is 'optim.lr'"),
        ([*FIRST, "--ranks", "4"], "--ranks counts processes of this machine; on a cluster give --ranks-per-node"),
        (
            [*FIRST, "--gpus-per-node=4", "--ranks-per-node=8"],
            "8 ranks per node on 4 GPUs per node; a rank needs a GPU",
        ),
        ([*FIRST, "--sbatch", "time=5"], "--sbatch time=5: evovlm submit has an option for it: --time"),
        ([*FIRST, "--sbatch", "-N=5"], "--sbatch -N=5: evovlm submit has an option for it: --nodes"),
        ([*FIRST, "--sbatch", "array=0-9"], "--sbatch array=0-9: evovlm sets 'array' itself"),
        ([*FIRST, "--sbatch", "a b=0"], "--sbatch a b=0: expected a long option of sbatch"),
        ([*FIRST, "--sbatch", "mem=0", "--sbatch", "mem=1"], "--sbatch mem=1: 'mem' is given twice"),
        ([*FIRST, "--job-name", "a\nrm -r x"], r"'a\nrm -r x' holds a line break or another control character"),
        ([*FIRST, "--out", "a\\b"], f"{Path.cwd()}/a\\b/logs holds a backslash"),
    ],
)
def test_mistakes_show_at_once(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *words, "--print").startswith(message)


def test_no_sbatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(capsys, *FIRST).startswith("there is no sbatch on this machine: submit where SLURM's commands are")


@pytest.fixture
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps what it gets and says what ``answer`` holds."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/received\n. {tmp_path}/answer\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("answer", ["42", "42;far_cluster"])
def test_submitted_script_is_kept(fake_sbatch: Path, answer: str) -> None:
    (fake_sbatch / "answer").write_text(f"echo '{answer}'")
    script = slurm.render(JOB, fake_sbatch / "run", "quickstart/sft", [])
    assert slurm.submit(script, fake_sbatch / "run") == 42
    assert (fake_sbatch / "received").read_text() == script
    assert (fake_sbatch / "run" / "logs" / "42.sbatch").read_text() == script


def test_sbatch_says_no(fake_sbatch: Path) -> None:
    (fake_sbatch / "answer").write_text("echo 'invalid partition specified: x' >&2; exit 1")
    with pytest.raises(slurm.SlurmError, match=r"refuses the job \(exit code 1\): invalid partition specified: x$"):
        slurm.submit("script", fake_sbatch / "run")
    assert not list((fake_sbatch / "run" / "logs").iterdir())


def test_data_is_checked_before_it_waits(
    fake_sbatch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fake_sbatch)
    (fake_sbatch / "answer").write_text("echo 42")
    assert "runs/quickstart/data/tokenizer" in refused(capsys, *FIRST)
    assert not (fake_sbatch / "received").exists()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=2) as started:
        yield started


@pytest.mark.slurm
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_two_nodes_train_as_one_machine_does(
    cluster: Cluster,
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, *words = build_small_run(tmp_path, tiny_tokenizer_dir)
    logs = tmp_path / "two nodes" / "logs"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])

    def submit(ranks_per_node: int, *more: str) -> tuple[int, str, str]:
        """Submit, wait, and return the job's number, its state and its output."""
        asked = ["--nodes=2", f"--ranks-per-node={ranks_per_node}", "--cpus-per-task=2"]
        capsys.readouterr()
        assert cli.main(["submit", recipe, *words, "--out=two nodes", *asked, *more]) == 0
        said = capsys.readouterr().out
        match = re.match(rf"submitted job (\d+): 2 nodes × {ranks_per_node} ranks\n", said)
        assert match, said
        job = int(match[1])
        assert f"  script  two nodes/logs/{job}.sbatch\n  output  two nodes/logs/{job}.txt\n" in said
        assert (logs / f"{job}.sbatch").is_file()
        state = cluster.wait_for(job, seconds=400)
        return job, state, (logs / f"{job}.txt").read_text()

    def losses(run: str) -> list[float]:
        records = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if "loss" in record]

    job, state, output = submit(2)
    assert state == "COMPLETED", output
    assert output.startswith(f"2 nodes (n1 n2) × 2 ranks meet at 127.0.0.1:{20000 + job}; logs of each rank: {logs}")
    files = sorted((logs / str(job)).rglob("stdout.log"))
    places = [(file.relative_to(logs / str(job)).parts[0], file.parent.name) for file in files]
    assert places == [("node0", "0"), ("node0", "1"), ("node1", "0"), ("node1", "1")]
    told = files[0].read_text().splitlines()
    assert any("3 steps of 4 packs" in line for line in told)
    assert {f"rank 0: {line}" for line in told} <= set(output.splitlines())

    settings = load_settings(RunSettings, find_recipe(recipe), [*words, "--out=one machine"])
    run_ranks(4, lambda world: train(settings, world), timeout=400)
    assert len(losses("two nodes")) == 3
    assert losses("two nodes") == losses("one machine")

    # The checkpoint was trained on the data of another seed: the ranks refuse, the job ends and says why.
    _, state, output = submit(1, "--seed=1")
    assert state == "FAILED", output
    assert "does not belong to this run: seed is 0 there, 1 here" in output
