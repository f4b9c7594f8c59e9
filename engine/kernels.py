"""The kernels that a model computes with, applied to a module on its way to being sharded.

    replace_layers ─► (tensor parallel) ─► wrap_blocks ─► (recompute) ─► wrap_module ─► (fully_shard)
    Linear, norms                          compile                       FP8, kind of attention

:mod:`evovlm.engine.kernel_choice` checks beforehand that they fit the machine. The defaults change nothing on a CPU; on
CUDA they take the fastest attention that is there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from evovlm.csrc.attention_cuda import attention_choice
from evovlm.csrc.backends import FP8_RECIPES, load
from evovlm.engine.recompute import Recompute
from evovlm.engine.replace_layers import replace_linear, replace_norms
from evovlm.engine.settings import KernelSettings
from evovlm.parallel.sharded_data import find_modules

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Kernels:
    """Kernels that a run computes with: settings that were found to fit.

    Attributes:
        settings: The choices.
        recompute: Module → activation checkpointing.
    """

    settings: KernelSettings = field(default_factory=KernelSettings)
    recompute: Mapping[str, Recompute] = field(default_factory=dict)

    @property
    def norm(self) -> Literal["evovlm", "torch", "te", "apex"]:
        """Whose norms compute."""
        return "evovlm" if self.settings.norm == "auto" else self.settings.norm

    def in_fp8(self, module: str) -> bool:
        """Whether linear layers of a module compute in FP8."""
        return self.settings.fp8 != "none" and module not in self.settings.fp8_skip.modules

    def replace_layers(self, root: nn.Module, module: str, blocks: str | None) -> None:
        """Put other packages' layers in place of torch's and evovlm's. Before tensor parallelism.

        Args:
            root: The module, changed in place.
            module: ``vit``, ``projector`` or ``llm``.
            blocks: Path pattern of its blocks; without one, all its linear layers are meant.

        Raises:
            ValueError: A weight's sizes do not suit the FP8 recipe.
        """
        norm = self.norm
        if norm != "evovlm":
            replace_norms(root, norm)
        if self.settings.linear == "te":
            fp8 = self.settings.fp8 if self.in_fp8(module) else "none"
            replace_linear(root, [*self._linear_paths(root, module, blocks)], fp8)

    def _linear_paths(self, root: nn.Module, module: str, blocks: str | None) -> Iterator[str]:
        """Linear layers of blocks; under FP8 without the blocks that keep to 16 bits."""
        found = find_modules(root, blocks) if blocks else [("", root)]
        if blocks and self.in_fp8(module):
            skip = self.settings.fp8_skip
            found = found[skip.first : max(len(found) - skip.last, 0)]
        for path, block in found:
            for name, layer in block.named_modules(prefix=path):
                if type(layer) is nn.Linear:
                    yield name

    def wrap_blocks(self, root: nn.Module, module: str, blocks: str | None) -> None:
        """Compile blocks, and let those that a backward computes again do it as the forward did. Before recomputation.

        Args:
            root: The module, changed in place; names of parameters do not change.
            module: ``vit``, ``projector`` or ``llm``.
            blocks: Path pattern of its blocks.
        """
        held = [block for _, block in find_modules(root, blocks) if _has_parameters(block)] if blocks else []
        for block in held:
            if self.settings.compile == "block":
                mode = "reduce-overhead" if self._replays(module) else None
                # Blocks share their graphs, except where layers differ by a number, such as a drop path rate.
                compiler: Any = torch.compile  # its stubs lack the limit
                block.forward = compiler(block.forward, mode=mode, recompile_limit=8 * len(held))
            if self.recompute.get(module, "none") != "none":
                _run_inside(block, self._contexts(module))

    def wrap_module(self, root: nn.Module, module: str) -> None:
        """Let the module's forward run in FP8, and attend by the kind of kernel chosen. Before ``fully_shard``."""
        _run_inside(root, [*self._contexts(module), *([_new_replay] if self._replays(module) else [])])

    def _contexts(self, module: str) -> list[Context]:
        contexts: list[Context] = []
        if self.in_fp8(module):
            contexts.append(_fp8_context(self.settings.fp8))
        if self.settings.attention != "auto":
            contexts.append(partial(attention_choice, self.settings.attention))
        return contexts

    def _replays(self, module: str) -> bool:
        return self.settings.cuda_graphs and module == "llm"


def _has_parameters(block: nn.Module) -> bool:
    return next(block.parameters(), None) is not None  # without, another pipeline stage holds it


def _run_inside(module: nn.Module, contexts: Sequence[Context]) -> None:
    if contexts:
        # On the instance, so that hooks of fully_shard still run around it.
        module.forward = partial(_call_inside, contexts, module.forward)


def _call_inside(contexts: Sequence[Context], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        return forward(*args, **kwargs)


@contextmanager
def _new_replay() -> Iterator[None]:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    yield


def _fp8_context(fp8: str) -> Context:
    """What makes transformer-engine's layers compute by an FP8 recipe."""
    kind = getattr(load("transformer_engine.common.recipe"), FP8_RECIPES[fp8][0])
    # Ranks run their forwards at different times under pipelines, so scales are never reduced over ranks.
    recipe = kind(reduce_amax=False) if fp8 == "delayed" else kind()
    return partial(load("transformer_engine.pytorch").autocast, enabled=True, recipe=recipe)
