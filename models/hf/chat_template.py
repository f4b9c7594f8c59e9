"""The system turn that a tokenizer's chat template puts before a conversation without one.

A model that was trained with a system turn of its own answers worse behind another one, and who serves it sees its chat
template only. So the turn is written there, in front of whatever template the tokenizer has:

    {#- default system turn -#} … messages = [system turn] + messages … {#- default system turn -#}{its own template}
"""

import json
from pathlib import Path
from typing import Any

_MARK = "{#- default system turn -#}"
_CONTENT = "{%- if messages[0]['role'] != 'system' -%}{%- set messages = [{'role': 'system', 'content': "
_REST = "}] + messages -%}{%- endif -%}"

# Images come as <IMG_CONTEXT>; the processor puts <img>, </img> and one token per visual token in its place.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<IMG_CONTEXT>\\n' -}}
{%- elif part['type'] == 'video' -%}
{{- '<video>\\n' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""For a tokenizer that brings none; it adds no system turn."""


def with_default_system(template: str, system: str) -> str:
    """Let a Jinja template put a system turn before conversations that have none.

    Args:
        template: Any chat template of transformers; one that this function made before gets the new turn instead.
        system: Text of the turn; replaces what the template would have put there.
    """
    if template.startswith(_MARK):
        template = template.split(_MARK, 2)[2]
    return _MARK + _CONTENT + json.dumps(system, ensure_ascii=False) + _REST + _MARK + template


def default_system(directory: Path) -> str | None:
    """Read the turn that :func:`set_default_system` wrote; None if a directory's template is not of its making."""
    config_file, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    template: Any = None
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    elif config_file.is_file():
        template = json.loads(config_file.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    if not isinstance(template, str) or not template.startswith(_MARK):
        return None
    turn = template.split(_MARK, 2)[1].partition(_CONTENT)[2].rpartition(_REST)[0]
    found: str = json.loads(turn)
    return found


def set_default_system(directory: Path, system: str) -> None:
    """Do so with every template of a tokenizer directory, or write one if it has none."""
    config_file, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    own = config.get("chat_template")
    if own:
        if isinstance(own, str):
            config["chat_template"] = with_default_system(own, system)
        else:  # several, by name
            config["chat_template"] = [
                each | {"template": with_default_system(each["template"], system)} for each in own
            ]
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if file.is_file() or not own:
        template = file.read_text(encoding="utf-8") if file.is_file() else PLAIN_TEMPLATE
        file.write_text(with_default_system(template, system), encoding="utf-8")
