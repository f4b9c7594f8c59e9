"""Pipeline schedules: each is one process's forward and backward, and sends hidden states only."""

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from evovlm.parallel.fork import run_ranks
from evovlm.parallel.layout import Layout, Zero
from evovlm.parallel.mesh import ModuleMesh, build_mesh
from evovlm.parallel.pieces import piece_of
from evovlm.parallel.pipeline import Absent, Pipeline, Schedule, cut, relay, split_layers
from evovlm.parallel.sharded_data import accumulate_unordered, finish, free, shard_module
from evovlm.parallel.world import World

T, H, V, LAYERS, DP = 6, 8, 11, 6, 2
MESSAGE = T * H * 8  # bytes of a float64 hidden state
CASES: list[tuple[Schedule, int, Zero]] = [
    ("1f1b", 1, 1),
    ("1f1b", 1, 2),
    ("1f1b", 1, 3),
    ("interleaved", 2, 1),
    ("interleaved", 2, 3),
    ("zero_bubble", 1, 1),
    ("zero_bubble", 2, 1),
]


class Block(nn.Module):
    """Mixes rows and columns, so that swapped microbatches or wrong messages show."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(H), nn.Linear(H, 2 * H), nn.Linear(2 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return x + x.cumsum(0) / len(x)


class Net(nn.Module):
    """Embedding, blocks and head; the loss is a sum of cross-entropies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.inner = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(LAYERS))})
        self.head = nn.Linear(H, V)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in cast(nn.ModuleList, self.inner["layers"]):
            x = layer(x)
        return x if isinstance(self.head, Absent) else F.cross_entropy(self.head(x), labels, reduction="sum")[None]


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def draw(num_microbatches: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[DP, M, T]``."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, V, (DP, num_microbatches, T), generator=generator) for _ in range(2))
    return tokens, labels


def cut_net(net: Net, layers: range, *, is_first: bool, is_last: bool) -> None:
    cut(net, layers, path="inner.layers", first=None if is_first else ["embed"], last=None if is_last else ["head"])


class Messages(TorchDispatchMode):
    """Lists the bytes of every message between two ranks; counts any other collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            if func._opname == "send":
                self.sent += [tensor.nbytes for tensor in args[0]]
            elif not func._opname.startswith("recv"):
                self.others += 1
        return func(*args, **(kwargs or {}))


class Staged:
    """This rank's stages of the net, sharded, and the microbatches that they run on."""

    def __init__(self, mesh: ModuleMesh, virtual: int) -> None:
        self.mesh, self.num_stages = mesh, mesh.layout.pp * virtual
        layers = split_layers(LAYERS, self.num_stages)
        self.roots: list[Net] = []
        for local in range(virtual):
            number = mesh.place.pp + local * mesh.layout.pp
            root = make_net()
            cut_net(root, layers[number], is_first=number == 0, is_last=number == self.num_stages - 1)
            shard_module(root, "inner.layers.*", mesh)
            self.roots.append(root)
        self.tokens = self.labels = torch.empty(0)
        self.loss = 0.0
        self.hidden = torch.empty(T, H, dtype=torch.float64, device="meta")

    def load(self, num_microbatches: int, seed: int) -> None:
        tokens, labels = draw(num_microbatches, seed)
        self.tokens, self.labels, self.loss = tokens[self.mesh.place.dp], labels[self.mesh.place.dp], 0.0

    def run(self, local: int, number: int, hidden: Tensor | None) -> Tensor:
        assert (hidden is None) == (self.mesh.place.pp == 0 and local == 0)
        out: Tensor = self.roots[local](self.tokens[number] if hidden is None else hidden, self.labels[number])
        if out.ndim == 1:
            self.loss += out.item()
        return out

    def pipeline(self, schedule: Schedule, num_microbatches: int) -> Pipeline:
        group, device = self.mesh.groups["pp"], torch.device("cpu")
        return Pipeline(self.roots, self.run, group, schedule, num_microbatches, self.hidden, device)

    def evaluate(self, num_microbatches: int) -> float:
        group, device = self.mesh.groups["pp"], torch.device("cpu")
        self.load(num_microbatches, seed=77)
        relay(self.run, len(self.roots), group, num_microbatches, self.hidden, device)
        for root in self.roots:
            free(root)
        return self.loss

    def step(self, pipeline: Pipeline, seed: int) -> float:
        """Forward and backward of one step; gradients are left on the parameters."""
        self.load(pipeline.num_microbatches, seed)
        for root in self.roots:
            root.zero_grad()
            accumulate_unordered(root, self.mesh)
        pipeline.train()
        for root in self.roots:
            finish(root)
        return self.loss

    def gradient_error(self, expected: dict[str, Tensor]) -> float:
        """The largest difference from one process; infinity for a gradient or parameter that should (not) be there."""
        error = 0.0
        for root in self.roots:
            for name, parameter in root.named_parameters():
                if not isinstance(parameter.grad, DTensor):
                    return float("inf")
                piece = piece_of(parameter)
                wanted = expected[name][piece.box.slices]
                error = max([error, *(parameter.grad.to_local() - wanted).abs().flatten().tolist()])
        return error


def alone(num_microbatches: int, seed: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process."""
    net = make_net()
    tokens, labels = draw(num_microbatches, seed)
    loss = torch.stack([net(*pair) for pair in zip(tokens.flatten(0, 1), labels.flatten(0, 1), strict=True)]).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def total(world: World, value: float) -> float:
    return world.sum([value])[0]


def check(world: World, schedule: Schedule, virtual: int, zero: Zero) -> dict[str, Any]:
    """Steps of 2, 2 and 4 microbatches with an evaluation between them; differences from one process."""
    staged = Staged(build_mesh(Layout(pp=2, dp=DP, zero=zero), world.rank, "cpu"), virtual)
    pipelines = {m: staged.pipeline(schedule, m) for m in (2, 4)}
    seen: dict[str, Any] = {"loss": 0.0, "gradient": 0.0, "names": []}
    for seed, num_microbatches in enumerate((2, 2, 4)):
        loss, gradients = alone(num_microbatches, seed)
        seen["loss"] = max(seen["loss"], abs(total(world, staged.step(pipelines[num_microbatches], seed)) - loss))
        seen["gradient"] = max(seen["gradient"], staged.gradient_error(gradients))
        if seed == 0:
            seen["evaluated"] = abs(total(world, staged.evaluate(3)) - alone(3, 77)[0])
    seen["names"] = [name for root in staged.roots for name, _ in root.named_parameters()]
    return seen


def on_four_ranks(world: World) -> dict[str, Any]:
    return {f"{schedule} {virtual} {zero}": check(world, schedule, virtual, zero) for schedule, virtual, zero in CASES}


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks(4, on_four_ranks, timeout=240)


@pytest.mark.parametrize("case", [f"{schedule} {virtual} {zero}" for schedule, virtual, zero in CASES])
def test_a_schedule_is_one_process(four: list[dict[str, Any]], case: str) -> None:
    assert max(seen[case]["loss"] for seen in four) < 1e-10
    assert max(seen[case]["gradient"] for seen in four) < 1e-10
    assert max(seen[case]["evaluated"] for seen in four) < 1e-10
    names = [name for name, _ in make_net().named_parameters()]
    assert sorted(four[0][case]["names"] + four[2][case]["names"]) == sorted(names)  # each on one stage


COUNTS = [("1f1b", 1, 2), ("1f1b", 1, 5), ("interleaved", 2, 2), ("interleaved", 3, 4), ("zero_bubble", 2, 3)]


def on_two_ranks(world: World) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    mesh = build_mesh(Layout(pp=2, zero=1), world.rank, "cpu")
    for schedule, virtual, num_microbatches in cast("list[tuple[Schedule, int, int]]", COUNTS):
        staged = Staged(mesh, virtual)
        pipeline = staged.pipeline(schedule, num_microbatches)
        steps = []
        for seed in (0, 1):
            with Messages() as messages:
                staged.step(pipeline, seed)
            steps.append((messages.sent, messages.others))
        with Messages() as messages:
            staged.evaluate(num_microbatches)
        tokens, labels = draw(num_microbatches, 1)
        net = make_net()
        torch.stack([net(*pair) for pair in zip(tokens[0], labels[0], strict=True)]).sum().backward()
        expected = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        seen[f"{schedule} {virtual} {num_microbatches}"] = {
            "gradient": staged.gradient_error(expected),
            "steps": steps,
            "evaluation": (messages.sent, messages.others),
        }
    errors = {}
    for schedule, num_microbatches in cast("list[tuple[Schedule, int]]", [("1f1b", 1), ("zero_bubble", 5)]):
        try:
            Staged(mesh, 1).pipeline(schedule, num_microbatches)
        except ValueError as error:
            errors[schedule] = str(error)
    return seen | {"errors": errors}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks)


@pytest.mark.parametrize("case", [f"{schedule} {virtual} {m}" for schedule, virtual, m in COUNTS])
def test_only_hidden_states_and_their_gradients_travel(two: list[dict[str, Any]], case: str) -> None:
    virtual, num_microbatches = map(int, case.split()[1:])
    hops = 2 * virtual - 1  # between stages; each carries a hidden state down and its gradient up
    per_step = [MESSAGE] * 2 * hops * num_microbatches
    # Of both ranks together.
    first, later = ([size for seen in two for size in seen[case]["steps"][step][0]] for step in (0, 1))
    assert later == per_step
    # The first time, torch's stages agree, in 4 bytes per neighbour, that all of them were told what travels.
    assert sorted(first) == [4] * 2 * hops + per_step
    assert [others for seen in two for _, others in seen[case]["steps"]] == [0] * 4
    sent = [seen[case]["evaluation"] for seen in two]
    assert sent[0][0] + sent[1][0] == [MESSAGE] * hops * num_microbatches
    assert max(seen[case]["gradient"] for seen in two) < 1e-10


def test_too_few_microbatches_are_an_error(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert "pipeline of 2 ranks needs at least 2 microbatches, the step has 1" in seen["errors"]["1f1b"]
        assert "multiple of the number of rounds" in seen["errors"]["zero_bubble"]  # torch's own
