"""A model in the parts that one rank holds: ViT, projector, and its pipeline stages of the LLM, each sharded.

    make_model() on meta ─► kernels ─► tensor parallel ─► recompute ─► fully_shard ─► allocate
      vision_model ─────────────────────────────────────────────────────► Part("vit")
      mlp1 ─────────────────────────────────────────────────────────────► Part("projector")
      language_model ─ cut to the layers of a stage ────────────────────► Part("llm"), one for each stage held here

Parameters keep the names that they have in the whole model, whatever part they are in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from evovlm.csrc.backends import find_backends
from evovlm.engine.kernel_choice import choose_kernels
from evovlm.engine.kernels import Kernels
from evovlm.engine.recompute import Recompute, apply_recompute
from evovlm.engine.settings import KernelSettings
from evovlm.models.sharding import ModelTables
from evovlm.parallel.layout import ParallelPlan
from evovlm.parallel.mesh import ModuleMesh, build_meshes
from evovlm.parallel.pieces import write_piece
from evovlm.parallel.pipeline import cut, split_layers
from evovlm.parallel.sharded_data import find_modules, matches, shard_module
from evovlm.parallel.tensor import shard_tensors
from evovlm.parallel.world import World

NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Part:
    """One sharded module, or one pipeline stage of it.

    Attributes:
        module: ``vit``, ``projector`` or ``llm``.
        prefix: Where it stands in the whole model, with a dot at its end, or empty.
        root: The module; its own root of ``fully_shard``.
        mesh: The module's meshes.
        stage: Number of the pipeline stage.
        num_stages: Stages of the module.
        copies: Parameters that are copies of another stage's (a tied head): name here → name there.
        shared: Names in the whole model of parameters that another stage has a copy of.
    """

    module: str
    prefix: str
    root: nn.Module
    mesh: ModuleMesh
    stage: int = 0
    num_stages: int = 1
    copies: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether it takes token ids."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.stage == self.num_stages - 1

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield (name in the whole model, parameter, whether it is a copy of another stage's)."""
        for name, parameter in self.root.named_parameters():
            yield self.prefix + self.copies.get(name, name), parameter, name in self.copies


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything that one rank holds of a model.

    Attributes:
        model: The model whose submodules the ViT, the projector and the first stage held here are.
        encoder: Parts before the LLM: ViT and projector, or none.
        stages: This rank's pipeline stages of the LLM.
        shapes: Every parameter of the whole model, also those of other stages: name → shape.
        tables: How the model is sharded.
        kernels: What it computes with.
    """

    model: nn.Module
    encoder: dict[str, Part]
    stages: list[Part]
    shapes: dict[str, torch.Size]
    tables: ModelTables
    kernels: Kernels = field(default_factory=Kernels)

    def __iter__(self) -> Iterator[Part]:
        yield from self.encoder.values()
        yield from self.stages

    @property
    def hidden_size(self) -> int:
        """H: columns of the embedding, the first of what only the LLM's first stage holds.

        Raises:
            ValueError: That is no embedding.
        """
        name = f"{self.stages[0].prefix}{next(iter(self.tables.first), '')}.weight"
        if len(self.shapes.get(name, ())) != 2:
            raise ValueError(f"the first entry of ModelTables.first must be the embedding; there is no {name} [V, H]")
        return self.shapes[name][1]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield (name, parameter, whether it is a copy of another stage's) of everything held here."""
        for part in self:
            yield from part.named_parameters()


