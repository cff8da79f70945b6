"""Roles of parameters: how the optimizer and the mesh treat a parameter.

The role is given where the parameter is created: `nnx.Param(value, role=Matrix(…))` for a hidden
matrix, `VocabularyMatrix()` for embedding and head, `Connection()` for hyper-connections. All other
parameters are `Plain()`: gains, biases, taps of a convolution, routers of experts. `Plain` and
`Connection` parameters are used in float32.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from engram_jax.typing import PyTree


@dataclass(frozen=True)
class Matrix:
    """A hidden matrix or a stack of them. The axes are, in order: stack, inputs, outputs.

    Attributes:
        stacked: number of leading axes that index the matrices of a stack.
        inputs: number of axes after them that are a matrix's inputs; the rest are its outputs.
        experts: the first axis indexes experts, and is split over the mesh axis "expert".
    """

    stacked: int = 0
    inputs: int = 1
    experts: bool = False


@dataclass(frozen=True)
class VocabularyMatrix:
    """The token embedding or the output head."""


@dataclass(frozen=True)
class Plain:
    """Any other parameter."""


@dataclass(frozen=True)
class Connection(Plain):
    """A parameter of a hyper-connection."""


type Role = Matrix | VocabularyMatrix | Plain


def role_of(variable: nnx.Variable) -> Role:
    """The role of a parameter."""
    role: Role = variable.get_metadata().get("role", Plain())
    return role


def roles(state: Any) -> PyTree:
    """The role of every parameter of an `nnx.State`, in the tree of `nnx.to_pure_dict(state)`."""
    found = jax.tree.map(role_of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(found)
