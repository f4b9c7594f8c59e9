"""Operators in C++ and CUDA, and the few primitives that every other folder shares.

``ops`` documents each tensor operator beside its plain PyTorch reference; ``_plan`` is the compiled step
planner; ``random`` is keyed randomness.
"""
