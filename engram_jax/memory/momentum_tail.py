"""The momentum updates that a row still receives after its last gradient. Pure NumPy.

Dense Adam also changes a row whose gradient is zero, because its first moment is not zero. After
the last gradient, at step s, the moments m and v decay, and the sum of all later updates is

    −Σₖ lrᵢ · β₁ᵏ m / (1−β₁ⁱ) / (√(β₂ᵏ v / (1−β₂ⁱ)) + ε)  =  −m Σₖ aₖ / (bₖ √v + ε)

over k = 1, 2, …, with i = s + k, lrᵢ the learning rate of step i, aₖ = lrᵢ β₁ᵏ/(1−β₁ⁱ) and
bₖ = √(β₂ᵏ/(1−β₂ⁱ)). These are hundreds of terms for every element.
As a function of x = ε/√v, the sum is Σ (aₖ/bₖ) · bₖ/(bₖ + x): the integral of a smooth function of
log b against the weights aₖ/bₖ. A Gauss rule in log b replaces the hundreds of terms by a few:
5 nodes for (0.9, 0.999), 8 for (0.9, 0.95), for any ε and v. (In b itself the rule would converge
slowly, because the function has its pole at −x, which can be arbitrarily close.)

The pending update of a row between two steps is the difference of two such sums: the sum after the
earlier step minus the sum after the later step, at which the moments have decayed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64
from tqdm import tqdm

from engram_jax.errors import InputError

# Maximum relative error from truncating the sum over steps, and of the Gauss rule.
_TAIL = 1e-8
_RULE = 1e-7
_MOST_NODES = 24
_MOST_TERMS = 4000
_MOST_STEPS = 10_000_000  # about six minutes
_TOO_SLOW = (
    "With b1 {b1} and b2 {b2}, the momentum of idle rows decays too slowly for exact row Adam; "
    "raise b2, lower b1, or choose lazy row Adam."
)


class MomentumTail(NamedTuple):
    """The Gauss rule of every step: all later updates sum to −m Σⱼ weightⱼ / (nodeⱼ √v + ε).

    Attributes:
        nodes: b, for a row last written by step s = 0, 1, … steps.
        weights: a.
    """

    nodes: Float32[Any, "steps nodes"]
    weights: Float32[Any, "steps nodes"]


def make_momentum_tail(
    learning_rate: Callable[[np.ndarray], np.ndarray], steps: int, b1: float, b2: float
) -> MomentumTail:
    """The rules for rows last written by step 0 … steps.

    Args:
        learning_rate: function of the number of finished steps, like optax's schedules; step i uses
            the value at i − 1. It is also called beyond `steps`, for updates after the last step.
        steps: last step of the run.
        b1: decay of the first moment.
        b2: decay of the second moment.

    Raises:
        InputError: the updates of an idle row have no finite sum (b1² ≥ b2), its momentum decays
            too slowly for a short rule, or there are too many steps.
    """
    if not 0 <= b1 < 1 or not b1**2 < b2 < 1:
        raise InputError(
            f"Exact row Adam needs b1² < b2, or idle rows never stop moving; b1 is {b1} and b2 is "
            f"{b2}. Change them, or choose lazy row Adam."
        )
    ratio = b1 / math.sqrt(b2)
    terms = 1 if b1 == 0 else max(1, math.ceil(math.log(_TAIL * (1 - ratio)) / math.log(ratio)))
    if steps > _MOST_STEPS:
        raise InputError(
            f"Exact row Adam has a rule for every step, and train.steps is {steps}; lower it to "
            f"{_MOST_STEPS}, or set memory.adam.form to lazy."
        )
    if terms > _MOST_TERMS:
        raise InputError(_TOO_SLOW.format(b1=b1, b2=b2))
    rates = np.asarray(learning_rate(np.arange(steps + terms)), np.float64)
    last_written = np.arange(steps + 1)
    for count in range(1, _MOST_NODES + 1):
        # The error is largest at the first steps, where bias correction changes b the most.
        probes = np.unique(np.minimum([0, 1, 2, 4, 8, 16, 64, 256, 1024, steps], steps))
        rule = _gauss_rules(probes, rates, terms, count, b1, b2)
        if _error(probes, rates, terms, rule, b1, b2) < _RULE:
            break
    else:
        raise InputError(_TOO_SLOW.format(b1=b1, b2=b2))
    split = np.array_split(last_written, -(-len(last_written) // 512))
    blocks = [
        _gauss_rules(block, rates, terms, count, b1, b2)
        for block in tqdm(split, "rules of exact row Adam", unit="block", delay=2)
    ]
    nodes, weights = (
        np.concatenate(parts).astype(np.float32) for parts in zip(*blocks, strict=True)
    )
    return MomentumTail(nodes, weights)


def _atoms(
    last_written: np.ndarray, rates: np.ndarray, terms: int, b1: float, b2: float
) -> tuple[Float64[np.ndarray, "rules terms"], Float64[np.ndarray, "rules terms"]]:
    """a/b and log b of every term; in logarithms, because a and b of late terms underflow."""
    after = np.arange(1, terms + 1)
    step = last_written[:, None] + after
    log_b = (after * _log(b2) - np.log(-np.expm1(step * _log(b2)))) / 2
    log_a = after * _log(b1) - np.log(-np.expm1(step * _log(b1)))
    return rates[step - 1] * np.exp(log_a - log_b), log_b


def _log(decay: float) -> float:
    return math.log(decay) if decay else -math.inf


def _gauss_rules(
    last_written: np.ndarray, rates: np.ndarray, terms: int, count: int, b1: float, b2: float
) -> tuple[Float64[np.ndarray, "rules nodes"], Float64[np.ndarray, "rules nodes"]]:
    """Nodes b and weights a of the rules with `count` nodes: Lanczos, then Golub and Welsch."""
    measure, position = _atoms(last_written, rates, terms, b1, b2)
    count = min(count, terms)
    total = measure.sum(axis=1)
    basis = [np.sqrt(measure / np.where(total > 0, total, 1)[:, None])]
    jacobi = np.zeros((len(measure), count, count))
    for column in range(count):
        image = position * basis[-1]
        jacobi[:, column, column] = (image * basis[-1]).sum(axis=1)
        for _ in range(2):  # orthogonalize twice, against rounding
            for vector in basis:
                image -= (image * vector).sum(axis=1, keepdims=True) * vector
        norm = np.linalg.norm(image, axis=1)
        if column + 1 < count:
            jacobi[:, column, column + 1] = jacobi[:, column + 1, column] = norm
        basis.append(image / np.where(norm > 0, norm, 1)[:, None])
    position, vectors = np.linalg.eigh(jacobi)
    nodes = np.exp(position)
    return nodes, vectors[:, 0] ** 2 * total[:, None] * nodes


def _error(
    last_written: np.ndarray,
    rates: np.ndarray,
    terms: int,
    rule: tuple[np.ndarray, np.ndarray],
    b1: float,
    b2: float,
) -> float:
    """Largest relative error of rules against the sums they replace, over x = ε/√v."""
    measure, position = _atoms(last_written, rates, terms, b1, b2)
    nodes, weights = rule
    b, errors = np.exp(position), []
    for x in np.logspace(-8, 6, 57):
        exact = (measure * (b / (b + x))).sum(axis=1)
        error = np.abs((weights / (nodes + x)).sum(axis=1) - exact)
        errors.append(error / np.where(exact > 0, exact, 1))
    return float(np.max(errors))  # NaN if any is
