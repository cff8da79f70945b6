"""The costs of a configuration on a TPU slice, from its compiled programs. No TPU is needed.

Compiles five programs: the initializer of the state, the lookup of one table, its row update, the
optimizer of the dense parameters, and the training step. Prints bytes per chip: arguments,
temporaries, and bytes that the collectives send over the interconnect.

Needs libtpu (`pip install -e '.[tpu]'`).
"""

# The compiler's memory figures are accurate. Its own cost estimate is not: it counts all of a
# gather's operand, and the body of a loop once. So the bytes sent are computed here, from the
# shapes, groups and trip counts of the collectives.

import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jaxtyping import Array, Float, Int32

from engram_jax.command_line import parse
from engram_jax.data.packing import Batch, split_buffers
from engram_jax.errors import InputError
from engram_jax.memory import lookup
from engram_jax.memory.layout import Table
from engram_jax.memory.lookup import ReadRows
from engram_jax.memory.plan import Planner, RowPlan, SlotPlan
from engram_jax.memory.row_adam import RowAdam
from engram_jax.program import Program
from engram_jax.sharding import ROWS_SU, TABLE_RW, MeshConfig, make_mesh
from engram_jax.train_state import TrainState
from engram_jax.train_step import make_train_step
from engram_jax.typing import Parameters, PyTree

_KINDS = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2} | {
    "s64": 8, "u64": 8, "f64": 8
}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: such as "all-to-all".
        shape: of its result on one chip.
        group: number of chips in one group.
        trips: how often a step runs it; 0: it is in a loop whose trip count is not known at compile
            time (further rounds of the exchange, which are rarely needed).
        sent: bytes that a chip sends each time.
    """

    kind: str
    shape: str
    group: int
    trips: int
    sent: int


@dataclass(frozen=True)
class Cost:
    """The costs of one program on each chip.

    Attributes:
        arguments: bytes of its inputs: state, batch.
        temporaries: bytes in addition to inputs and outputs.
        collectives: in the order of the program's text.
        seconds: compile time.
        text: the compiled program.
    """

    arguments: int
    temporaries: int
    collectives: tuple[Collective, ...]
    seconds: float
    text: str

    @property
    def sent(self) -> int:
        """Bytes that a chip sends over the interconnect in a step."""
        return sum(part.sent * part.trips for part in self.collectives)


def topology_mesh(topology: str, config: MeshConfig) -> jax.sharding.Mesh:
    """The mesh of a TPU slice, for compiling without the TPU.

    Args:
        topology: generation and shape, such as "v5p:4x4x4" or "v6e:2x2".
        config: sizes of the mesh axes.

    Raises:
        InputError: libtpu is missing or does not know the topology, or sizes do not fit it.
    """
    # libtpu reads these variables when it is loaded. Without them it queries a metadata server, and
    # takes a lock for exclusive use of a TPU.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:  # its type differs between versions
        raise InputError(
            f"The topology {topology!r} is not available ({error}); install libtpu if it is "
            "missing (pip install -c constraints.txt -e '.[tpu]'), and give a generation and a "
            "shape, such as v5p:4x4x4 or v6e:2x2."
        ) from error
    return make_mesh(config, devices)


def compile_costs(program: Program) -> Iterator[tuple[str, Cost]]:
    """Compiles the five programs for a mesh (see the module's docstring), one after another."""
    state, batch = abstract_step(program)
    row_adam = program.abstract_row_adam()
    with program.use_mesh():
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        yield "first state", compile_cost(program.initializer(), seed)
        for layer in list(state.tables)[:1]:
            table, plan = state.tables[layer], batch.plan.rows[layer]
            slots = jax.tree.map(_without_first_axis, batch.plan.slots[layer])
            look_up = jax.jit(_look_up(program))
            yield "lookup", compile_cost(look_up, table, plan, slots, row_adam, state.step)
            gradient = jax.ShapeDtypeStruct(
                (*plan.places.shape, table.layout.width),
                jnp.float32,
                sharding=jax.NamedSharding(program.mesh, ROWS_SU),
            )
            update = jax.jit(_update(program), donate_argnums=0)
            read = jax.eval_shape(lookup.read_rows, table, plan, row_adam, state.step)
            arguments = table, plan, gradient, read, row_adam, state.step
            yield "row update", compile_cost(update, *arguments)
        optimize = jax.jit(_optimize(program), donate_argnums=(0, 1))
        yield "optimizer", compile_cost(optimize, state.params, state.optimizer, state.params)
        yield "training step", compile_cost(make_train_step(program), state, batch, row_adam)


def compile_cost(jitted: Any, *arguments: Any) -> Cost:
    """Compiles a jitted function for abstract arguments, and reads its costs."""
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Cost(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=tuple(read_collectives(text)),
        seconds=seconds,
        text=text,
    )


def abstract_step(program: Program) -> tuple[TrainState, Batch]:
    """Shapes, dtypes and shardings of a step's state and batch, of all processes.

    If the tables are outside the devices, the state has the buffers of a step.
    """
    data, accumulation = program.config.data, program.config.train.accumulation
    shape = (accumulation, program.config.micro_batch_size, data.sequence_length)
    tokens = np.zeros(shape, np.int32)
    plan = None
    if program.ngram_hash is not None:
        plan = Planner(
            program.ngram_hash,
            shards=program.mesh.size,
            context=program.mesh.shape["context"],
            buffered=not program.tables_on_device,
        )(tokens)
    batch = Batch(tokens, tokens, np.zeros(shape, np.float32), tokens, tokens, plan=plan)
    batch, buffers = split_buffers(batch)
    state, sharding = program.abstract_state(), jax.NamedSharding(program.mesh, TABLE_RW)
    for layer, buffer in buffers.items():
        table, count = program.tables()[layer], buffer.places.size
        records = jax.ShapeDtypeStruct((count, table.layout.words), jnp.uint32, sharding=sharding)
        places = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=sharding)
        state.tables[layer] = Table(
            *(records, table.layout, layer, places, table.rows)  # type: ignore[arg-type]
        )
    abstract = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        batch,
        program.batch_sharding(batch),
    )
    return state, abstract


