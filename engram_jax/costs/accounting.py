"""Counts the parameters, FLOPs and bytes of state of configurations, without running them.

    python -m engram_jax.accounting [CONFIG …] [--json] [--allocation ρ] [--FIELD VALUE …]

Parameters are counted from the shapes of `jax.eval_shape`, FLOPs from the matrix products of the
traced program; the memory of a step is estimated for TPU chips (`costs/memory.py`). `--allocation`
applies §3.1 of the paper: a share ρ of the sparse parameters goes to experts, the rest to table
rows.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array

from engram_jax.command_line import parse
from engram_jax.config import Config
from engram_jax.costs.memory import estimate_bytes
from engram_jax.decoder_config import DecoderConfig, MemorySites
from engram_jax.errors import InputError
from engram_jax.layers.latent_attention import LatentAttentionConfig
from engram_jax.memory.places import exchange_capacity
from engram_jax.model import Decoder
from engram_jax.parameters import Connection, Matrix, VocabularyMatrix
from engram_jax.program import Program
from engram_jax.sharding import make_abstract_mesh
from engram_jax.train_state import device_bytes


@dataclass(frozen=True)
class Account:
    """The sizes and costs of a model.

    Attributes:
        name: of its configuration.
        vocabulary: parameters of one vocabulary matrix, V·D.
        backbone: all dense parameters except vocabulary, routed experts and hyper-connections.
        experts: parameters of the routed experts, without padding.
        active_experts: those of them that a token uses.
        hyper_connections: parameters of the hyper-connections.
        memory: parameters of the tables, without padding and optimizer state.
        forward_flops: floating-point operations of the forward pass, per token: 2 for every
            multiplication of a matrix product, attention over all T × T positions.
        training_flops: the same for forward and backward pass.
        state_bytes: bytes per chip between two steps: parameters, optimizer state, and tables, or
            the rows of a step if the tables are outside the chips.
        host_bytes: bytes of host memory per chip for tables outside the chips, with the index of
            their rows, if every row is written.
        disk_bytes: the same in files.
        bus_bytes: bytes per chip that a step receives from such tables and sends back, at most.
        chips: number of chips.
    """

    name: str
    vocabulary: int
    backbone: int
    experts: int
    active_experts: int
    hyper_connections: int
    memory: int
    forward_flops: float
    training_flops: float
    state_bytes: int
    host_bytes: int
    disk_bytes: int
    bus_bytes: int
    chips: int

    @property
    def total(self) -> int:
        """Total parameters as the paper counts them: with one vocabulary matrix, without mHC.

        The paper does not state this; it follows from its totals.
        """
        return self.vocabulary + self.backbone + self.experts + self.memory

    @property
    def activated(self) -> int:
        """Parameters that a token uses, as the paper counts them: without vocabulary and mHC."""
        return self.backbone + self.active_experts

    @property
    def sparse(self) -> int:
        """P_sparse of §3.1: parameters of idle experts and of tables."""
        return self.experts - self.active_experts + self.memory

    @property
    def allocation(self) -> float:
        """ρ of §3.1: the share of experts in the sparse parameters; 1 if there are none."""
        return (self.experts - self.active_experts) / self.sparse if self.sparse else 1.0


@cache
def account(config: Config) -> Account:
    """Counts a configuration. Its mesh gives the number of chips that share the state.

    Raises:
        InputError: sizes do not fit each other or the mesh.
    """
    mesh = make_abstract_mesh(config.mesh)
    data = config.data
    data = replace(data, batch_size=mesh.size * config.train.accumulation)
    program = Program.of_sizes(replace(config, data=data), mesh)
    state = program.abstract_state()
    counts = dict.fromkeys(("vocabulary", "experts", "hyper_connections", "backbone"), 0)
    roles = dict(jax.tree.leaves_with_path(program.roles))
    for path, leaf in jax.tree.leaves_with_path(state.params):
        role = roles[path]
        if isinstance(role, VocabularyMatrix):
            counts["vocabulary"] = leaf.size  # of one matrix, if there are two
        elif isinstance(role, Matrix) and role.experts:
            counts["experts"] += leaf.size
        else:
            is_connection = isinstance(role, Connection)
            counts["hyper_connections" if is_connection else "backbone"] += leaf.size
    experts, active = config.model.experts, 0
    if experts is not None:
        counts["experts"] = counts["experts"] * experts.routed // experts.stored
        active = counts["experts"] * experts.active // experts.routed
    forward, training = _flops_per_token(config)
    memory, bus_bytes = config.memory, _bus_bytes(program, config)
    rows = sum(program.ngram_hash.rows) if program.ngram_hash else 0
    in_file = memory.placement == "file"
    rows_outside = sum(table.rows // mesh.size for table in program.tables().values())
    rows_outside *= not program.tables_on_device
    return Account(
        name=config.name,
        **counts,
        active_experts=active,
        memory=rows * memory.row_width,
        forward_flops=forward,
        training_flops=training,
        state_bytes=device_bytes(state) + bus_bytes // 2,
        host_bytes=4 * rows_outside * (2 + (0 if in_file else memory.layout.words)),
        disk_bytes=4 * rows_outside * memory.layout.words if in_file else 0,
        bus_bytes=bus_bytes,
        chips=mesh.size,
    )


def allocate(config: Config, share: float) -> Config:
    """The configuration with another allocation of sparse parameters to experts and tables (§3.1).

    P_sparse = P_tot − P_act does not change. The share ρ of it goes to idle experts, rounded to an
    integer number of experts. The rest goes to table rows, the same number for every order. The
    width of the routers follows the number of experts. At ρ = 1 there is no memory and no layer
    that reads it. Then leading dense layers, if there are any, are widened by the parameters of
    those layers, so that P_act does not change.

    Args:
        config: a configuration with experts, and with memory unless ρ is 1.
        share: ρ, from 0 (every expert is always active) to 1.

    Raises:
        InputError: the configuration has no experts or no memory, or ρ is not from 0 to 1.
    """
    model, memory, experts = config.model, config.memory, config.model.experts
    if experts is None or not (memory.layers or share == 1):
        raise InputError(
            f"An allocation needs experts and memory, and {config.name} has no "
            f"{'memory' if experts else 'experts'}; choose a configuration that has both."
        )
    if not 0 <= share <= 1:
        raise InputError(f"The allocation is {share}; it must be between 0 and 1.")
    now = account(config)
    one_expert = now.experts / experts.routed  # in all layers
    idle = round(share * now.sparse / one_expert)
    model = replace(model, experts=replace(experts, routed=experts.active + idle))
    left = now.sparse - idle * one_expert
    columns = len(memory.layers) * memory.heads * len(memory.rows_per_head)
    rows = round(left / (columns * memory.row_width)) if share < 1 else 0
    if rows < 2:
        pure = replace(config, model=model, memory=replace(memory, layers=()))
        freed = now.activated - account(pure).activated
        column = 3 * model.width * experts.leading_dense  # one inner unit, over all dense layers
        wider = model.feed_forward + (round(freed / column) if column else 0)
        return replace(pure, model=replace(model, feed_forward=wider))
    memory = replace(memory, rows_per_head=(rows,) * len(memory.rows_per_head))
    return replace(config, model=model, memory=memory)


def decode_state_bytes(config: Config, *, sequences: int, slots: int) -> int:
    """Bytes of the state of decoding on one device.

    Per slot: keys and values, or a latent and a rotary key, of every layer; the values of an Engram
    layer with a convolution, and one number per branch; token id, document and position.

    Args:
        config: the configuration.
        sequences: number of sequences B.
        slots: slots of each of them.
    """
    model, number = config.model, jnp.dtype(config.model.dtype).itemsize
    attention = model.attention
    if isinstance(attention, LatentAttentionConfig):
        of_layer = attention.latent_width + attention.rotary_width
    else:
        of_layer = 2 * attention.kv_heads * attention.head_width
    of_slot = 3 * 4 + model.layers * of_layer * number
    if model.engram.convolution:
        branches = 1 if model.single_fusion else model.branches
        of_slot += len(config.memory.sites.layers) * (model.width * number + branches * 4)
    return sequences * (slots * of_slot + 4)


def _bus_bytes(program: Program, config: Config) -> int:
    """Bytes that a step moves between a chip and the host: buffers of records, with padding."""
    if program.tables_on_device or program.ngram_hash is None:
        return 0
    chips, words = program.mesh.size, config.memory.layout.words
    tokens = config.data.batch_size * config.data.sequence_length // chips
    total = 0
    for table in program.tables().values():
        bound = min(tokens * program.ngram_hash.columns, table.rows)
        total += exchange_capacity(bound * chips, chips, table.rows // chips)
    return 2 * 4 * words * total


def _flops_per_token(config: Config) -> tuple[float, float]:
    """FLOPs per token of the forward pass, and of forward and backward pass."""
    model, memory = config.model, config.memory
    experts = model.experts and replace(model.experts, multiple=1, implementation="ragged")
    attention = replace(model.attention, implementation="xla")
    engram = replace(model.engram, implementation=None)
    model = replace(model, experts=experts, attention=attention, engram=engram, remat=None)
    model = replace(model, scan=True)  # equal blocks are traced once
    return _traced_flops(model, memory.sites, memory.layers, config.data.sequence_length)


@lru_cache(maxsize=128)  # tracing takes longer than all other counting
def _traced_flops(
    model: DecoderConfig, sites: MemorySites, layers: tuple[int, ...], length: int
) -> tuple[float, float]:
    def make_decoder() -> Decoder:
        return Decoder(model, sites, rngs=nnx.Rngs(0, memory=1))

    graph, params = nnx.split(nnx.eval_shape(make_decoder))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    vectors = jax.ShapeDtypeStruct((1, length, sites.width), jnp.float32)
    memory = {layer: vectors for layer in layers}

    def loss(params: Any, memory: Any, tokens: Array, segments: Array, positions: Array) -> Array:
        logits, _ = nnx.merge(graph, params)(tokens, memory, segments, positions)
        return jnp.sum(logits)

    inputs = (params, memory, tokens, tokens, tokens)
    forward = jax.make_jaxpr(loss)(*inputs)
    both = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*inputs)
    return count_flops(forward.jaxpr) / length, count_flops(both.jaxpr) / length


def count_flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products in a traced program, loops unrolled.

    Args:
        jaxpr: a `jax.core.Jaxpr`. A branch counts as its largest alternative, a loop of unknown
            length once.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in ("dot_general", "ragged_dot_general"):
            total += _product_flops(equation)
        inner = [count_flops(part) for part in jaxprs_in_params(parameters)]
        within = max(inner, default=0) if name == "cond" else sum(inner)
        total += within * (parameters["length"] if name == "scan" else 1)
    return total


def _product_flops(equation: Any) -> int:
    """2 × the size of the left operand × the sizes of the right operand's free axes."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    shared: set[int] = set()
    if equation.primitive.name == "dot_general":
        (_, contracted), (_, batched) = equation.params["dimension_numbers"]
    else:
        numbers = equation.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batched) = numbers.dot_dimension_numbers
        shared |= set(numbers.rhs_group_dimensions)  # a row uses only the matrix of its group
    shared |= {*contracted, *batched}
    free = [size for axis, size in enumerate(right) if axis not in shared]
    return 2 * math.prod(left) * math.prod(free)


