"""``tokenizer.json`` of a directory: read, or made from the SentencePiece model that older publications have instead.

    tokenizer.json ───────────────────────────────────────────────────────────► its text
    tokenizer.model ─ pieces, scores ─► BPE vocabulary and merges ─┐
    tokenizer_config.json, added_tokens.json ─► added tokens ──────┴──────────► the same, as tokenizers writes it

InternVL2.5-8B and VisualPRM-8B publish InternLM2.5's ``tokenizer.model`` beside Python code that reads it. That code is
never run: the file is a protocol buffer, and its BPE is one that the ``tokenizers`` library computes.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SETTINGS = "tokenizer_config.json"
_SPACE = "▁"
_BPE = 2
_CONTROL, _USER_DEFINED = 3, 4
_MERGED = (1, _USER_DEFINED, 5)
"""Kinds of pieces that merges may make or start from: normal, user defined, unused; not unknown, control or byte."""


class TokenizerFileError(ValueError):
    """A directory's tokenizer files cannot be used; the message says why and what to do."""


def tokenizer_json(directory: str | Path) -> bytes:
    """Return the content of a directory's ``tokenizer.json``; without one, convert its ``tokenizer.model``.

    A conversion takes seconds at a vocabulary of 92,553 and gives the same content each time.

    Raises:
        FileNotFoundError: The directory has neither file.
        TokenizerFileError: ``tokenizer.model`` is damaged, is no byte-fallback BPE, or its settings contradict it.
    """
    directory = Path(directory)
    file = directory / "tokenizer.json"
    if file.is_file():
        return file.read_bytes()
    if (directory / "tokenizer.model").is_file():
        return _convert(directory).to_str().encode()
    raise FileNotFoundError(
        f"{directory}: no tokenizer.json, and no tokenizer.model to make it from; copy the tokenizer's files there, or "
        "save it with transformers' AutoTokenizer (fast) .save_pretrained"
    )


def tokenizer_settings(directory: str | Path) -> dict[str, Any]:
    """Return ``tokenizer_config.json``, completed where a ``tokenizer.model`` alone stands for ``tokenizer.json``.

    The published classes that read a ``tokenizer.model`` put ``<s>`` before every text unless told otherwise. They,
    their code and the list of added tokens give way to the class that reads a ``tokenizer.json`` as it is.

    Raises:
        TokenizerFileError: It is not a JSON object.
    """
    directory = Path(directory)
    settings = _json_object(directory / SETTINGS)
    if (directory / "tokenizer.json").is_file() or not (directory / "tokenizer.model").is_file():
        return settings
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "added_tokens_decoder")}
    return {"add_bos_token": True, "bos_token": "<s>", **kept, "tokenizer_class": "PreTrainedTokenizerFast"}


def write_tokenizer_json(source: str | Path, out: str | Path) -> None:
    """Write ``tokenizer.json`` and settings that load it, for a source that has only a ``tokenizer.model``.

    Args:
        source: Directory of the tokenizer.
        out: Existing directory; its ``tokenizer_config.json`` is replaced.

    Raises:
        FileNotFoundError: The source has no tokenizer.
        TokenizerFileError: As for :func:`tokenizer_json`.
    """
    out = Path(out)
    (out / "tokenizer.json").write_bytes(tokenizer_json(source))
    settings = json.dumps(tokenizer_settings(source), indent=2, ensure_ascii=False)
    (out / SETTINGS).write_text(settings + "\n", encoding="utf-8")


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerFileError(f"cannot read '{file}': {error}") from error
    if not isinstance(content, dict):
        raise TokenizerFileError(f"'{file}' holds a {type(content).__name__}, not a JSON object")
    return content


def _read_proto(file: Path) -> Any:
    """Parse the model and refuse what ``tokenizers`` would compute otherwise."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise TokenizerFileError(f"'{file}' is no SentencePiece model ({error}); fetch it again") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if not proto.pieces:
        raise TokenizerFileError(f"'{file}' is no SentencePiece model (it has no pieces); fetch it again")
    wrong = [
        text
        for text, bad in (
            ("it is no BPE model", trainer.model_type != _BPE),
            ("it does not fall back to bytes", not trainer.byte_fallback),
            ("it removes extra white space", normalizer.remove_extra_whitespaces),
            ("it puts white space behind words", trainer.treat_whitespace_as_suffix),
        )
        if bad
    ]
    if wrong:
        raise TokenizerFileError(
            f"'{file}' cannot be converted: {', '.join(wrong)}; save the tokenizer with transformers' AutoTokenizer "
            "(fast) .save_pretrained where its own code may run, and copy tokenizer.json here"
        )
    return proto


def _added_tokens(directory: Path) -> dict[int, str]:
    """Ids and texts of the tokens that the settings add to the model's pieces or rename pieces to."""
    declared = _json_object(directory / SETTINGS).get("added_tokens_decoder", {})
    added = {int(number): token["content"] for number, token in declared.items()}
    return added | {number: text for text, number in _json_object(directory / "added_tokens.json").items()}


def _merges(pieces: list[tuple[str, float, int]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """List every pair of pieces that joins to a third, the best-scored first: the order in which SentencePiece joins.

    Pairs of one piece share its score; they come in the order of their parts' ids.
    """
    parts = {text for text, _, kind in pieces if kind in _MERGED}
    found = []
    for text, score, kind in pieces:
        if kind not in _MERGED:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in parts and right in parts:
                found.append((-score, vocab[left], vocab[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _convert(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.model"
    proto = _read_proto(file)
    added = _added_tokens(directory)
    pieces = [
        # A renamed piece is an added token from then on: text never merges to it.
        (added[number], piece.score, _CONTROL) if number in added else (piece.piece, piece.score, piece.type)
        for number, piece in enumerate(proto.pieces)
    ]
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    if twice := [text for number, (text, _, _) in enumerate(pieces) if vocab[text] != number]:
        raise TokenizerFileError(
            f"'{directory}': {SETTINGS} renames a piece of {file.name} to {twice[0]!r}, which is another's name"
        )
    merges = _merges(pieces, vocab)
    unknown = proto.trainer_spec.unk_piece
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    steps += [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []))

    symbols = {number: text for number, (text, _, kind) in enumerate(pieces) if kind == _USER_DEFINED}
    for number, text in sorted((symbols | added).items()):
        backend.add_tokens([AddedToken(text, normalized=False, special=number in added)])
        if (found := backend.token_to_id(text)) != number:
            raise TokenizerFileError(
                f"'{directory}': {SETTINGS} gives {text!r} the id {number}, but behind the {len(pieces)} pieces of "
                f"{file.name} and the tokens before it comes {found}"
            )
    return backend
