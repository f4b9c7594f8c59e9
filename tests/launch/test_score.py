"""``evovlm score``: from the command line to the scored file, and one line for each mistake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evovlm.data.candidates import CandidateSet, read_candidates
from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.equality import SMALL, make_weights
from evovlm.launch import cli
from evovlm.models.hf.save import save_pretrained

pytestmark = pytest.mark.usefixtures("no_process_group")


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published directory of a very small model."""
    vocab_size = Tokenizer.load(tiny_tokenizer_dir).vocab_size
    config = replace(SMALL, decoder=replace(SMALL.decoder, vocab_size=vocab_size))
    out = tmp_path_factory.mktemp("model") / "small"
    weights = ((name, value.float()) for name, value in make_weights(config))
    save_pretrained(config, weights, out, tokenizer_dir=tiny_tokenizer_dir)
    return out


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """40 questions, one solution that is blank, one image that is missing, and a line that cannot be read."""
    lines = [
        {"name": f"q/{i}", "question": "How many?", "candidates": [{"text": f"So {i}.\n\nThen {j}."} for j in range(3)]}
        for i in range(40)
    ]
    lines[2]["candidates"] = ["So.", ""]
    lines[3]["image"] = "none.png"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "candidates.jsonl").write_text(text + "{\n")
    return tmp_path / "candidates.jsonl"


def words(file: Path, model: Path, *more: str) -> list[str]:
    return ["score", str(file), "--model", str(model), "--out", str(file.parent / "scored.jsonl"), *more]


def test_help_answers() -> None:
    assert cli.main(["score", "--help"]) == 0


def test_candidates_get_steps_and_rewards(file: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(file, model)) == 0
    shown = capsys.readouterr()
    assert "skipped: sample 'candidates.jsonl/41': the line is not valid JSON" in shown.out
    assert "scored.jsonl: 115 of 119 candidates of 40 questions scored, mean reward 0." in shown.out
    assert "(mean over steps)" in shown.out
    assert "not scored: 3 missing image, 1 no steps" in shown.out
    assert "lines skipped: 1 broken JSON" in shown.out
    assert "scoring: 40 of 40 questions of rank 0" in shown.err
    out = file.parent / "scored.jsonl"
    first, *_ = (one for one in read_candidates(out) if isinstance(one, CandidateSet))
    steps = first.candidates[0].steps
    assert steps is not None
    assert [step.step for step in steps] == ["So 0.", "Then 0."]
    assert first.candidates[0].reward == pytest.approx((steps[0].score + steps[1].score) / 2)
    assert cli.main(words(file, model, "--reduction", "last")) == 0
    again, *_ = (one for one in read_candidates(out) if isinstance(one, CandidateSet))
    assert again.candidates[0].steps == steps
    assert again.candidates[0].reward == steps[1].score
    assert cli.main(words(file, model, "--max-steps", "1")) == 2
    assert "max_steps = 12, not 1" in capsys.readouterr().err.splitlines()[-1]


def test_ranks_share_the_work(file: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(file, model, "--ranks", "2", "--outcome", "--system-prompt", "Judge.")) == 0
    parts = file.parent / "scored.jsonl.parts"
    counts = [len((parts / f"rank-0000{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert counts == [24, 16]  # groups of 16, 16 and 8
    assert "115 of 119 candidates" in capfd.readouterr().out
    there = (file.parent / "scored.jsonl").read_text()
    (file.parent / "scored.jsonl").unlink()
    for path in parts.iterdir():
        path.unlink()
    assert cli.main(words(file, model, "--outcome", "--system-prompt", "Judge.")) == 0
    assert (file.parent / "scored.jsonl").read_text() == there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "nowhere.jsonl"}, "there is no file nowhere.jsonl: CANDIDATES is a .jsonl"),
        ({3: "nowhere"}, "there is no folder nowhere: --model names a run or an exported model"),
        ({5: "."}, "--out . is a folder"),
        ({5: "candidates.jsonl"}, "is the candidate file itself: write the scores to another"),
    ],
)
def test_a_mistake_is_one_line(
    file: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[int, str],
    message: str,
) -> None:
    monkeypatch.chdir(file.parent)
    given = [change.get(number, word) for number, word in enumerate(words(file, model))]
    assert cli.main(given) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert not any("Traceback" in line for line in error)
    assert not (file.parent / "scored.jsonl").exists()


def test_a_critic_of_another_vocabulary_is_refused(
    file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer that merges the header's line feed with the sign."""
    other = tmp_path / "merging"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    merged = "Ċ+"
    replaced = next(token for token, i in content["model"]["vocab"].items() if i == 300)
    content["model"]["vocab"][merged] = content["model"]["vocab"].pop(replaced)
    merges = [pair for pair in content["model"]["merges"] if replaced not in ("".join(pair), *pair)]
    content["model"]["merges"] = [["Ċ", "+"], *merges]
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert cli.main(words(file, other)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "this is not the vocabulary of a process reward model" in error
    assert "writes 'assistant\\n+' as" in error
