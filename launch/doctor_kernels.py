"""What ``evovlm doctor`` says of kernels: of each kind which one a run here uses by default, and why not the others.

    Backends ─► attention   evovlm's operator; not flash-attn: runs on CUDA only, and this is cpu
                norm        evovlm's operator (others by [kernels] norm: torch); not apex: …

Run as a module it prints these lines as JSON: the doctor asks a process of its own, since a package may end it.
"""

import json
import sys

import torch

from evovlm.csrc.backends import Backends, Package, find_backends

Line = tuple[str, str]
"""Kind of kernel, and what is said of it."""


def kernel_lines(found: Backends) -> list[Line]:
    """Say for each kind of kernel what a run uses by default, what it can choose, and what stands in others' way."""
    cuda, engine, flash = found.device == "cuda", found.transformer_engine, found.flash_attn
    attention = ("torch's flash kernels" if cuda else "evovlm's operator", list[str]())
    if flash.usable:
        attention = (str(flash), ["torch"])
    fp8 = [recipe for recipe, problem in found.fp8.items() if not problem]
    no_fp8 = [f"fp8 {recipe}: {problem}" for recipe, problem in found.fp8.items() if problem and engine.usable]
    graphs = 'off (by [kernels] cuda_graphs, with compile = "block")' if cuda else "none: there is no CUDA device"
    return [
        ("attention", _line(*attention, [found.flash_attn_3, found.flash_attn_2])),
        ("linear", _line("torch", [*(["te"] if engine.usable else []), *(f"fp8 {r}" for r in fp8)], [engine], no_fp8)),
        (
            "norm",
            _line("evovlm's operator", ["torch", *_names(te=engine, apex=found.apex_norm)], [engine, found.apex_norm]),
        ),
        ("Adam", _line("torch, fused", _names(te=engine, apex=found.apex_adam), [engine, found.apex_adam])),
        ("compile", _line("none", ["block"] if found.compiler.usable else [], [found.compiler])),
        ("CUDA graphs", graphs),
    ]


def _names(**packages: Package) -> list[str]:
    return [name for name, package in packages.items() if package.usable]


def _line(used: str, choices: list[str], packages: list[Package], more: list[str] | None = None) -> str:
    others = f" (can be chosen: {', '.join(choices)})" if choices else ""
    absent = [str(package) for package in packages if not package.usable] + (more or [])
    return f"{used}{others}" + "".join(f"; not {reason}" for reason in absent)


def main() -> None:
    """Print the lines of this machine, and what is wrong with evovlm's own operators, as JSON."""
    found = find_backends(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    json.dump({"own": found.own.problem, "device": found.device, "lines": kernel_lines(found)}, sys.stdout)


if __name__ == "__main__":
    main()
