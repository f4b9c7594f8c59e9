"""The cases that a run's costs are fitted to: its own modules, sharded for one rank, on the shapes that it trains.

    settings, model's shape ─► parts (random weights) ─┬─► vit        0 … encode_tiles tiles
                                                       ├─► projector  the visual tokens of as many
                                                       └─► llm        packs of T, T/2 and T/4 rows: one segment,
                                                                      few, many, random ones; no, some, all targets

Forward and backward are those of the training step (``vision.py``, ``language.py``): precision, frozen modules,
recomputation and the loss are all in the times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate as running_sum
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from evovlm.csrc.random import keys, uniform
from evovlm.data.share_out import WholePack, share_out
from evovlm.engine.calibration import Case, Module
from evovlm.engine.cost_shape import run_costs
from evovlm.engine.language import Language
from evovlm.engine.objectives import CrossEntropy
from evovlm.engine.parts import Part, build_parts
from evovlm.engine.recompute import SavedBytes
from evovlm.engine.settings import DTYPES, RunSettings
from evovlm.engine.vision import Vision, VisionModel, VisualTokens
from evovlm.models.config import InternVLConfig
from evovlm.models.internvl import InternVL
from evovlm.models.sharding import INTERNVL
from evovlm.models.table import num_parameters
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.sharded_data import accumulate, free
from evovlm.parallel.world import World

_SHORTEST = 32  # tokens of a segment in packs of many: shorter ones cost calls of kernels more than work


def weight_bytes(config: InternVLConfig, freeze: Sequence[str]) -> int:
    """Bytes of float32 weights and gradients, on one rank and without an optimizer."""
    count = num_parameters(config)
    return sum(4 * count[module] * (1 if module in freeze else 2) for module in ("vit", "projector", "llm"))


def split_evenly(rows: int, parts: int) -> list[int]:
    """Cut rows into equal segments, the first of them one longer where they do not divide."""
    parts = max(1, min(parts, rows))
    return [rows // parts + (number < rows % parts) for number in range(parts)]


def draw_lengths(rows: int, number: int) -> list[int]:
    """Random segment lengths that fill a pack: log-uniform, so that few are long and many short.

    Args:
        rows: T.
        number: Which draw.
    """
    shortest = min(_SHORTEST, rows)
    draws = uniform(keys("calibrate", number, np.arange(rows)))
    lengths: list[int] = []
    for draw in draws.tolist():
        left = rows - sum(lengths)
        if not left:
            break
        lengths.append(min(left, round(shortest * (rows / shortest) ** draw)))
    return lengths


def make_cases(settings: RunSettings, config: InternVLConfig, world: World, *, supervised: float = 1.0) -> list[Case]:
    """Build the model for one rank, and list what to time. Collective over the one rank.

    Args:
        settings: The run's.
        config: Shape of its model.
        world: One rank.
        supervised: Share of rows that have a target.

    Raises:
        ValueError: There is more than one rank.
    """
    if world.size != 1:
        raise ValueError(f"modules are timed by one rank, not by {world.size}: start one process")
    return Bench(settings, config, world, supervised).cases()


class Bench:
    """A model on one rank whose modules can be run one by one.

    Args:
        settings: The run's.
        config: Shape of its model.
        world: One rank.
        supervised: Share of rows that have a target.
    """

    def __init__(self, settings: RunSettings, config: InternVLConfig, world: World, supervised: float) -> None:
        if {"vit", "projector", "llm"} <= set(settings.model.freeze):
            raise ValueError("[model] freeze names every module: nothing is trained, so there is no step to time")
        self._settings, self._config, self._world, self._supervised = settings, config, world, supervised
        chosen, dtypes = settings.parallel, DTYPES[settings.precision]
        self._plan = ParallelPlan(
            **{name: Layout(zero=getattr(chosen, name).zero) for name in ("vit", "projector", "llm")}
        )
        self._parts = build_parts(
            lambda: InternVL(config),
            INTERNVL,
            self._plan,
            world,
            master=dtypes.master,
            compute=None if dtypes.compute == dtypes.master else dtypes.compute,
            recompute=settings.recompute.model_dump(),
            freeze=settings.model.freeze,
            min_unit=chosen.min_unit,
            virtual_stages=1,
        )
        self._fill()
        self._model = cast(VisionModel, self._parts.model)
        self._vit, self._projector = self._parts.encoder["vit"], self._parts.encoder["projector"]
        self._vision = Vision(
            self._parts, self._plan, world, encode_tiles=chosen.encode_tiles, activations="keep", memory=0.0
        )
        self._language = Language(self._parts.stages, self._parts.hidden_size, dtypes.compute, "1f1b", world.device)
        self._costs = run_costs(settings, config)
        self._encoded: dict[int, VisualTokens] = {}
        # What the engine does with a chunk beside one forward and backward.
        self._again = chosen.encoder_activations == "recompute" and self._vision.trains

    @torch.no_grad()
    def _fill(self) -> None:
        """Random weights of about the usual size: times do not depend on them, but for NaN and denormal numbers."""
        generator = torch.Generator(self._world.device).manual_seed(0)
        for part in self._parts:
            part.root.train()
            for parameter in part.root.parameters():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                if parameter.dim() == 1:
                    local.fill_(1.0)
                else:
                    local.normal_(0.0, 0.02, generator=generator)

    def cases(self) -> list[Case]:
        """All cases, with the memory that each is foretold to need."""
        most, rows = self._settings.parallel.encode_tiles, self._settings.data.pack_tokens
        counts = sorted({0, *(-(-most // part) for part in (8, 4, 2, 1))})
        checks = {max(1, 3 * most // 4)} - set(counts)
        made = [self._vit_case(n, held_out=n in checks) for n in (*counts, *checks)]
        made += [self._projector_case(n, held_out=n in checks) for n in (*counts, *checks)]
        wanted = [(rows, parts) for parts in (1, 2, 8, 64)] + [(rows // part, n) for part in (2, 4) for n in (1, 8)]
        cut = [split_evenly(whole, min(parts, max(1, whole // _SHORTEST))) for whole, parts in wanted]
        cut += [draw_lengths(rows, 0), draw_lengths(rows, 1)]
        packs = [(lengths, self._supervised) for lengths in cut]
        packs += [(cut[2], 0.0), (cut[2], 1.0)]
        held_out = [(lengths, self._supervised) for lengths in (split_evenly(rows, 4), draw_lengths(rows, 2))]
        held_out += [(draw_lengths(rows, 3), (1 + self._supervised) / 2)]
        seen: set[tuple[int, ...]] = set()
        for number, (lengths, supervised) in enumerate((*packs, *held_out)):
            if sum(lengths):
                case = self._llm_case(lengths, supervised, held_out=number >= len(packs))
                if case.features not in seen:  # a tiny pack has few ways to be cut
                    seen.add(case.features)
                    made.append(case)
        return self._with_memory(made)

    def _with_memory(self, cases: Sequence[Case]) -> list[Case]:
        """Foretell the memory of every case from the activations that a small one keeps."""
        per_unit: dict[Module, float] = {}
        for module, smallest in _smallest(cases).items():
            saved = SavedBytes()
            with saved:
                smallest.work()
            per_unit[module] = saved.count / smallest.features[0]
        return [replace(case, num_bytes=per_unit[case.module] * case.features[0]) for case in cases]

    def _vit_case(self, num_tiles: int, *, held_out: bool) -> Case:
        size, device = self._config.vision.tile_size, self._world.device
        generator = torch.Generator().manual_seed(num_tiles)
        tiles = torch.randn(num_tiles, 3, size, size, generator=generator)
        tile_keys = torch.arange(num_tiles)
        trained = _trains(self._vit.root)

        def see() -> Tensor:
            return self._model.see(tiles.to(device), tile_keys.to(device))

        work = self._encoder_work(see, self._vit, trained)
        features = (num_tiles, 1)
        return Case("vit", f"{num_tiles} tiles", features, work, self._costs.vit.predict(num_tiles), held_out=held_out)

    def _projector_case(self, num_tiles: int, *, held_out: bool) -> Case:
        rows, device = num_tiles * self._config.tokens_per_tile, self._world.device
        generator = torch.Generator().manual_seed(num_tiles)
        features = torch.randn(rows, self._config.shuffled_size, generator=generator)
        features = features.to(device, DTYPES[self._settings.precision].compute)
        features.requires_grad_(_trains(self._vit.root))

        def project() -> Tensor:
            features.grad = None
            return self._model.project(features)

        work = self._encoder_work(project, self._projector, self._vision.trains)
        cost = self._costs.projector.predict(rows)
        return Case("projector", f"{rows} visual tokens", (rows, 1), work, cost, held_out=held_out)

    def _encoder_work(self, forward: Callable[[], Tensor], part: Part, backward: bool) -> Callable[[], None]:
        """One chunk through a part of the encoder, as :class:`Vision` runs it."""

        def work() -> None:
            if self._again or not backward:
                with torch.no_grad():
                    forward()
            if backward:
                if _trains(part.root):
                    accumulate(part.root, part.mesh, last=True)
                out = forward()
                torch.autograd.backward(out, torch.ones_like(out))
            elif self._again:
                with torch.no_grad():
                    forward()
            free(part.root)
            self._wait()

        return work

    def _llm_case(self, lengths: Sequence[int], supervised: float, *, held_out: bool) -> Case:
        rows, squares = sum(lengths), sum(length**2 for length in lengths)
        pack = self._pack(lengths, supervised)
        targets = int(pack.weights.count_nonzero())
        visual = self._visual(pack)

        def work() -> None:
            self._language.train([pack], visual, CrossEntropy(rows, self._world.device))
            self._wait()

        cost = self._costs.llm.predict(rows, squares, targets)
        even = max(lengths) - min(lengths) <= 1
        name = f"{rows} rows: {len(lengths)} × {lengths[-1]}" if even else f"{rows} rows: {len(lengths)} random"
        name += f", {targets} targets"
        return Case("llm", name, (rows, squares, targets, 1), work, cost, held_out=held_out)

    def _visual(self, pack: WholePack) -> VisualTokens:
        """The visual tokens of a pack, which are the same for all, as leaves; the encoder's graph is let go."""
        num_tiles = len(pack.tiles)
        if num_tiles not in self._encoded:
            batch = share_out([pack], self._plan, 0, self._config.tokens_per_tile)
            encoded = self._vision.encode(batch, self._language.shards(len(pack.tokens)))
            self._encoded[num_tiles] = replace(encoded, sent=[])
        return self._encoded[num_tiles]

    def _pack(self, lengths: Sequence[int], supervised: float) -> WholePack:
        """A pack without padding; its first rows are one tile's, if it is long enough."""
        rows, per_tile = sum(lengths), self._config.tokens_per_tile
        num_tiles, size = int(per_tile < rows), self._config.vision.tile_size
        generator = torch.Generator().manual_seed(rows)
        tokens = torch.randint(self._config.decoder.vocab_size, (rows,), generator=generator)
        targets = torch.rand(rows, generator=generator) < supervised
        return WholePack(
            tokens=tokens,
            labels=torch.where(targets, tokens.roll(-1), -100),
            weights=targets.float(),
            positions=torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths]),
            cu_seqlens=torch.tensor([0, *running_sum(lengths)], dtype=torch.int32),
            visual_rows=torch.arange(num_tiles * per_tile),
            tiles=torch.zeros(num_tiles, 3, size, size),
            tile_keys=torch.arange(num_tiles),
            image_tiles=[1] * num_tiles,
        )

    def _wait(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)


def _smallest(cases: Sequence[Case]) -> Mapping[Module, Case]:
    """Each module's case of the least weight that is not empty."""
    found: dict[Module, Case] = {}
    for case in sorted(cases, key=lambda case: case.weight):
        if case.features[0]:
            found.setdefault(case.module, case)
    return found


def _trains(root: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in root.parameters())
