"""The system turn in front of any chat template, as transformers renders it."""

import json
import shutil
from pathlib import Path

import pytest

from evovlm.data.tokenizer_training import CHAT_TEMPLATE
from evovlm.models.hf.chat_template import PLAIN_TEMPLATE, default_system, set_default_system, with_default_system

ASKED = [{"role": "user", "content": "Two cats?"}]
TOLD = [{"role": "system", "content": "Be brief."}, *ASKED]
# A template of Qwen2.5's kind: it looks at the first message in two places.
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}You are Qwen.{% endif %}|"
    "{%- for message in messages %}{%- if message['role'] != 'system' or not loop.first %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)


def render(directory: Path, messages: list[dict[str, str]], name: str | None = None) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=name)
    assert isinstance(text, str)
    return text


@pytest.fixture
def directory(tmp_path: Path, tiny_tokenizer_dir: Path) -> Path:
    target = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir, target)
    return target


def write(directory: Path, template: object) -> None:
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PLAIN_TEMPLATE, QWEN])
@pytest.mark.parametrize("system", ['Say "no"\nor {{ yes }}.', "看图。", ""])
def test_it_is_as_if_the_conversation_had_brought_it(directory: Path, template: str, system: str) -> None:
    write(directory, template)
    assert default_system(directory) is None
    wanted, own = render(directory, [{"role": "system", "content": system}, *ASKED]), render(directory, TOLD)
    set_default_system(directory, "An earlier one.")
    set_default_system(directory, system)
    assert render(directory, ASKED) == wanted
    assert render(directory, TOLD) == own
    assert default_system(directory) == system


def test_an_earlier_turn_is_replaced_not_kept() -> None:
    assert with_default_system(with_default_system("mine", "A"), "B") == with_default_system("mine", "B")


def test_a_file_of_its_own_and_named_templates(directory: Path) -> None:
    write(directory, [{"name": "default", "template": QWEN}, {"name": "other", "template": "other|" + QWEN}])
    set_default_system(directory, "Look.")
    assert render(directory, ASKED) == "Look.|Two cats?"
    assert render(directory, ASKED, "other") == "other|Look.|Two cats?"
    assert not (directory / "chat_template.jinja").exists()
    assert default_system(directory) == "Look."
    write(directory, QWEN)
    (directory / "chat_template.jinja").write_text("file|" + QWEN)
    set_default_system(directory, "Look.")
    assert render(directory, ASKED) == "file|Look.|Two cats?"


def test_one_is_written_where_there_is_none(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink(missing_ok=True)
    assert default_system(directory) is None
    set_default_system(directory, "Look.")
    assert default_system(directory) == "Look."
    assert not (directory / "tokenizer_config.json").exists()
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert render(directory, ASKED) == "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\nTwo cats?<|im_end|>\n"
