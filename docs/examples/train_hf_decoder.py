"""Trains a Llama of transformers, as it is, under tp 2 × hp 2 × ZeRO 3, on the bytes of this file.

torchrun --nproc-per-node 4 docs/examples/train_hf_decoder.py [FOLDER]
python docs/examples/train_hf_decoder.py [FOLDER]      the same on 4 processes forked from this one, on the CPU
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evovlm.engine import Engine, Layout, MicroBatch, OptimSettings, ParallelPlan, StepBatch, World
from evovlm.launch.ranks import RankInfo, leave, process_group
from evovlm.models.hf.causal import HFDecoder, named_weights
from evovlm.models.hf.causal_tables import decoder_tables
from evovlm.parallel.fork import run_ranks

CONFIG = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
PLAN = ParallelPlan.for_llm(Layout(tp=2, hp=2, zero=3))
TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def make_pack(generator: torch.Generator, num_segments: int = 2, length: int = 64) -> MicroBatch:
    """Make a pack of T = num_segments · length rows; segments do not see each other, every row has a target."""
    rows = (torch.randint(len(TEXT) - length, (num_segments, 1), generator=generator) + torch.arange(length)).flatten()
    return MicroBatch(
        tokens=TEXT[rows],
        labels=TEXT[rows + 1],
        weights=torch.ones(len(rows)),
        positions=torch.arange(length, dtype=torch.float32).repeat(num_segments),
        cu_seqlens=torch.arange(num_segments + 1, dtype=torch.int32) * length,
        visual_rows=torch.empty(0, dtype=torch.int64),
    )


def main(world: World, num_steps: int = 10) -> None:
    """Train, and save a checkpoint that a run under any other plan can load."""
    make_model = lambda: HFDecoder(LlamaForCausalLM(CONFIG))  # noqa: E731
    with torch.device("meta"):
        tables = decoder_tables(make_model())
    torch.manual_seed(0)  # the same weights on every rank; named_weights also streams those of a directory
    weights, optim = named_weights(make_model()), OptimSettings(lr=0.005)
    engine = Engine.build(make_model, PLAN, world, optim=optim, weights=weights, tables=tables)
    generator, data_rank = torch.Generator().manual_seed(0), PLAN.llm.coordinates(world.rank).dp
    for step in range(num_steps):
        packs = [make_pack(generator) for _ in range(2)]  # the same on every rank, which takes its share of them
        batch = StepBatch.of_text(packs[data_rank :: PLAN.llm.dp])
        result = engine.train_step(batch, loss_denominator=sum(float(pack.weights.sum()) for pack in packs))
        if world.is_main:
            print(f"step {step:2d}   loss {result.loss:.4f}   |gradient| {result.grad_norm:.3f}", flush=True)  # noqa: T201
    engine.save(sys.argv[1] if len(sys.argv) > 1 else "build/train_hf_decoder", num_steps)


if __name__ == "__main__":
    if not (ranks := RankInfo.from_environment()).launched:
        sys.exit(run_ranks(4, main, timeout=600)[0])
    with process_group(ranks) as world:
        main(world)
    leave(0)
