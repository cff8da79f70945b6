"""What a configuration is and costs before it runs: parameters, FLOPs, bytes of state.

    python -m engram_jax.accounting [CONFIG …] [--json] [--allocation ρ] [--FIELD VALUE …]

Everything is counted: parameters from the shapes of `jax.eval_shape`, FLOPs from the matrix
products of the traced program. And the allocation of §3.1: how many experts and table rows a share
ρ of the sparse parameters makes.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array

from engram_jax.command_line import parse
from engram_jax.config import Config
from engram_jax.errors import InputError
from engram_jax.model import Decoder
from engram_jax.parameters import Connection, Matrix, VocabularyMatrix
from engram_jax.program import Program
from engram_jax.sharding import make_abstract_mesh


@dataclass(frozen=True)
class Account:
    """What a model has and does.

    Attributes:
        name: of its configuration.
        vocabulary: parameters of one vocabulary matrix, V·D.
        backbone: all dense parameters but vocabulary, routed experts and hyper-connections.
        experts: parameters of the routed experts, padding not counted.
        active_experts: of those, what a token uses.
        hyper_connections: parameters of the hyper-connections.
        memory: numbers in the tables that a hash can reach, without the optimizer's state.
        forward_flops: floating-point operations of the forward pass, per token: 2 for every
            multiplication of a matrix product, attention as the full square of T positions.
        training_flops: the same of forward and backward pass.
        state_bytes: bytes a chip holds between two steps: parameters, optimizer, tables.
        chips: how many chips that is for.
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
    chips: int

    @property
    def total(self) -> int:
        """As the paper counts, by what its totals come to: one vocabulary matrix, no mHC."""
        return self.vocabulary + self.backbone + self.experts + self.memory

    @property
    def activated(self) -> int:
        """As the paper counts: what a token uses, without vocabulary and mHC."""
        return self.backbone + self.active_experts

    @property
    def sparse(self) -> int:
        """P_sparse of §3.1: what a token leaves alone, in idle experts and in tables."""
        return self.experts - self.active_experts + self.memory

    @property
    def allocation(self) -> float:
        """ρ of §3.1: the share of the sparse parameters that is experts; 1 if there are none."""
        return (self.experts - self.active_experts) / self.sparse if self.sparse else 1.0


@cache
def account(config: Config) -> Account:
    """Counts a configuration; its mesh says over how many chips the state lies.

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
            counts["vocabulary"] = leaf.size  # of each, if there are two
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
    memory = config.memory
    rows = sum(program.ngram_hash.rows) if program.ngram_hash else 0
    return Account(
        name=config.name,
        **counts,
        active_experts=active,
        memory=rows * memory.row_width,
        forward_flops=forward,
        training_flops=training,
        state_bytes=sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        ),
        chips=mesh.size,
    )


def allocate(config: Config, share: float) -> Config:
    """The configuration with its sparse parameters dealt anew between experts and tables (§3.1).

    P_sparse = P_tot − P_act stays: the share ρ of it goes to idle experts, rounded to whole ones,
    the rest to table rows, as many of every order. Routers become wider or narrower with it. At
    ρ = 1 there is no memory, nor a layer that reads it; the leading dense layers, if there are any,
    become wider by that, so that P_act stays, too.

    Args:
        config: a configuration with experts, and with memory unless ρ is 1.
        share: ρ, from 0 (every expert is always active) to 1.

    Raises:
        InputError: the configuration has no experts or no memory, or ρ is no share.
    """
    model, memory, experts = config.model, config.memory, config.model.experts
    if experts is None or not (memory.layers or share == 1):
        raise InputError(
            f"An allocation is between experts and memory, and {config.name} lacks "
            f"{'memory' if experts else 'experts'}; name a configuration that has both."
        )
    if not 0 <= share <= 1:
        raise InputError(f"The allocation is {share}; it is a share between 0 and 1.")
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
        column = 3 * model.width * experts.leading_dense  # of all the layers
        wider = model.feed_forward + (round(freed / column) if column else 0)
        return replace(pure, model=replace(model, feed_forward=wider))
    memory = replace(memory, rows_per_head=(rows,) * len(memory.rows_per_head))
    return replace(config, model=model, memory=memory)


def _flops_per_token(config: Config) -> tuple[float, float]:
    """Of the forward pass, and of forward and backward pass, over one row of T tokens."""
    model, length = config.model, config.data.sequence_length
    experts = model.experts and replace(model.experts, multiple=1, implementation="ragged")
    attention = replace(model.attention, implementation="xla")
    engram = replace(model.engram, implementation="xla")
    model = replace(model, experts=experts, attention=attention, engram=engram, remat=None)
    sites = config.memory.sites

    def make_decoder() -> Decoder:
        return Decoder(model, sites, rngs=nnx.Rngs(0, memory=1))

    graph, params = nnx.split(nnx.eval_shape(make_decoder))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    vectors = jax.ShapeDtypeStruct((1, length, sites.width), jnp.float32)
    memory = {layer: vectors for layer in config.memory.layers}

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
    """2 × what the left side has × what the right side has and does not share with it."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    shared: set[int] = set()
    if equation.primitive.name == "dot_general":
        (_, contracted), (_, batched) = equation.params["dimension_numbers"]
    else:
        numbers = equation.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batched) = numbers.dot_dimension_numbers
        shared |= set(numbers.rhs_group_dimensions)  # a row meets the matrix of its group alone
    shared |= {*contracted, *batched}
    free = [size for axis, size in enumerate(right) if axis not in shared]
    return 2 * math.prod(left) * math.prod(free)


@dataclass(frozen=True)
class Options:
    """What to count.

    Attributes:
        json: print JSON Lines, in single parameters, FLOPs and bytes.
        allocation: share ρ of the sparse parameters that goes to experts, the rest to table rows.
    """

    json: bool = False
    allocation: float | None = None


def main(args: Sequence[str] | None = None) -> None:
    """Parses `[CONFIG …] [--flag value …]`, counts, prints; flags are of every configuration."""
    jax.config.update("jax_platforms", "cpu")  # shapes alone: leave accelerators to who trains
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
            f"{experts.routed if experts else 0:>9}{_short(counted.forward_flops):>10}"
            f"{_short(counted.training_flops):>10}{_short(counted.state_bytes):>9}"
            f"{counted.chips:>7}"
        )
    print(
        "\nParameters; floating-point operations a token; bytes of state a chip.\n"
        "Totals hold one vocabulary matrix, activated none, neither mHC (as the paper counts)."
    )


def _short(number: int | float) -> str:
    """Four digits or five, in millions or billions."""
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _as_plain(counted: Account) -> Mapping[str, Any]:
    derived = {name: getattr(counted, name) for name in ("total", "activated", "sparse")}
    return asdict(counted) | derived | {"allocation": counted.allocation}
