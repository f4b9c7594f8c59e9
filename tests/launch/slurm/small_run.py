"""The quickstart's pre-training on a handful of drawn digits: three steps of the tiny model."""

import json
from pathlib import Path

from evovlm.data.build_index import IndexSettings, build_index
from evovlm.data.synthetic import digits
from evovlm.models.table import TINY


def build_small_run(folder: Path, tokenizer: Path) -> list[str]:
    """Make the data below ``folder`` and return the words that follow ``evovlm train``, or ``submit``."""
    lines = []
    for number in range(16):
        sample = digits.make(0, "train", number, one_tile=True)
        files = [f"{number}_{i}.png" for i in range(len(sample.images))]
        for file, image in zip(files, sample.images, strict=True):
            image.save(folder / file)
        told = "\n".join(f"<image>\n{text}" for text in sample.transcripts)
        lines.append(json.dumps({"image": files, "conversations": [{"from": "pretrain", "value": told}]}))
    (folder / "digits.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "meta.json").write_text(json.dumps({"digits": {"root": str(folder), "annotation": "digits.jsonl"}}))
    index = build_index(
        IndexSettings(
            meta=folder / "meta.json",
            tokenizer=tokenizer,
            out=folder / "index",
            tile_size=TINY.vision.tile_size,
            tokens_per_tile=TINY.tokens_per_tile,
            max_tiles=TINY.max_tiles,
            num_workers=1,
            strict=True,
        )
    ).path
    return [
        "quickstart/pretrain",
        "--steps=3",
        "--stage.language_ratio=natural",
        f"--model.tokenizer={tokenizer}",
        f"--data.index={index}",
        f"--data.val_index={index}",
        "--data.phases=[]",
        "--data.packs_per_step=4",
        "--data.pack_tokens=128",
        # As one word, this is the beginning of two options of torchrun: it must not look at it.
        "--log={every = 1, tensorboard = false, peak_tflops = 0.1}",
        "--export=none",
    ]
