"""Gives a base language model's tokenizer the tokens that InternVL adds to it.

    Qwen2.5-7B/ (151665 ids)  ──extend_tokenizer──►  out/ (151674 ids: <img> </img> <IMG_CONTEXT> … </box> last)

The embedding rows of the model have to grow with it; see the models' adapter for that. Source: spec §1.1.
"""

import json
from pathlib import Path

import tokenizers

from evovlm.data.tokenizer import END_OF_TEXT, IM_END, IM_START, INTERNVL_TOKENS, TokenizerError
from evovlm.data.tokenizer_training import CHAT_TEMPLATE, add_tokens
from evovlm.models.tokenizer_json import TokenizerFileError, tokenizer_json, tokenizer_settings


def extend_tokenizer(source: str | Path, directory: str | Path) -> tuple[str, ...]:
    """Copy a tokenizer directory with InternVL's tokens appended at the next free ids.

    The nine tokens come in InternVL's order, then turn marks and padding if the tokenizer has none. The end of a
    turn becomes its end token, and the chat template is ``internvl2_5``.

    Args:
        source: directory with ``tokenizer.json`` or ``tokenizer.model``, and ``tokenizer_config.json`` where there is
            one.
        directory: where to write; made if absent.

    Returns:
        The tokens that were added, in the order of their ids; empty if all were there.

    Raises:
        TokenizerError: ``source`` has no tokenizer to extend, or its settings are not a JSON object.
    """
    source, directory = Path(source), Path(directory)
    try:
        backend = tokenizers.Tokenizer.from_buffer(tokenizer_json(source))
        settings = tokenizer_settings(source)
    except (FileNotFoundError, TokenizerFileError) as error:
        raise TokenizerError(str(error)) from error
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    pad = settings.get("pad_token") or END_OF_TEXT
    pad = pad["content"] if isinstance(pad, dict) else pad
    wanted = dict.fromkeys((*INTERNVL_TOKENS, IM_START, IM_END, pad))
    added = tuple(token for token in wanted if backend.token_to_id(token) is None)
    add_tokens(backend, added)

    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    named = {"eos_token": IM_END, "pad_token": pad}
    settings |= {**named, "chat_template": CHAT_TEMPLATE}
    # A list of the old added tokens would contradict the new tokenizer.json, which holds them all.
    settings.pop("added_tokens_decoder", None)
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", named)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    return added
