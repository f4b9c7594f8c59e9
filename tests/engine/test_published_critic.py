"""A directory laid out as VisualPRM-8B's opens as a critic: SentencePiece vocabulary, InternLM2 weights, no code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from evovlm.data.chat import DEFAULT_SYSTEM
from evovlm.data.tokenizer import Tokenizer, TokenizerError
from evovlm.engine.step_scores import open_critic
from evovlm.models.config import InternVLConfig
from evovlm.models.internvl import InternVL

from ..models.sentencepiece_support import train, write_published
from ..models.visualprm_support import internlm2, write_reward_model
from .support import TILE

TEXT = "\n".join(
    f"### Question:\nHow many boxes are there?\n\n### Solution Process:\nassistant user system: {i} + {i} - 1 = 7"
    for i in range(60)
)
STEPS = ["There are 3 + 1 boxes.", "How many boxes? 4"]


@pytest.fixture(scope="module")
def published(small_config: InternVLConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_published(tmp_path_factory.mktemp("published"), train(TEXT, vocab_size=360))
    size = Tokenizer.load(directory).vocab_size
    write_reward_model(directory, replace(internlm2(small_config, size), max_tiles=4))
    Image.new("RGB", (TILE, TILE), (200, 30, 90)).save(directory / "a.png")
    return directory


def test_tokenizer_is_loaded_from_its_model(published: Path) -> None:
    tokenizer = Tokenizer.load(published)
    assert tokenizer.vocab_size == 369
    assert tokenizer.bos_id == 1  # InternLM2's class puts <s> first unless told otherwise
    assert tokenizer.end_of_text == 2  # its pad token is </s>
    assert tokenizer.image_context == 362
    assert tokenizer.decode(tokenizer.encode("<|im_start|> <box>1</box>")) == "<|im_start|> <box>1</box>"
    assert 364 not in tokenizer.encode("<img>")


@pytest.mark.parametrize("message", [None, "You judge."])
def test_scores_are_those_of_one_pass(published: Path, message: str | None) -> None:
    config = internlm2(open_critic(published).model.config, Tokenizer.load(published).vocab_size)
    weights = write_reward_model(
        published, replace(config, max_tiles=4), **({"system_message": message} if message else {})
    )
    critic = open_critic(published, dtype=torch.float64)
    (found,) = critic.step_scores("How many boxes?", [published / "a.png"], [STEPS])

    tokenizer = Tokenizer.load(published)
    special = {"<s>": 1, "<|im_start|>": tokenizer.im_start, "<|im_end|>": tokenizer.im_end}
    special |= {"<img>": tokenizer.image_start, "</img>": tokenizer.image_end}
    ids: list[int] = []
    pieces = ["<s>", "<|im_start|>", f"system\n{message or DEFAULT_SYSTEM}", "<|im_end|>", "\n"]
    pieces += ["<|im_start|>", "user\n### Question:\n", "<img>", "</img>"]
    pieces += [f"\nHow many boxes?\n\n### Solution Process:\n{STEPS[0]}", "<|im_end|>", "\n"]
    pieces += [
        "<|im_start|>",
        "assistant\n+",
        "<|im_end|>",
        "\n",
        "<|im_start|>",
        f"user\n{STEPS[1]}",
        "<|im_end|>",
        "\n",
    ]
    pieces += ["<|im_start|>", "assistant\n"]
    decisions = []
    for piece in pieces:
        ids += [special[piece]] if piece in special else tokenizer.encode(piece)
        if piece == "<img>":
            begin = len(ids)
            ids += [tokenizer.image_context] * 4
        if piece.startswith("assistant"):
            decisions.append(len(ids) - 1 - piece.endswith("+"))
    model = InternVL(config).double().eval()
    model.load_state_dict(weights)
    _, tiles = critic.prompts.prompts._see((published / "a.png",))
    with torch.no_grad():
        logits = model(
            torch.tensor(ids),
            torch.arange(len(ids), dtype=torch.float32),
            torch.tensor([0, len(ids)], dtype=torch.int32),
            tiles.double(),
            torch.arange(begin, begin + 4),
        )
    signs = [tokenizer.encode(f"assistant\n{sign}")[-1] for sign in "+-"]
    torch.testing.assert_close(found, logits[decisions][:, signs].softmax(-1)[:, 0], rtol=0, atol=1e-10)


def test_a_tokenizer_that_cannot_be_read_says_what_to_do(published: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json, and no tokenizer\.model to make it from; copy"):
        open_critic(tmp_path)
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match=r"is no SentencePiece model .*fetch it again"):
        open_critic(tmp_path)
