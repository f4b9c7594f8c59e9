"""What a step will cost each rank, before it runs: one linear model for each module.

    ViT        per_tile · tiles + per_call                      tiles of a chunk
    projector  per_visual_token · visual tokens + per_call      rows of a chunk
    LLM        per_token · T + per_square · Σ l²                T rows of a pack, l the lengths of its segments
               + per_target · targets + per_pack                rows that pass the output head

    model's shape ─► FLOPs ──────┐
    measured times ─► ns ────────┴─► CostModel ─► cost.json ─► integers ─► the plan

A plan must be the same on every rank and platform, so it is made of integers: :meth:`CostModel.integers` scales all
coefficients by one rational number, and only that integer arithmetic decides what goes where.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

VERSION = 1
PLAN_LIMIT = 2**46
"""No pack and no module costs as much in integers: 131,072 of them still add up below 2⁶³."""
MAX_TOKENS, MAX_TILES = 131_072, 1024
"""Rows of the longest pack and most tiles of one that :meth:`CostModel.integers` provides for by default."""

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionCost(_Record):
    """Cost of the ViT on a chunk of tiles."""

    per_tile: Coefficient
    per_call: Coefficient = 0.0

    def predict(self, num_tiles: float) -> float:
        """Cost of a chunk."""
        return self.per_tile * num_tiles + self.per_call


class ProjectorCost(_Record):
    """Cost of the projector on a chunk of visual tokens."""

    per_visual_token: Coefficient
    per_call: Coefficient = 0.0

    def predict(self, num_visual_tokens: float) -> float:
        """Cost of a chunk."""
        return self.per_visual_token * num_visual_tokens + self.per_call


@dataclass(frozen=True)
class IntegerCosts:
    """Costs as plans compute them: int64, comparable across modules, the same on every rank and platform.

    Attributes:
        per_token: A, of the LLM.
        per_square: B, of the LLM.
        per_pack: C, of the LLM.
        per_tile: Of the ViT.
        per_visual_token: Of the projector.
        max_tokens: Rows of the longest pack.
        max_tiles: Most tiles of a pack or an image.
        per_target: Of the LLM's output head.
    """

    per_token: int
    per_square: int
    per_pack: int
    per_tile: int
    per_visual_token: int
    max_tokens: int
    max_tiles: int
    per_target: int = 0

    def pack_costs(
        self, sum_squares: NDArray[np.int64], num_targets: NDArray[np.int64], num_rows: int
    ) -> NDArray[np.int64]:
        """Cost of the LLM on packs: A·T + B·Σ l² + H·targets + C.

        Args:
            sum_squares: int64 ``[G]``, Σ l² over the segments of each pack. Padding is a segment, too.
            num_targets: int64 ``[G]``, rows of each pack that have a target.
            num_rows: T, rows of every pack, padding included.

        Returns:
            int64 ``[G]``, each below 2⁴⁶.

        Raises:
            ValueError: A pack is longer than ``max_tokens``, or its segments or targets are more than its rows.
        """
        squares, targets = np.asarray(sum_squares, np.int64), np.asarray(num_targets, np.int64)
        if not 0 <= num_rows <= self.max_tokens:
            raise ValueError(f"packs of {num_rows} rows, but costs are scaled for at most {self.max_tokens}")
        if squares.size and not 0 <= squares.min() <= squares.max() <= num_rows**2:
            raise ValueError(
                f"sums of squared lengths from {squares.min()} to {squares.max()}, but a pack of {num_rows} rows has "
                f"at most {num_rows}² = {num_rows**2}"
            )
        if targets.size and not 0 <= targets.min() <= targets.max() <= num_rows:
            raise ValueError(f"from {targets.min()} to {targets.max()} targets in packs of {num_rows} rows")
        return self.per_square * squares + self.per_target * targets + (self.per_token * num_rows + self.per_pack)

    def sample_costs(
        self,
        lengths: NDArray[np.int64],
        num_targets: NDArray[np.int64],
        squares: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """What samples add to the cost of a pack: A·l + B·l² + H·targets.

        Args:
            lengths: integers ``[n]``, tokens of each.
            num_targets: int64 ``[n]``, those of them that have a target.
            squares: int64 ``[n]``, what attention costs instead of l², where answers do not see each other.

        Returns:
            int64 ``[n]``.

        Raises:
            ValueError: A sample is longer than ``max_tokens``.
        """
        lengths = np.asarray(lengths, np.int64)
        if lengths.size and not 0 <= lengths.min() <= lengths.max() <= self.max_tokens:
            raise ValueError(
                f"samples of {lengths.min()} to {lengths.max()} tokens, but costs are scaled for at most "
                f"{self.max_tokens}"
            )
        squares = lengths**2 if squares is None else squares
        return self.per_square * squares + self.per_token * lengths + self.per_target * num_targets

    def vit_costs(self, tiles: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cost of the ViT on images, or ranks, of int64 ``[n]`` tiles."""
        return self.per_tile * np.asarray(tiles, np.int64)

    def projector_costs(self, visual_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cost of the projector on int64 ``[n]`` visual tokens."""
        return self.per_visual_token * np.asarray(visual_tokens, np.int64)


class LLMCost(_Record):
    """Cost of the LLM on a pack: ``per_token · T + per_square · Σ l² + per_target · targets + per_pack``."""

    per_token: Coefficient
    per_square: Coefficient
    per_target: Coefficient
    per_pack: Coefficient = 0.0

    @model_validator(mode="after")
    def _not_free(self) -> "LLMCost":
        if self.per_token == self.per_square == 0:
            raise ValueError("per_token and per_square are both 0: every pack would cost the same")
        return self

    def predict(self, num_rows: float, sum_squares: float, num_targets: float) -> float:
        """Cost of a pack of T rows; ``sum_squares`` is Σ l² over its segments, padding among them."""
        rows = self.per_token * num_rows + self.per_square * sum_squares
        return rows + self.per_target * num_targets + self.per_pack


class Fit(_Record):
    """How well a module's coefficients explain the times they were fitted to, as shares of the measured times.

    Attributes:
        cases: Times that were fitted.
        median_error: Median of |predicted − measured| / measured over them.
        largest_error: The largest of those.
        held_out: Times that were measured and not fitted.
        held_out_error: The largest error of those; None without any.
        spread: Median over all cases of (slowest − fastest) / median of the repetitions: the machine's own noise.
    """

    cases: int = Field(ge=1)
    median_error: Coefficient
    largest_error: Coefficient
    held_out: int = Field(0, ge=0)
    held_out_error: Coefficient | None = None
    spread: Coefficient = 0.0


class CostModel(_Record):
    """Cost models of the three modules.

    Attributes:
        version: Of the file format.
        source: ``shape``: counted from the model's shape; ``calibrated``: fitted to times measured on ``machine``.
        unit: ``flops`` or ``ns``, of a forward and backward as the run does them.
        machine: Where it was measured.
        about: What else the numbers belong to: versions, pack size, precision.
        vit: Of the ViT.
        projector: Of the projector.
        llm: Of the LLM.
        fits: Of each module, how well the times fit.
    """

    version: Literal[1] = 1
    source: Literal["shape", "calibrated"]
    unit: Literal["flops", "ns"]
    machine: str | None = None
    about: dict[str, str] = {}
    vit: VisionCost
    projector: ProjectorCost
    llm: LLMCost
    fits: dict[Literal["vit", "projector", "llm"], Fit] = {}

    @model_validator(mode="after")
    def _unit_of_source(self) -> "CostModel":
        wanted = {"shape": "flops", "calibrated": "ns"}[self.source]
        if self.unit != wanted:
            raise ValueError(f"costs of source {self.source!r} are in {wanted!r}, not in {self.unit!r}")
        return self

    @classmethod
    def from_shape(
        cls, *, per_tile: float, per_visual_token: float, per_token: float, per_square: float, per_target: float = 0.0
    ) -> "CostModel":
        """Costs of a model that was not measured, in FLOPs of a forward and backward.

        Args:
            per_tile: Of the ViT, for each tile.
            per_visual_token: Of the projector, for each visual token.
            per_token: Of the LLM's matrix products, for each row of a pack.
            per_square: Of causal attention over all layers, for each squared token of a segment.
            per_target: Of the output head, for each row that has a target.
        """
        return cls(
            source="shape",
            unit="flops",
            vit=VisionCost(per_tile=float(per_tile)),
            projector=ProjectorCost(per_visual_token=float(per_visual_token)),
            llm=LLMCost(per_token=float(per_token), per_square=float(per_square), per_target=float(per_target)),
        )

    def integers(self, max_tokens: int = MAX_TOKENS, max_tiles: int = MAX_TILES) -> IntegerCosts:
        """Scale all coefficients alike and round them, half up.

        They are multiplied by the largest power of two at which the dearest pack (one segment of ``max_tokens``, all of
        them targets), the projector on as many visual tokens, and the ViT on ``max_tiles`` each cost less than 2⁴⁶,
        rounded, and divided by what they have in common. Rational arithmetic alone: the saved coefficients decide, not
        the platform's rounding. What a ViT or projector spends on every call alike is left out: no plan can change it.

        Args:
            max_tokens: Rows of the longest pack, such as the recipe's ``pack_tokens``: a smaller bound rounds less.
            max_tiles: Most tiles of a pack.

        Raises:
            ValueError: The bounds are not in 1 … 2²⁰.
        """
        if not (1 <= max_tokens <= 2**20 and 1 <= max_tiles <= 2**20):
            raise ValueError(
                f"max_tokens = {max_tokens}, max_tiles = {max_tiles}: costs can be scaled for packs of 1 to {2**20} "
                "tokens and tiles"
            )
        llm, vit, projector = self.llm, self.vit, self.projector
        of_llm = (llm.per_token, llm.per_square, llm.per_target, llm.per_pack)
        exact = [Fraction(coefficient) for coefficient in (*of_llm, vit.per_tile, projector.per_visual_token)]
        ratio = PLAN_LIMIT / _dearest(exact, max_tokens, max_tiles)
        scale = Fraction(2) ** (ratio.numerator.bit_length() - ratio.denominator.bit_length() + 1)
        while _dearest(scaled := [_round(x * scale) for x in exact], max_tokens, max_tiles) >= PLAN_LIMIT:
            scale /= 2
        common = math.gcd(*scaled)
        a, b, target, c, tile, token = (coefficient // common for coefficient in scaled)
        return IntegerCosts(a, b, c, tile, token, max_tokens, max_tiles, target)

    def save(self, path: Path) -> None:
        """Write the file; its folder is made. ``load`` gives back exactly the same numbers."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "CostModel":
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is no such file; the message names the file and every key that is wrong.
        """
        try:
            content: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no cost model at {path}; make one with: evovlm calibrate RECIPE --out {path}"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object of costs, got {type(content).__name__}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path}: version = {content.get('version')!r}; this evovlm reads version {VERSION}: calibrate again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError("\n".join(_describe(path, item) for item in error.errors())) from error


def _dearest(coefficients: Sequence[Fraction] | Sequence[int], max_tokens: int, max_tiles: int) -> Fraction:
    """The most that a pack, its visual tokens or its tiles can cost."""
    per_token, per_square, per_target, per_pack, per_tile, per_visual_token = map(Fraction, coefficients)
    pack = (per_square * max_tokens + per_token + per_target) * max_tokens + per_pack
    return max(pack, per_tile * max_tiles, per_visual_token * max_tokens)


def _round(value: Fraction) -> int:
    """Round half up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def _describe(path: Path, item: Mapping[str, Any]) -> str:
    """One line of a file's mistake."""
    key = ".".join(map(str, item["loc"]))
    where = f"{path}: '{key}'" if key else f"{path}"
    if item["type"] == "missing":
        return f"{where} is missing"
    if item["type"] == "extra_forbidden":
        return f"{where} is not a key of a cost model"
    given = "" if isinstance(item["input"], dict | BaseModel) else f" = {item['input']!r}"
    return f"{where}{given}: {item['msg'].removeprefix('Value error, ').removeprefix('Input ')}"