@dataclass(frozen=True)
class Options:
    """What to count.

    Attributes:
        json: print JSON Lines with unrounded numbers of parameters, FLOPs and bytes.
        allocation: share ρ of the sparse parameters for experts; the rest is for table rows.
    """

    json: bool = False
    allocation: float | None = None


def main(args: Sequence[str] | None = None) -> None:
    """Parses `[CONFIG …] [--flag value …]`, counts, prints; flags apply to all configurations."""
    jax.config.update("jax_platforms", "cpu")  # only shapes are needed, so no accelerator is used
    words = list(sys.argv[1:] if args is None else args)
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    accounts, flags, program = [], words[len(names) :], "python -m engram_jax.accounting"
    for name in names or ["default"]:
        options, config = parse(Options, __doc__ or "", [name, *flags], program=program)
        if options.allocation is not None:
            config = allocate(config, options.allocation)
        accounts.append((config, account(config)))
    if options.json:
        for _, counted in accounts:
            print(json.dumps(_as_plain(counted)))
        return
    print(
        f"{'':<18}{'total':>9}{'activated':>11}{'sparse':>9}{'memory':>9}{'mHC':>9}{'ρ':>8}"
        f"{'experts':>9}{'forward':>10}{'training':>10}{'state':>9}{'chips':>7}"
    )
    for config, counted in accounts:
        experts = config.model.experts
        print(
            f"{counted.name:<18}{_short(counted.total):>9}{_short(counted.activated):>11}"
            f"{_short(counted.sparse):>9}{_short(counted.memory):>9}"
            f"{_short(counted.hyper_connections):>9}{counted.allocation:>8.1%}"
            f"{experts.routed if experts else 0:>9}{_giga(counted.forward_flops):>10}"
            f"{_giga(counted.training_flops):>10}{_giga(counted.state_bytes):>9}"
            f"{counted.chips:>7}"
        )
    for config, counted in accounts:
        needed = estimate_bytes(config)
        parts = ", ".join(f"{what} {_giga(part)}" for what, part in needed.items() if part)
        print(
            f"{counted.name}: a step of {config.data.batch_size} sequences needs about "
            f"{_giga(sum(needed.values()))} GB per chip ({parts})."
        )
        if counted.host_bytes:
            print(
                f"{counted.name}: tables outside the chips, up to {_giga(counted.host_bytes)} GB "
                f"of host memory and {_giga(counted.disk_bytes)} GB of disk per chip; a step moves "
                f"up to {_giga(counted.bus_bytes)} GB per chip, in both directions together."
            )
    print(
        "\nParameters in millions (M) or billions (B); forward and training in GFLOP per token;\n"
        "state in GB per chip.\n"
        "As in the paper, total includes one vocabulary matrix and activated none; neither includes"
        " mHC."
    )


def _short(number: int | float) -> str:
    """A number in millions or billions."""
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _giga(number: int | float) -> str:
    return f"{number / 1e9:.3g}" if number < 1e9 else f"{number / 1e9:.3f}"


def _as_plain(counted: Account) -> Mapping[str, Any]:
    derived = {name: getattr(counted, name) for name in ("total", "activated", "sparse")}
    return asdict(counted) | derived | {"allocation": counted.allocation}
