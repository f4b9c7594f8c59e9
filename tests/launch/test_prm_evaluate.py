"""``evovlm prm evaluate``: from the command line to a table and a file."""

import json
from pathlib import Path

import pytest

from evovlm.data.tokenizer import Tokenizer
from evovlm.engine.equality import make_weights
from evovlm.launch import cli
from evovlm.models.config import DecoderConfig, InternVLConfig, VisionConfig
from evovlm.models.hf.save import save_pretrained

pytestmark = pytest.mark.usefixtures("no_process_group")

ROWS = [
    {"question": "3 + 4?", "steps_with_score": [{"step": "7.", "score": 1.0}, {"step": "So 7", "score": 1.0}]},
    {"question": "3 + 4?", "steps_with_score": [{"step": "8.", "score": 0.2}, {"step": "So 8", "score": 0.0}]},
    {
        "question": "1 + 4?",
        "response": {"steps": ["5.", "Fine."], "process_correctness": [1, 0]},
        "data_source": "sums",
    },
    {"question": "1 + 4?", "response": "5."},
]


@pytest.fixture(scope="module")
def model(tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = InternVLConfig(
        vision=VisionConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, tile_size=8, patch_size=2),
        decoder=DecoderConfig(
            vocab_size=Tokenizer.load(tiny_tokenizer_dir).vocab_size,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            ffn_size=16,
        ),
    )
    out = tmp_path_factory.mktemp("model") / "small"
    weights = ((name, value.float()) for name, value in make_weights(config, seed=1))
    save_pretrained(config, weights, out, tokenizer_dir=tiny_tokenizer_dir)
    return out


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_table_and_file(steps: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = steps.parent / "made" / "out.json"
    words = ["prm", "evaluate", str(steps), "--model", str(model), "--mc-threshold", "0.5", "--json", str(out)]
    assert cli.main([*words, "--threshold", "0"]) == 0  # every step is called right
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 solutions, 5 steps, 1 neutral ones left out; skipped: 1 missing keys" in printed
    assert 'the best constant answer, "+" for every step: accuracy 60.0%, macro-F1 37.5%' in printed
    assert "skipped: sample 'steps.jsonl/4': the line has neither" in printed
    found = json.loads(out.read_text())
    assert found["overall"]["accuracy"] == 3 / 5
    assert found["overall"]["classes"]["+"]["recall"] == 1.0
    assert {name: source["steps"] for name, source in found["sources"].items()} == {"steps": 4, "sums": 1}
    assert (found["model"], found["files"], found["threshold"]) == (str(model), [str(steps)], 0.0)
    assert cli.main([*words, "--until-first-error"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 solutions, 4 steps, 1 neutral ones left out, 1 behind a wrong one not counted; skipped" in printed
    assert json.loads(out.read_text())["until_first_error"] is True


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere"], "there is no folder nowhere"),
        (["--threshold", "1"], "--threshold 1.0 is outside [0, 1)"),
        (["--mc-threshold", "-0.1"], "--mc-threshold -0.1 is outside"),
        (["--json", "."], "--json . is a folder"),
        (["missing.jsonl"], "there is no file missing.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    steps: Path, model: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prm", "evaluate", str(steps), "--model", str(model), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_model_that_is_no_critic(
    steps: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["prm", "evaluate", str(steps), "--model", str(tmp_path / "empty")]) == 2
    assert "no config.json" in capsys.readouterr().err
