"""The quickstart's data: three tasks made from real digits, fonts, photographs and numbers, and real plain text.

    sources ─► digits │ words │ charts ─► samples ─► ``build``: PNG, jsonl, meta JSON, a Megatron corpus, a tokenizer

Everything is drawn by keyed randomness (``draws``) from material inside installed packages (``sources``), split by
source item into train, val and test.
"""

from evovlm.data.synthetic.build import QuickstartData, build_quickstart_data

__all__ = ["QuickstartData", "build_quickstart_data"]
