"""One class for all implementations of the gather: values, gradients, transforms, odd sizes."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from pallas_kernels import hashed_gather
from pallas_kernels.hashed_gather.api import _IMPLEMENTATIONS

type Gather = Callable[[Array, Array, Array], Array]

SIZES = [(1, 1, 1), (5, 1, 3), (1, 40, 3), (7, 100, 1), (64, 333, 24), (300, 64, 128)]


def draw(n: int, m: int, width: int, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Values, indices (few distinct, so that duplicates abound), their order, and a cotangent."""
    generator = np.random.default_rng(seed)
    indices = np.minimum(generator.geometric(3 / (n + 2), m) - 1, n - 1).astype(np.int32)
    order = np.argsort(indices, kind="stable").astype(np.int32)
    values, cotangent = generator.normal(size=(n, width)), generator.normal(size=(m, width))
    return (
        jnp.asarray(values, jnp.float32),
        jnp.asarray(indices),
        jnp.asarray(order),
        jnp.asarray(cotangent, jnp.float32),
    )


def sum_duplicates(values: Array, indices: Array, cotangent: Array) -> np.ndarray:
    """The gradient in float64."""
    sums = np.zeros(values.shape)
    np.add.at(sums, np.asarray(indices), np.asarray(cotangent, np.float64))
    return sums


def bound_of_sums(values: Array, indices: Array, cotangent: Array) -> np.ndarray:
    """A sum of k floats in any order errs by at most (k−1)·2⁻²⁴ of the sum of their sizes."""
    counts = np.bincount(np.asarray(indices), minlength=len(values))[:, None]
    return sum_duplicates(values, indices, np.abs(cotangent)) * counts * 2.0**-24


@pytest.mark.parametrize("implementation", [None, *_IMPLEMENTATIONS])
class TestGather:
    @pytest.fixture
    def gather(self, implementation: str | None) -> Gather:
        return partial(hashed_gather.gather, implementation=implementation)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("jitted", [False, True])
    def test_values_and_gradient(self, gather: Gather, size: tuple, jitted: bool) -> None:
        values, indices, order, cotangent = draw(*size)

        def forward_and_back(values: Array, indices: Array, order: Array) -> tuple[Array, Array]:
            out, pullback = jax.vjp(lambda values: gather(values, indices, order), values)
            return out, pullback(cotangent)[0]

        run = jax.jit(forward_and_back) if jitted else forward_and_back
        out, gradient = run(values, indices, order)
        np.testing.assert_array_equal(out, np.asarray(values)[np.asarray(indices)])
        assert gradient.shape == values.shape and gradient.dtype == values.dtype
        error = np.abs(np.asarray(gradient) - sum_duplicates(values, indices, cotangent))
        assert (error <= bound_of_sums(values, indices, cotangent)).all()

    def test_rows_that_nobody_reads_get_a_zero_gradient(self, gather: Gather) -> None:
        values = jnp.ones((6, 3))
        indices, order = jnp.array([4, 1, 4]), jnp.array([1, 0, 2])
        gradient = jax.grad(lambda values: gather(values, indices, order).sum())(values)
        np.testing.assert_array_equal(gradient[:, 0], [0, 1, 0, 0, 2, 0])

    def test_remat(self, gather: Gather) -> None:
        values, indices, order, cotangent = draw(30, 50, 4)

        def loss(gather: Gather, values: Array) -> Array:
            return jnp.sum(jnp.sin(gather(values, indices, order)) * cotangent)

        expected = jax.grad(partial(loss, gather))(values)
        found = jax.jit(jax.grad(partial(loss, jax.checkpoint(gather))))(values)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_vmap(self, gather: Gather) -> None:
        batch = [draw(12, 20, 5, seed) for seed in range(3)]
        values, indices, order, cotangent = map(jnp.stack, zip(*batch, strict=True))
        out, pullback = jax.vjp(lambda v: jax.vmap(gather)(v, indices, order), values)
        gradient = pullback(cotangent)[0]
        for row, (v, i, _, c) in enumerate(batch):
            np.testing.assert_array_equal(out[row], np.asarray(v)[np.asarray(i)])
            np.testing.assert_allclose(gradient[row], sum_duplicates(v, i, c), atol=1e-5)

    def test_in_a_scan(self, gather: Gather) -> None:
        """The micro-batches of a step read the same rows one after another."""
        values, indices, order, cotangent = draw(12, 20, 5)

        def loss(values: Array) -> Array:
            def body(total: Array, scale: Array) -> tuple[Array, None]:
                return total + jnp.sum(gather(values, indices, order) * cotangent) * scale, None

            return jax.lax.scan(body, jnp.zeros(()), jnp.array([1.0, 2.0, 4.0]))[0]

        gradient = jax.jit(jax.grad(loss))(values)
        expected = 7 * sum_duplicates(values, indices, cotangent)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)

    def test_bfloat16(self, gather: Gather) -> None:
        values, indices, order, _ = draw(9, 30, 4)
        values = values.astype(jnp.bfloat16)
        out = gather(values, indices, order)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, values[indices])
        gradient = jax.grad(lambda v: gather(v, indices, order).astype(jnp.float32).sum())(values)
        assert gradient.dtype == jnp.bfloat16
        # Counts below 257 are exact in bfloat16.
        np.testing.assert_array_equal(gradient[:, 0], np.bincount(indices, minlength=9))


def test_the_gradient_adds_duplicates_in_the_prepared_order() -> None:
    """What makes the sum the same on every device: 1 + 2⁻²⁴ + 2⁻²⁴ depends on the order."""
    values, tiny = jnp.zeros((1, 1)), 2.0**-24
    indices = jnp.zeros(3, jnp.int32)
    cotangent = jnp.array([[1.0], [tiny], [tiny]])
    sums = []
    for order in ([0, 1, 2], [1, 2, 0]):
        gather = partial(
            hashed_gather.gather, order=jnp.array(order, jnp.int32), implementation="xla"
        )
        _, pullback = jax.vjp(lambda v, gather=gather: gather(v, indices), values)
        sums.append(pullback(cotangent)[0].item())
    assert sums == [1.0, 1.0 + 2 * tiny]


def test_an_unknown_implementation_is_refused() -> None:
    values, indices, order, _ = draw(3, 4, 2)
    with pytest.raises(ValueError, match=r"no gather .fastest.*reference, xla"):
        hashed_gather.gather(values, indices, order, implementation="fastest")  # type: ignore[arg-type]
