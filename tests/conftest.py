"""Fixtures for every test folder."""

import importlib.util
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch

# The default deadline of 200 ms per example fails on busy machines; no test is about time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

TINY_TEXTS = (
    "What digits does the image show, row by row? Read the word in the picture. Which bar of the chart is highest?",
    "The answer is 42. The grid shows 1 2 3 4 5 6 7 8 9 0. A dog and a cat sit beside the red car in the street.",
    "<ref>the dog</ref><box>[[12, 34, 560, 780]]</box> Step 1: compare the first image with the second image.",
    "naïve café 世界 你好 \N{GRINNING FACE}! It's what they've said: we'll see, don't we?\n\n",
)
"""What the small tokenizer of the tests has learned its merges from."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a byte-level BPE tokenizer of 384 ids, with Qwen's and InternVL's added tokens."""
    from evovlm.data.tokenizer_training import build_tokenizer

    return build_tokenizer(TINY_TEXTS, tmp_path_factory.mktemp("tiny_tokenizer"), vocab_size=384)


@pytest.fixture(scope="session")
def qwen_tokenizer_module() -> ModuleType:
    """The builder ``tests/data/qwen_tokenizer.py``, loaded by its path since tests are no package."""
    spec = importlib.util.spec_from_file_location(
        "qwen_tokenizer", Path(__file__).parent / "data" / "qwen_tokenizer.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def qwen_tokenizer_dir(qwen_tokenizer_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of Qwen2.5's tokenizer with InternVL's nine tokens; fails, never skips, without `dashscope`."""
    directory: Path = qwen_tokenizer_module.build_qwen_tokenizer(tmp_path_factory.mktemp("qwen_tokenizer"))
    return directory