def read_collectives(text: str) -> Iterator[Collective]:
    """The collectives of a compiled program, from its text."""
    trips = _trips(text)
    for computation, line in _instructions(text):
        found = re.search(rf"= (.+?) ({_KINDS})(-start)?\(", line)
        if not found or f"{found[2]}-done" in line:
            continue
        shape, kind, started = found[1], found[2], found[3]
        # The TPU compiler writes a reduce-scatter as an all-reduce in a computation of this name.
        scattered = computation.startswith("all-reduce-scatter")
        if started and kind in ("all-gather", "collective-permute"):
            # The shape is (operands, results), for a permute with two more scalars. Only the
            # results count.
            shapes = re.findall(r"\w+\[\d[\d,]*\](?:\{[^}]*\})?", shape)
            shape = ", ".join(shapes[len(shapes) // 2 :])
        group = _group_size(line)
        result = sum(_size(part) for part in re.findall(r"\w+\[[\d,]*\]", shape))
        share = (group - 1) / group
        sent = {
            "all-to-all": result * share,
            "all-gather": result * share,
            "all-reduce": (1 if scattered else 2) * result * share,
            "reduce-scatter": result * (group - 1),
            "collective-permute": result,
        }[kind]
        yield Collective(kind, shape, group, trips[computation], round(sent))


def _look_up(program: Program) -> Any:
    def look_up(
        table: Table, plan: RowPlan, slots: SlotPlan, row_adam: RowAdam, step: Int32[Array, ""]
    ) -> Float[Array, "B T E"]:
        gather = program.config.memory.gather
        rows = lookup.read_rows(table, plan, row_adam, step, gather)
        return lookup.expand(rows.values, slots, gather)

    return look_up


def _update(program: Program) -> Any:
    def update(
        table: Table,
        plan: RowPlan,
        gradient: Float[Array, "S U F"],
        read: ReadRows,
        row_adam: RowAdam,
        step: Int32[Array, ""],
    ) -> Table:
        own, scale = lookup.send_gradients(table, plan, gradient), jnp.float32(1)
        return lookup.update_rows(table, plan, gradient, own, read.own, scale, row_adam, step)

    return update


def _optimize(program: Program) -> Any:
    def optimize(params: Parameters, state: PyTree, gradient: Parameters) -> tuple[Any, Any]:
        updates, state = program.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return optimize


def _without_first_axis(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = jax.NamedSharding(leaf.sharding.mesh, jax.P(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yields every instruction, with the name of its computation."""
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        elif " = " in line:
            yield computation, line


def _trips(text: str) -> Mapping[str, int]:
    """How often a step runs each computation; 0 if the trip count of a loop is not known."""
    # The TPU compiler does not write trip counts. If a loop's condition compares with a constant,
    # that is the trip count, because JAX's loops start at 0.
    constants: dict[str, int] = {}
    limits: dict[str, int] = {}
    for computation, line in _instructions(text):
        if found := re.search(r"= s32\[\]\S* constant\((\d+)\)", line):
            constants[computation] = int(found[1])
        elif "ROOT" in line and "direction=LT" in line and computation in constants:
            limits[computation] = constants[computation]
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for caller, line in _instructions(text):
        count = 1
        if " while(" in line:
            stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            condition = re.search(r"condition=%?([\w.-]+)", line)
            limit = limits.get(condition[1], 0) if condition else 0
            count = int(stated[1]) if stated else limit
        for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", line):
            calls[called].append((caller, count))
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
            for called in branches.replace("%", "").split(", "):
                calls[called].append((caller, count))

    known: dict[str, int] = {}

    def trips(computation: str) -> int:
        if computation not in known:
            callers = calls[computation]
            known[computation] = sum(trips(by) * count for by, count in callers) if callers else 1
        return known[computation]

    return {computation: trips(computation) for computation, _ in _instructions(text)}


def _group_size(line: str) -> int:
    """Chips of one replica group: {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}."""
    if by_axis := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axis[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", by_axis[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if "source_target_pairs=" in line:
        return 1
    raise ValueError(f"The replica groups of this collective have an unknown form: {line.strip()}")


def _size(shape: str) -> int:
    kind, dimensions = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()  # type: ignore[union-attr]
    counts = map(int, filter(None, dimensions.split(",")))
    return math.prod(counts) * (1 if kind.startswith("f8") else _BYTES.get(kind, 4))


@dataclass(frozen=True)
class Options:
    """The target of the compilation.

    Attributes:
        topology: TPU generation and shape, such as v5p:4x4x4 or v6e:2x2.
    """

    topology: str = "v5p:2x2x1"


def main() -> None:
    """Parses the command line, compiles, prints a table and the collectives."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C need not wait for the compiler
    jax.config.update("jax_platforms", "cpu")  # do not occupy a TPU of this host
    name = "python -m engram_jax.ahead_of_time"
    options, config = parse(Options, __doc__ or "", program=name)
    mesh = topology_mesh(options.topology, config.mesh)
    program = Program.of_sizes(config, mesh)
    print(f"{config.name} on {mesh.size} chips ({options.topology}), MB per chip and step")
    print(
        f"{'':<14}{'arguments':>12}{'temporaries':>13}{'sent':>10}{'compiled in':>13}", flush=True
    )
    print("Compiling; the training step of a large model takes minutes.", file=sys.stderr)
    for name, cost in compile_costs(program):
        figures = [f"{value / 1e6:,.2f}" for value in (cost.arguments, cost.temporaries, cost.sent)]
        print(
            f"{name:<14}{figures[0]:>12}{figures[1]:>13}{figures[2]:>10}{cost.seconds:>11.1f} s",
            flush=True,
        )
    print("\nCollectives of the training step (number of equal ones first):")
    counts: dict[Collective, int] = defaultdict(int)
    for part in cost.collectives:
        counts[part] += 1
    for part, count in counts.items():
        trips = f"{part.trips} times" if part.trips else "unknown number of times"
        print(f"  {count:>3} {part.kind} {part.shape} in groups of {part.group}, {trips} per step")
