"""Muon (Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024), over a mesh.

With the gradient G of a matrix,

    M ← μ M + G,    update = 0.2 √max(inputs, outputs) · orthogonalize(μ M + G)

where orthogonalize(U S Vᵀ) ≈ U Vᵀ by Newton–Schulz iterations. The factor, of "Muon is Scalable for
LLM Training" (arXiv 2502.16982), gives the update the root mean square of AdamW's, so that one
learning rate serves both.

The iterations need a matrix whole, and parameters are split over the mesh. So the devices that
share a split trade pieces of as many matrices as they are: each orthogonalizes one of them whole,
and trades back.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from engram_jax.parameters import Matrix
from engram_jax.typing import PyTree

# Of Jordan's quintic: steepest at zero; singular values end between 0.68 and 1.13.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_RMS = 0.2
_EPS = 1e-8
# Pieces that are lined up at once, at most; a parameter that has more is alone. Few bytes waste
# devices (the last round of a line is not full), many cost memory.
_LINE_BYTES = 128 * 2**20


def scale_by_muon(roles: PyTree, *, momentum: float, steps: int) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized and scaled; without learning rate and decay.

    A matrix without gradient, as an expert's whom no token chooses, goes on at full size by what
    its momentum was: for some 350 steps, at μ = 0.95, until that is as small as what guards the
    division.

    Args:
        roles: `Matrix` for every parameter, in their tree.
        momentum: μ.
        steps: Newton–Schulz iterations.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        del params
        return orthogonalize_all(updates, roles, steps), state

    return optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.GradientTransformation(optax.init_empty_state, update),
    )


def orthogonalize_all(parameters: PyTree, roles: PyTree, steps: int) -> PyTree:
    """Orthogonalizes and scales every matrix of every parameter, each on one of its devices.

    A matrix that lies whole on several devices, as on those along the mesh axis "data", is
    orthogonalized by all of them.

    Args:
        parameters: arrays; inside a mesh, each matrix is split along one axis at most.
        roles: `Matrix` for each of them, in the same tree.
        steps: Newton–Schulz iterations.

    Raises:
        ValueError: a matrix is split along two axes.
    """
    arrays, tree = jax.tree.flatten(parameters)
    matrices = jax.tree.leaves(roles)
    if jax.sharding.get_abstract_mesh().empty:
        specs = [jax.P()] * len(arrays)
        return jax.tree.unflatten(tree, _orthogonalize_local(matrices, specs, steps, arrays))
    specs = [jax.typeof(array).sharding.spec for array in arrays]
    local = jax.shard_map(
        partial(_orthogonalize_local, matrices, specs, steps), in_specs=(specs,), out_specs=specs
    )
    return jax.tree.unflatten(tree, local(arrays))


def orthogonalize(
    matrix: Float[Array, "inputs outputs"], steps: int
) -> Float[Array, "inputs outputs"]:
    """U Vᵀ of a matrix U S Vᵀ, nearly: its singular values become about one. Zero stays zero."""
    inputs, outputs = matrix.shape
    a, b, c = _QUINTIC

    def iterate(_: Int[Array, ""], x: Float[Array, "short long"]) -> Float[Array, "short long"]:
        gram = x @ x.T
        return a * x + (b * gram + c * gram @ gram) @ x

    wide = matrix.T if inputs > outputs else matrix
    wide = jax.lax.fori_loop(0, steps, iterate, wide / (jnp.linalg.norm(wide) + _EPS))
    return wide.T if inputs > outputs else wide


class _Kind(NamedTuple):
    """Pieces of one kind can be lined up.

    Attributes:
        piece: shape of a device's piece of one matrix.
        inputs: axes of it that are inputs.
        axis: axis of it that is split; None: the matrix is here whole.
        over: mesh axes that it is split over.
        dealt: mesh axes that matrices are dealt to.
    """

    piece: tuple[int, ...]
    inputs: int
    axis: int | None
    over: tuple[str, ...]
    dealt: tuple[str, ...]


def _kind(array: jax.Array, matrix: Matrix, spec: jax.P) -> _Kind:
    names = [_names(entry) for entry in spec] + [()] * (array.ndim - len(spec))
    dealt = sum(names[: matrix.stacked], ())
    split = [(axis, over) for axis, over in enumerate(names[matrix.stacked :]) if over]
    if len(split) > 1:
        raise ValueError(f"A matrix may be split along one axis, not as {spec}.")
    axis, over = split[0] if split else (None, ())
    return _Kind(array.shape[matrix.stacked :], matrix.inputs, axis, over, dealt)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _orthogonalize_local(
    matrices: list[Matrix], specs: list[jax.P], steps: int, arrays: list[jax.Array]
) -> list[jax.Array]:
    """What each device does with its own parts of the parameters."""
    by_kind: dict[_Kind, list[int]] = defaultdict(list)
    for number, (array, matrix, spec) in enumerate(zip(arrays, matrices, specs, strict=True)):
        by_kind[_kind(array, matrix, spec)].append(number)
    done = list(arrays)
    for kind, numbers in by_kind.items():
        for line in _lines(numbers, arrays):
            found = _orthogonalize_line(kind, steps, [arrays[number] for number in line])
            for number, array in zip(line, found, strict=True):
                done[number] = array
    return done


def _lines(numbers: list[int], arrays: list[jax.Array]) -> Iterator[list[int]]:
    """Splits the numbers of arrays into lines of at most _LINE_BYTES."""
    line: list[int] = []
    taken = 0
    for number in numbers:
        taken += arrays[number].nbytes
        if line and taken > _LINE_BYTES:
            yield line
            line, taken = [], arrays[number].nbytes
        line.append(number)
    yield line


def _orthogonalize_line(kind: _Kind, steps: int, arrays: list[jax.Array]) -> list[jax.Array]:
    """Lines up the pieces of arrays of one kind, and orthogonalizes a round of them at a time."""
    parts = jax.lax.axis_size(kind.over) if kind.over else 1
    pieces = [array.reshape(-1, *kind.piece) for array in arrays]
    counts = [len(piece) for piece in pieces]
    missing = -sum(counts) % parts
    lined_up = jnp.concatenate([*pieces, jnp.zeros((missing, *kind.piece), pieces[0].dtype)])
    rounds = lined_up.reshape(-1, parts, *kind.piece)

    def run_round(number: Int[Array, ""], rounds: jax.Array) -> jax.Array:
        return rounds.at[number].set(_orthogonalize_round(kind, steps, rounds[number]))

    rounds = jax.lax.fori_loop(0, len(rounds), run_round, rounds)
    lined_up = rounds.reshape(-1, *kind.piece)
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return [
        lined_up[start : start + count].reshape(array.shape)
        for start, count, array in zip(starts, counts, arrays, strict=True)
    ]


def _orthogonalize_round(kind: _Kind, steps: int, pieces: jax.Array) -> jax.Array:
    """One matrix per device: trades pieces, orthogonalizes, trades back."""
    if kind.axis is None:
        whole = pieces
    else:
        whole = jax.lax.all_to_all(pieces, kind.over, 0, kind.axis + 1, tiled=True)
    shape = whole.shape[1:]
    inputs, outputs = math.prod(shape[: kind.inputs]), math.prod(shape[kind.inputs :])
    found = orthogonalize(whole.reshape(inputs, outputs), steps)
    found = (_RMS * math.sqrt(max(inputs, outputs)) * found).reshape(whole.shape)
    if kind.axis is None:
        return found
    return jax.lax.all_to_all(found, kind.over, kind.axis + 1, 0, tiled=True)
