"""The public API: build an engine around a model, train it step by step, evaluate it, save and load it.

``Engine`` is for programs; ``trainer.train`` is the loop that ``evovlm train`` runs.
"""

from evovlm.engine.engine import Engine, StepResult

__all__ = ["Engine", "StepResult"]
