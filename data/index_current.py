"""Tells whether an index is still what its settings and source files would give, so that a command can skip it."""

import hashlib
import json
from pathlib import Path

from evovlm.data.corpus import corpus_files
from evovlm.data.index_format import FORMAT_VERSION, SourceFile, read_meta
from evovlm.data.index_settings import IndexSettings
from evovlm.data.meta import MetaFile, load_meta

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def is_current(settings: IndexSettings) -> bool:
    """Whether ``settings.out`` holds the index that these settings would build.

    Compares the settings, and the sizes and times of the meta JSON, the .jsonl files, corpora and the tokenizer.
    Images are not looked at: after changing one, build again.
    """
    try:
        built = read_meta(settings.out)
        files = source_files(settings, load_meta(settings.meta))
    except (OSError, ValueError):  # no index, or sources that cannot be read: building will say what is wrong
        return False
    if settings.strict and built.skipped:
        return False
    return built.settings_hash == settings_hash(settings) and built.files == files


def source_files(settings: IndexSettings, meta: MetaFile) -> tuple[SourceFile, ...]:
    """Return every file, images apart, that an index comes from, with size and time.

    Raises:
        MetaError: a file of a corpus does not exist.
    """
    paths = [settings.meta, *(settings.tokenizer / name for name in _TOKENIZER_FILES)]
    for dataset in meta.datasets:
        paths += corpus_files(dataset.annotation) if dataset.format == "megatron" else (dataset.annotation,)
    return tuple(_source_file(path.absolute()) for path in paths if path.exists())


def _source_file(path: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(path=str(path), num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)


def settings_hash(settings: IndexSettings) -> str:
    """Hash what decides an index's content: not where it goes, nor how many processes build it."""
    content = settings.model_dump(mode="json", exclude={"out", "num_workers", "strict", "max_skipped"})
    if settings.kind == "conversations":  # all that there was once: indexes of then stay current
        del content["kind"]
    content |= {"meta": str(settings.meta.absolute()), "tokenizer": str(settings.tokenizer.absolute())}
    text = json.dumps({"format": FORMAT_VERSION, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
