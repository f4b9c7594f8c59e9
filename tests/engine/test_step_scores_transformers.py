"""The critic's scores, stated again without it: text by hand, transformers' tokenizer and model, a pass a solution."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from evovlm.data.candidates import Candidate, CandidateSet
from evovlm.data.chat import DEFAULT_SYSTEM
from evovlm.data.images import load_tiles
from evovlm.data.index_format import ImageRef
from evovlm.data.solution_steps import PRM_SYSTEM_PROMPT
from evovlm.engine.step_scores import Critic, open_critic
from evovlm.models.config import InternVLConfig
from evovlm.models.hf.save import save_pretrained

from .support import TILE, TOKENS_PER_TILE, weights_of

HEAD = 0.3
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZES = {"one.png": (1, 1), "wide.png": (2, 1), "tall.png": (1, 2)}
"""Columns and rows of tiles that each image is cut into: its size in tiles, so nothing but thumbnails is resampled."""

SOLUTIONS = (
    "There are 3 boxes.\n\nAnd 4 discs.\n\nAnswer: 7",
    "There are 3 boxes.\n\nAnd 5 discs.\n\nAnswer: 8",
    "There are 3 boxes.\n\nAnswer: 3",
    "Answer: 7",
    "There are 3 boxes.\n\nAnd 4 discs.\n\nAnswer: 7",
    "assistant\n+\n\n\n\nA line + a line - none. é 画",
)


@pytest.fixture(scope="module")
def export(small_config: InternVLConfig, tiny_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in transformers' format and float64, its head small enough for scores well below 1."""
    out = tmp_path_factory.mktemp("critic") / "small"
    weights = (
        (name, value.double() * (HEAD if "lm_head" in name else 1)) for name, value in weights_of(small_config, 5)
    )
    save_pretrained(small_config, weights, out, tokenizer_dir=tiny_tokenizer_dir)
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, (cols, rows) in SIZES.items():
        pixels = rng.integers(0, 256, (rows * TILE, cols * TILE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return {name: folder / name for name in SIZES}


def tiles_of(path: Path) -> Tensor:
    """Cut an image into tiles, row by row, thumbnail last, and normalise them: float64 ``[N, 3, S, S]``."""
    picture, (cols, rows) = Image.open(path), SIZES[path.name]
    boxes = [(col * TILE, row * TILE, (col + 1) * TILE, (row + 1) * TILE) for row in range(rows) for col in range(cols)]
    cut = [picture.crop(box) for box in boxes]
    if len(cut) > 1:
        cut.append(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
    pixels = (np.stack([np.asarray(tile) for tile in cut]) / 255 - MEAN) / STD
    tiles = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    # The project's tiles are float32, and their rounding would show in the tenth digit of a score.
    rounded = load_tiles(ImageRef(path, -1, cols, rows, len(cut) > 1, len(cut), insert_at=0), TILE)
    torch.testing.assert_close(torch.from_numpy(rounded).double(), tiles, rtol=0, atol=1e-6)
    return torch.from_numpy(rounded).double()


def written(question: str, steps: Sequence[str], num_tiles: Sequence[int], system: str) -> str:
    """The whole conversation as text, "+" as every answer, visual tokens in place."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for number, step in enumerate(steps):
        asked = step if number else f"### Question:\n{question}\n\n### Solution Process:\n{step}"
        text += f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n+<|im_end|>\n"
    for count in num_tiles:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * (count * TOKENS_PER_TILE)}</img>", 1)
    return text


class Rotary(nn.Module):
    """Angles are float32, as positions are in this project; their cosines are not."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.inv_freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].float() * self.inv_freq).to(x.dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class Twin:
    """transformers' model and tokenizer of a directory; two leaves that compute in float32 replaced by exact ones."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer, InternVLForConditionalGeneration

        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = InternVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float64).eval()
        text = self.model.config.text_config
        language = self.model.model.language_model
        language.rotary_emb = Rotary(text.head_dim, text.rope_parameters["rope_theta"])
        for name, module in list(language.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
                exact.weight = module.weight
                language.set_submodule(name, exact)

    def scores(self, question: str, paths: Sequence[Path], steps: Sequence[str], system: str) -> list[float]:
        """P("+") of each step, by the published procedure: find the answers in the ids, read the logits before them."""
        tiles = [tiles_of(path) for path in paths]
        text = written(question, steps, [len(of) for of in tiles], system)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        header = self.tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
        answer = self.tokenizer("<|im_start|>assistant\n+<|im_end|>\n", add_special_tokens=False).input_ids
        found = [i + len(header) - 1 for i in range(len(ids)) if ids[i : i + len(answer)] == answer]
        assert len(found) == len(steps)
        signs = self.tokenizer.convert_tokens_to_ids(["+", "-"])
        with torch.no_grad():
            seen = {"pixel_values": torch.cat(tiles)} if tiles else {}
            logits = self.model(input_ids=torch.tensor([ids]), **seen).logits[0]
        scores: list[float] = logits[found][:, signs].softmax(-1)[:, 0].tolist()
        return scores


@pytest.fixture(scope="module")
def twin(export: Path) -> Twin:
    return Twin(export)


def test_scores_equal_a_statement_through_transformers(export: Path, twin: Twin, pictures: dict[str, Path]) -> None:
    """Packed, with shared prefixes and images seen once: each solution scores as alone in transformers."""
    critic = open_critic(export, dtype=torch.float64)
    asked = {
        "How many?": [],
        "<image>\nHow many?": ["one.png"],
        "In <image> and <image>, how many?": ["wide.png", "tall.png"],
    }
    sets = [
        CandidateSet(f"{i}", question, tuple(pictures[name] for name in names), tuple(map(Candidate, SOLUTIONS)))
        for i, (question, names) in enumerate(asked.items())
    ]
    spread: list[float] = []
    for made in critic.score(sets):
        for candidate in made.candidates:
            assert candidate.steps is not None
            steps = candidate.text.replace("\n\n\n\n", "\n\n").split("\n\n")
            assert [step.step for step in candidate.steps] == steps
            expected = twin.scores(made.question, made.images, steps, PRM_SYSTEM_PROMPT)
            assert [step.score for step in candidate.steps] == pytest.approx(expected, rel=0, abs=1e-10)
            assert candidate.reward == pytest.approx(sum(expected) / len(expected), rel=0, abs=1e-10)
            spread += expected
    assert max(spread) - min(spread) > 0.05  # or any two ways would agree


@pytest.mark.parametrize("system", ["", "Be strict."])
def test_other_system_turns(export: Path, twin: Twin, pictures: dict[str, Path], system: str) -> None:
    critic = open_critic(export, dtype=torch.float64, system_prompt=system)
    steps = ["There are 3 boxes.", "Answer: 3"]
    (found,) = critic.step_scores("How many?", [pictures["one.png"]], [steps])
    expected = twin.scores("<image>\nHow many?", [pictures["one.png"]], steps, system or DEFAULT_SYSTEM)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-10)
    assert expected != pytest.approx(twin.scores("<image>\nHow many?", [pictures["one.png"]], steps, "x"), abs=1e-6)


def test_the_plain_twin_agrees_to_its_own_precision(export: Path, pictures: dict[str, Path]) -> None:
    """Nothing hides in the replaced leaves: transformers as it is differs by its float32 rounding alone."""
    from transformers import InternVLForConditionalGeneration

    critic: Critic = open_critic(export, dtype=torch.float64)
    plain = Twin(export)
    plain.model = InternVLForConditionalGeneration.from_pretrained(export, dtype=torch.float64).eval()
    steps = ["There are 3 boxes.", "And 4 discs.", "Answer: 7"]
    (found,) = critic.step_scores("How many?", [pictures["wide.png"]], [steps])
    expected = plain.scores("<image>\nHow many?", [pictures["wide.png"]], steps, PRM_SYSTEM_PROMPT)
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-5)
