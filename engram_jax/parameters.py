"""What a parameter is to the optimizer and to the mesh, declared where the parameter is made.

`nnx.Param(value, role=Matrix(…))` is a hidden matrix, `VocabularyMatrix()` says embedding or head,
`Connection()` a part of a hyper-connection; anything else has no role: a gain, a bias, a tap of a
convolution, a router of experts. These and connections are computed in float32.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from engram_jax.typing import PyTree


@dataclass(frozen=True)
class Matrix:
    """A hidden matrix or a stack of them. Its axes: those that number matrices, inputs, outputs.

    Attributes:
        stacked: leading axes that number matrices.
        inputs: axes after those that are one matrix's inputs; the rest are its outputs.
        experts: the first axis numbers experts, and lies over the mesh axis "expert".
    """

    stacked: int = 0
    inputs: int = 1
    experts: bool = False


@dataclass(frozen=True)
class VocabularyMatrix:
    """The embedding of the tokens, or the head that scores them."""


@dataclass(frozen=True)
class Plain:
    """Anything else."""


@dataclass(frozen=True)
class Connection(Plain):
    """What makes the mappings of a hyper-connection."""


type Role = Matrix | VocabularyMatrix | Plain


def role_of(variable: nnx.Variable) -> Role:
    """The role of a parameter."""
    role: Role = variable.get_metadata().get("role", Plain())
    return role


def roles(state: Any) -> PyTree:
    """The role of every parameter of an `nnx.State`, in the tree of `nnx.to_pure_dict(state)`."""
    found = jax.tree.map(role_of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(found)
