"""Which submodules of InternVL are gathered and freed together, and whose layout they follow.

Each entry is a module path pattern (``*`` stands for one path component) and a module of the parallel plan. The root
holds the embedding, the final norm and the head: a tied head must share a unit with its embedding.
"""

SHARDING_UNITS: dict[str, str] = {
    "vision_model.encoder.layers.*": "vit",
    "vision_model": "vit",
    "mlp1": "projector",
    "language_model.model.layers.*": "llm",
    "": "llm",
}

CHECKPOINTED_BLOCKS: dict[str, str] = {
    "vision_model.encoder.layers.*": "vit",
    "language_model.model.layers.*": "llm",
}
"""Blocks whose activations can be recomputed in backward, and the module that they belong to."""

MODULE_PREFIXES: dict[str, str] = {"vision_model.": "vit", "mlp1.": "projector", "language_model.": "llm"}
"""Parameter name prefix → module, for learning rates, freezing and counts."""


def module_of(parameter: str) -> str:
    """Name the module (``vit``, ``projector`` or ``llm``) that a parameter belongs to.

    Raises:
        KeyError: The name is not one of an InternVL model.
    """
    for prefix, module in MODULE_PREFIXES.items():
        if parameter.startswith(prefix):
            return module
    raise KeyError(f"parameter {parameter!r} is in none of {', '.join(MODULE_PREFIXES)}")