def build_parts(
    make_model: Callable[[], nn.Module],
    tables: ModelTables,
    plan: ParallelPlan,
    world: World,
    *,
    master: torch.dtype,
    compute: torch.dtype | None,
    recompute: Mapping[str, Recompute],
    freeze: Sequence[str],
    min_unit: int,
    virtual_stages: int,
    kernels: KernelSettings | None = None,
) -> Parts:
    """Build what a rank holds of a model, sharded and allocated, its weights not yet filled. Collective.

    Args:
        make_model: Constructor, called on the meta device, once for each pipeline stage held here.
        tables: How the model is sharded.
        plan: Layouts of the modules.
        world: The ranks of the run.
        master: Dtype of the parameters.
        compute: Dtype of forward and backward; None for the parameters' own.
        recompute: Module → activation checkpointing.
        freeze: Modules that are not trained.
        min_unit: Blocks of fewer parameters are gathered with their module.
        virtual_stages: Pipeline stages of each rank.
        kernels: Which kernels compute; the defaults by default.

    Raises:
        ValueError: A frozen module does not exist; there are more stages than layers; the machine or the plan does not
            allow the kernels asked for.
    """
    for module in freeze:
        if module not in tables.roots:
            raise ValueError(f"[model] freeze: there is no module {module!r}; there are: {', '.join(tables.roots)}")
    chosen = choose_kernels(
        kernels or KernelSettings(), find_backends(world.device), plan, dtype=compute or master, recompute=recompute
    )
    meshes = build_meshes(plan, world.rank, world.device.type)

    def fresh() -> nn.Module:
        with torch.device("meta"):
            return make_model().to(master)

    def prepare(model: nn.Module, module: str, ties: list[tuple[str, ...]]) -> nn.Module:
        root = model.get_submodule(tables.roots[module])
        root.requires_grad_(module not in freeze)
        mesh, blocks = meshes[module], tables.blocks.get(module)
        chosen.replace_layers(root, module, blocks)
        if mesh.tensor is not None:
            shard_tensors(root, _present(root, tables.tensor.get(module, {})), mesh.tensor)
        chosen.wrap_blocks(root, module, blocks)
        if blocks is not None:
            apply_recompute(root, blocks, recompute.get(module, "none"))
        chosen.wrap_module(root, module)
        shard_module(root, blocks, mesh, compute_dtype=compute, min_unit=min_unit)
        root.to_empty(device=world.device)
        _tie(root, ties)
        _reset_buffers(root)
        return root

    model = fresh()
    _check_tables(model, tables)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    encoder = {}
    for module, path in tables.roots.items():
        if module != "llm":
            encoder[module] = Part(module, f"{path}.", prepare(model, module, []), meshes[module])

    prefix = tables.roots["llm"]
    dotted = f"{prefix}." if prefix else ""
    llm = plan.llm
    num_stages = llm.pp * virtual_stages
    stages = []
    for local in range(virtual_stages):
        owner = model if local == 0 else fresh()
        root = owner.get_submodule(prefix)
        ties = _ties(root)
        shared: tuple[str, ...] = ()
        number = meshes["llm"].place.pp + local * llm.pp
        copies: dict[str, str] = {}
        if num_stages > 1:
            cut(
                root,
                _layers(root, tables, num_stages)[number],
                path=tables.layers,
                first=tables.first if number > 0 else None,
                last=tables.last if number < num_stages - 1 else None,
            )
            if number == num_stages - 1:
                copies = {there: here for here, *others in ties for there in others}
            if number == 0:
                shared = tuple(f"{dotted}{here}" for here, *_ in ties)
            ties = []
        root = prepare(owner, "llm", ties)
        stages.append(Part("llm", dotted, root, meshes["llm"], number, num_stages, copies, shared))
    return Parts(model, encoder, stages, shapes, tables, chosen)


def _check_tables(model: nn.Module, tables: ModelTables) -> None:
    """Refuse a pattern that fits nothing in the whole model; a pipeline stage may well lack what it fits."""
    for module, path in tables.roots.items():
        for pattern in tables.tensor.get(module, {}):
            find_modules(model.get_submodule(path), pattern)


def _present(root: nn.Module, table: Mapping[str, str]) -> dict[str, str]:
    """The entries of a tensor-parallel table whose modules exist here: another stage may hold the rest."""
    paths = [path for path, module in root.named_modules() if next(module.parameters(), None) is not None]
    return {pattern: style for pattern, style in table.items() if any(matches(path, pattern) for path in paths)}


def _layers(root: nn.Module, tables: ModelTables, num_stages: int) -> list[range]:
    """The layers of each stage, the head counted in layers."""
    blocks = list(root.get_submodule(tables.layers).children())
    per_layer = sum(p.numel() for p in blocks[0].parameters())
    head = sum(p.numel() for path in tables.last for p in root.get_submodule(path).parameters())
    return split_layers(len(blocks), num_stages, last=head / per_layer)


def _ties(root: nn.Module) -> list[tuple[str, ...]]:
    """Names that share a parameter, such as embedding and head."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [tuple(shared) for shared in names.values() if len(shared) > 1]


def _tie(root: nn.Module, ties: Iterable[tuple[str, ...]]) -> None:
    """Share parameters again that ``to_empty`` has parted."""
    for first, *others in ties:
        shared = root.get_parameter(first)
        for name in others:
            path, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(path), leaf, shared)


def _reset_buffers(root: nn.Module) -> None:
    """Let modules fill their buffers, which weights do not hold and ``to_empty`` has lost.

    Raises:
        ValueError: A buffer's module cannot, nor one around it.
    """
    able = {path: module for path, module in root.named_modules() if hasattr(module, "reset_buffers")}
    for name, _ in root.named_buffers():
        if not any(name.startswith(f"{path}.") or not path for path in able):
            raise ValueError(
                f"{type(root).__name__} has a buffer {name!r}, which a model built on the meta device must fill "
                "itself: give its module, or one around it, a method reset_buffers()"
            )
    for module in able.values():
        module.reset_buffers()


@torch.no_grad()
def load_weights(parts: Parts, weights: NamedTensors) -> None:
    """Fill a sharded model from a stream of whole tensors; each rank keeps its pieces.

    Raises:
        ValueError: A tensor is unknown to the model, has another shape, or is missing.
    """
    held: dict[str, list[nn.Parameter]] = {}
    for name, parameter, _ in parts.named_parameters():
        held.setdefault(name, []).append(parameter)
    missing = set(parts.shapes)
    for name, value in weights:
        shape = parts.shapes.get(name)
        if shape is None:
            raise ValueError(f"weights hold {name!r}, which the model does not have")
        if shape != value.shape:
            raise ValueError(f"weight {name!r} has shape {list(value.shape)}, the model {list(shape)}")
        for parameter in held.get(name, []):
            write_piece(parameter, value)
        missing.discard(name)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{len(missing)} weights are missing, such as {some}")
