"""Builds an index with a progress bar and says what went into it and what was left out."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evovlm.data.build_index import IndexSettings, build_index, is_current
from evovlm.data.index_format import IndexMeta, read_meta
from evovlm.data.index_progress import show_progress


def build_with_progress(settings: IndexSettings, console: Console | None = None) -> IndexMeta:
    """Build the index that settings describe, unless it is there and current; print a summary.

    Raises:
        MetaError, SampleError, TokenizerError, FileNotFoundError: as :func:`evovlm.data.build_index.build_index`.
    """
    console = console or Console()
    if is_current(settings):
        console.print(f"{settings.out} is up to date", highlight=False)
        return read_meta(settings.out)
    with show_progress(console) as progress:
        report = build_index(settings, progress)
    _summarize(report.meta, console)
    skipped = "".join(f"; {count:,} {reason}" for reason, count in report.meta.skipped.items())
    console.print(
        f"{settings.out}: {report.meta.num_samples:,} samples in {report.seconds:.1f} s, "
        f"{report.num_skipped:,} lines skipped{skipped}"
        + (f" (listed in {settings.out / 'skipped.jsonl'})" if report.num_skipped else ""),
        highlight=False,
        markup=False,
    )
    return report.meta


def _summarize(meta: IndexMeta, console: Console) -> None:
    table = Table("dataset", "kind", box=SIMPLE_HEAD)
    for column in ("samples", "skipped", "tokens", "supervised", "images", "tiles"):
        table.add_column(column, justify="right")
    for info in meta.datasets:
        counts = (info.count, info.num_skipped, info.num_tokens, info.num_supervised, info.num_images, info.num_tiles)
        table.add_row(info.name, info.kind, *(f"{count:,}" for count in counts))
    console.print(table)
    for warning in meta.warnings:
        console.print(f"note: {warning}", markup=False, highlight=False)
