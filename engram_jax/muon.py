"""Muon (Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024), over a mesh.

With the gradient G of a matrix,

    M ← μ M + G,    update = 0.2 √max(inputs, outputs) · orthogonalize(μ M + G)

where orthogonalize(U S Vᵀ) ≈ U Vᵀ by Newton–Schulz iterations. The factor, from "Muon is Scalable
for LLM Training" (arXiv 2502.16982), gives the update the same root mean square as AdamW's, so that
both can use the same learning rate.

The iterations need complete matrices, but parameters are split over the mesh. So n devices that
share n matrices exchange their pieces by an all-to-all. Then each device has one complete matrix,
orthogonalizes it, and a second all-to-all returns the pieces.
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

# Coefficients of Jordan's quintic, chosen for a steep slope at zero. Singular values converge to
# the interval from 0.68 to 1.13.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_RMS = 0.2
_EPS = 1e-8
# Largest size of a group of parameters that is processed together; a larger parameter is a group by
# itself. Small groups leave devices idle in their last round, large groups need more memory.
_GROUP_BYTES = 128 * 2**20


def scale_by_muon(roles: PyTree, *, momentum: float, steps: int) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized and scaled; without learning rate and decay.

    A matrix whose gradient is zero, such as that of an expert that no token chooses, still receives
    updates of full size from its momentum. At μ = 0.95 they last for about 350 steps, until the
    momentum is as small as the epsilon of the normalization.

    Args:
        roles: `Matrix` for every parameter, in a tree like that of the parameters.
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

    A matrix that is replicated, as over the mesh axis "data", is orthogonalized on every replica.

    Args:
        parameters: arrays; inside a mesh, each matrix is split along at most one axis.
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
    """Approximately U Vᵀ of a matrix U S Vᵀ: singular values become about 1. Zero stays zero."""
    inputs, outputs = matrix.shape
    a, b, c = _QUINTIC

    def iterate(_: Int[Array, ""], x: Float[Array, "short long"]) -> Float[Array, "short long"]:
        gram = x @ x.T
        return a * x + (b * gram + c * gram @ gram) @ x

    wide = matrix.T if inputs > outputs else matrix
    wide = jax.lax.fori_loop(0, steps, iterate, wide / (jnp.linalg.norm(wide) + _EPS))
    return wide.T if inputs > outputs else wide


class _Kind(NamedTuple):
    """What parameters must have in common to be processed together.

    Attributes:
        piece: shape of a device's piece of one matrix.
        inputs: number of its axes that are inputs.
        axis: its axis that is split; None: the device has the complete matrix.
        over: mesh axes over which that axis is split.
        stacked_over: mesh axes over which the matrices of a stack are distributed.
    """

    piece: tuple[int, ...]
    inputs: int
    axis: int | None
    over: tuple[str, ...]
    stacked_over: tuple[str, ...]


def _kind(array: jax.Array, matrix: Matrix, spec: jax.P) -> _Kind:
    names = [_names(entry) for entry in spec] + [()] * (array.ndim - len(spec))
    stacked_over = sum(names[: matrix.stacked], ())
    split = [(axis, over) for axis, over in enumerate(names[matrix.stacked :]) if over]
    if len(split) > 1:
        raise ValueError(f"A matrix can only be split along one axis, not as {spec}.")
    axis, over = split[0] if split else (None, ())
    return _Kind(array.shape[matrix.stacked :], matrix.inputs, axis, over, stacked_over)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _orthogonalize_local(
    matrices: list[Matrix], specs: list[jax.P], steps: int, arrays: list[jax.Array]
) -> list[jax.Array]:
    """Orthogonalizes on one device, given its parts of the parameters."""
    by_kind: dict[_Kind, list[int]] = defaultdict(list)
    for number, (array, matrix, spec) in enumerate(zip(arrays, matrices, specs, strict=True)):
        by_kind[_kind(array, matrix, spec)].append(number)
    done = list(arrays)
    for kind, numbers in by_kind.items():
        for group in _groups(numbers, arrays):
            found = _orthogonalize_group(kind, steps, [arrays[number] for number in group])
            for number, array in zip(group, found, strict=True):
                done[number] = array
    return done


def _groups(numbers: list[int], arrays: list[jax.Array]) -> Iterator[list[int]]:
    """Splits the numbers of arrays into groups of at most _GROUP_BYTES."""
    group: list[int] = []
    taken = 0
    for number in numbers:
        taken += arrays[number].nbytes
        if group and taken > _GROUP_BYTES:
            yield group
            group, taken = [], arrays[number].nbytes
        group.append(number)
    yield group


def _orthogonalize_group(kind: _Kind, steps: int, arrays: list[jax.Array]) -> list[jax.Array]:
    """Orthogonalizes arrays of one kind in rounds, with one matrix per device in each round."""
    parts = jax.lax.axis_size(kind.over) if kind.over else 1
    pieces = [array.reshape(-1, *kind.piece) for array in arrays]
    counts = [len(piece) for piece in pieces]
    missing = -sum(counts) % parts
    padded = jnp.concatenate([*pieces, jnp.zeros((missing, *kind.piece), pieces[0].dtype)])
    rounds = padded.reshape(-1, parts, *kind.piece)

    def run_round(number: Int[Array, ""], rounds: jax.Array) -> jax.Array:
        return rounds.at[number].set(_orthogonalize_round(kind, steps, rounds[number]))

    rounds = jax.lax.fori_loop(0, len(rounds), run_round, rounds)
    found = rounds.reshape(-1, *kind.piece)
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return [
        found[start : start + count].reshape(array.shape)
        for start, count, array in zip(starts, counts, arrays, strict=True)
    ]


def _orthogonalize_round(kind: _Kind, steps: int, pieces: jax.Array) -> jax.Array:
    """One matrix per device: exchanges pieces, orthogonalizes, returns the pieces."""
    if kind.axis is None:
        complete = pieces
    else:
        complete = jax.lax.all_to_all(pieces, kind.over, 0, kind.axis + 1, tiled=True)
    shape = complete.shape[1:]
    inputs, outputs = math.prod(shape[: kind.inputs]), math.prod(shape[kind.inputs :])
    found = orthogonalize(complete.reshape(inputs, outputs), steps)
    found = (_RMS * math.sqrt(max(inputs, outputs)) * found).reshape(complete.shape)
    if kind.axis is None:
        return found
    return jax.lax.all_to_all(found, kind.over, kind.axis + 1, 0, tiled=True)
