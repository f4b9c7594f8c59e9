"""The public API: build an engine around a model, train it step by step, evaluate it, save and load it.

``Engine`` is for programs, and what it takes and gives stands here too; ``trainer.train`` is the loop that
``evovlm train`` runs.
"""

from evovlm.data.batch import MicroBatch
from evovlm.data.share_out import WholePack, share_out
from evovlm.data.step_batch import StepBatch
from evovlm.engine.engine import Engine, StepResult
from evovlm.engine.optimizer import lr_factor
from evovlm.engine.options import EngineOptions
from evovlm.engine.runs import newest_checkpoint
from evovlm.engine.settings import FP8Skip, KernelSettings, OptimSettings
from evovlm.engine.vision import VisionModel
from evovlm.models.sharding import ModelTables
from evovlm.parallel.layout import Layout, ParallelPlan
from evovlm.parallel.world import World

__all__ = [
    "Engine",
    "EngineOptions",
    "FP8Skip",
    "KernelSettings",
    "Layout",
    "MicroBatch",
    "ModelTables",
    "OptimSettings",
    "ParallelPlan",
    "StepBatch",
    "StepResult",
    "VisionModel",
    "WholePack",
    "World",
    "lr_factor",
    "newest_checkpoint",
    "share_out",
]
