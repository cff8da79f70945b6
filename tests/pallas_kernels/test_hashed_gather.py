"""One class for all implementations of the gather: values, gradients, transforms, odd sizes."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from simulation import also_with_races, simulation, simulation_by_xla

from pallas_kernels import hashed_gather
from pallas_kernels.hashed_gather import RowFormat, api, pallas_gpu, pallas_tpu
from pallas_kernels.hashed_gather.api import IMPLEMENTATIONS

type Gather = Callable[..., Array]

# U, n, H, F
FEW = [(1, 1, 1, 1), (70, 30, 3, 80)]
MORE = [(7, 40, 1, 3), (5, 1, 1, 3), (1, 20, 2, 3), (300, 100, 3, 24)]
SIZES = [*FEW, *(pytest.param(size, marks=pytest.mark.slow) for size in MORE)]
FORMATS = [(80, "float32"), (160, "bfloat16"), (256, "float8"), (241, "uint32")]
MORE_FORMATS = [(128, "bfloat16"), (5, "float8")]


def draw(
    u: int, n: int, columns: int, width: int, seed: int = 0
) -> tuple[Array, Array, Array, Array]:
    """Values, slots with many duplicates, their order, and a cotangent."""
    generator = np.random.default_rng(seed)
    drawn = generator.geometric(min(1, 6 / (u + 2)), (n, columns)) - 1
    slots = np.minimum(drawn, u - 1).astype(np.int32)
    order = np.argsort(slots.reshape(-1), kind="stable").astype(np.int32)
    values, cotangent = (
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in ((u, width), (n, columns * width))
    )
    return values, jnp.asarray(slots), jnp.asarray(order), cotangent


def sum_duplicates(values: Array, slots: Array, cotangent: Array) -> np.ndarray:
    """The gradient in float64."""
    sums = np.zeros(values.shape)
    by_slot = np.asarray(cotangent, np.float64).reshape(slots.size, -1)
    np.add.at(sums, np.asarray(slots).reshape(-1), by_slot)
    return sums


def bound_of_sums(values: Array, slots: Array, cotangent: Array) -> np.ndarray:
    """A sum of k floats in any order has an error of at most (k−1)·2⁻²⁴ × the absolute sum."""
    counts = np.bincount(np.asarray(slots).reshape(-1), minlength=len(values))[:, None]
    return sum_duplicates(values, slots, np.abs(cotangent)) * counts * 2.0**-24


@pytest.fixture(params=also_with_races(*IMPLEMENTATIONS))
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    # Blocks of about ten tokens and rows.
    for name, size in (("IN_FLIGHT", 32), ("SUMS", 32), ("CHUNK", 32)):
        monkeypatch.setattr(pallas_tpu, name, size)
    for name, size in (("BLOCK", 16), ("IN_FLIGHT", 4)):
        monkeypatch.setattr(pallas_gpu, name, size)
    name, races = request.param
    with simulation(name, races=races):
        yield name
    jax.clear_caches()  # functions traced with small blocks


class TestExpand:
    @pytest.fixture
    def expand(self, implementation: str) -> Gather:
        return partial(hashed_gather.expand, implementation=implementation)

    @pytest.mark.parametrize("size", SIZES)
    def test_values_and_gradient(self, expand: Gather, size: tuple) -> None:
        values, slots, order, cotangent = draw(*size)

        def forward_and_back(values: Array, slots: Array, order: Array) -> tuple[Array, Array]:
            out, pullback = jax.vjp(lambda values: expand(values, slots, order), values)
            return out, pullback(cotangent)[0]

        run = jax.jit(forward_and_back)
        out, gradient = run(values, slots, order)
        expected = np.asarray(values)[np.asarray(slots)].reshape(len(slots), -1)
        np.testing.assert_array_equal(out, expected)
        assert gradient.shape == values.shape and gradient.dtype == values.dtype
        error = np.abs(np.asarray(gradient) - sum_duplicates(values, slots, cotangent))
        assert (error <= bound_of_sums(values, slots, cotangent)).all()
        for first, second in zip((out, gradient), run(values, slots, order), strict=True):
            np.testing.assert_array_equal(first, second)

    @pytest.mark.slow_for("pallas_gpu")
    def test_rows_that_nobody_reads_get_a_zero_gradient(self, expand: Gather) -> None:
        values = jnp.ones((6, 3))
        slots, order = jnp.array([[4], [1], [4]]), jnp.array([1, 0, 2])
        gradient = jax.grad(lambda values: expand(values, slots, order).sum())(values)
        np.testing.assert_array_equal(gradient[:, 0], [0, 1, 0, 0, 2, 0])

    @pytest.mark.slow_for("pallas_gpu", "pallas_tpu")
    def test_more_axes(self, expand: Gather) -> None:
        values, slots, order, _ = draw(9, 12, 2, 4)
        out = expand(values, slots.reshape(3, 4, 2), order)
        np.testing.assert_array_equal(out.reshape(12, -1), expand(values, slots, order))

    @pytest.mark.slow_for("pallas_gpu")
    def test_vmap(self, expand: Gather) -> None:
        batch = [draw(12, 10, 2, 5, seed) for seed in range(2)]
        values, slots, order, cotangent = map(jnp.stack, zip(*batch, strict=True))
        out, pullback = jax.vjp(lambda v: jax.vmap(expand)(v, slots, order), values)
        gradient = pullback(cotangent)[0]
        for row, (v, s, _, c) in enumerate(batch):
            np.testing.assert_array_equal(out[row], np.asarray(v)[s].reshape(len(s), -1))
            np.testing.assert_allclose(gradient[row], sum_duplicates(v, s, c), atol=1e-5)

    @pytest.mark.slow_for("pallas_gpu")
    def test_bfloat16(self, expand: Gather) -> None:
        values, slots, order, _ = draw(9, 30, 1, 4)
        values = values.astype(jnp.bfloat16)
        out = expand(values, slots, order)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, values[slots[:, 0]])
        gradient = jax.grad(lambda v: expand(v, slots, order).astype(jnp.float32).sum())(values)
        assert gradient.dtype == jnp.bfloat16
        # Counts below 257 are exact in bfloat16.
        np.testing.assert_array_equal(gradient[:, 0], np.bincount(slots[:, 0], minlength=9))


@pytest.mark.parametrize("name", ["reference", "xla", "pallas_tpu"])
def test_remat_in_a_scan(name: str) -> None:
    """The micro-batches of a step read the same rows one after another."""
    values, slots, order, cotangent = draw(300, 40, 2, 5)
    expand = jax.checkpoint(partial(hashed_gather.expand, implementation=name))

    def loss(values: Array) -> Array:
        def body(total: Array, scale: Array) -> tuple[Array, None]:
            return total + jnp.sum(expand(values, slots, order) * cotangent) * scale, None

        return jax.lax.scan(body, jnp.zeros(()), jnp.array([1.0, 2.0, 4.0]))[0]

    with simulation_by_xla():
        gradient = jax.jit(jax.grad(loss))(values)
    expected = 7 * sum_duplicates(values, slots, cotangent)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["xla", "pallas_tpu", "pallas_gpu"])
def test_the_gradient_adds_duplicates_in_the_prepared_order(name: str) -> None:
    """A fixed order makes sums equal on all devices: 1 + 2⁻²⁴ + 2⁻²⁴ depends on the order."""
    values, tiny = jnp.zeros((1, 1)), 2.0**-24
    slots = jnp.zeros((3, 1), jnp.int32)
    cotangent = jnp.array([[1.0], [tiny], [tiny]])

    @jax.jit
    def add(order: Array) -> Array:
        expand = partial(hashed_gather.expand, order=order, implementation=name)
        _, pullback = jax.vjp(lambda values: expand(values, slots), values)
        return pullback(cotangent)[0]

    with simulation(name):
        sums = [add(jnp.array(order, jnp.int32)).item() for order in ([0, 1, 2], [1, 2, 0])]
    assert sums == [1.0, 1.0 + 2 * tiny]


class TestRead:
    @pytest.mark.parametrize(
        ("size", "width", "precision"),
        [
            pytest.param((1, 1, 1), 80, "float32", marks=pytest.mark.slow),
            *(((90, 70, 3), *form) for form in FORMATS),
            *(pytest.param((90, 70, 3), *form, marks=pytest.mark.slow) for form in MORE_FORMATS),
        ],
    )
    def test_values(self, implementation: str, size: tuple, width: int, precision: str) -> None:
        """Numbers outside the table read as zeros; padding has such numbers."""
        rows, n, columns = size
        generator, form = np.random.default_rng(1), RowFormat(width, precision)
        values = generator.normal(size=(rows, width)).astype(np.float32)
        if precision == "uint32":  # any bits, those of signaling NaNs included
            values = generator.integers(1 << 32, size=(rows, width), dtype=np.uint32)
        words = jax.jit(form.encode)(values)
        table = np.pad(words, ((0, 0), (0, -words.shape[1] % 128)), constant_values=7)
        numbers = generator.integers(-2, rows + 3, (n, columns)).astype(np.int32)
        read = partial(hashed_gather.read, form=form, implementation=implementation)
        found = jax.jit(read)(table, numbers)
        decoded = np.asarray(jax.jit(form.decode)(words))
        stored = np.concatenate([decoded, np.zeros((5, width))])
        # With NumPy's indexing, −1 and −2 would read the last two rows.
        np.testing.assert_array_equal(found, stored[numbers].reshape(n, -1))

    def test_through_distinct_rows(self, implementation: str) -> None:
        form = RowFormat(3)
        table = jnp.pad(form.encode(jnp.arange(30.0).reshape(10, 3)), ((0, 0), (0, 125)))
        rows, slots = jnp.array([2, 5, 7]), jnp.array([[[0, 2]], [[2, 1]]])
        found = hashed_gather.read(table, rows[slots], form, implementation=implementation)
        assert found.tolist() == [[[6, 7, 8, 21, 22, 23]], [[21, 22, 23, 15, 16, 17]]]


@pytest.mark.parametrize("width", [1, 5, 80, 256])
def test_float8_is_the_released_format(width: int) -> None:
    """Every byte, at scales from the smallest to the largest, against ml_dtypes."""
    generator, scales = np.random.default_rng(0), -(-width // 32)
    values = generator.integers(0, 256, (512, width)).astype(np.uint8)
    exponents = generator.integers(0, 255, (512, scales)).astype(np.uint8)
    form = RowFormat(width, "float8")
    words = jax.jit(form.from_bytes)(values, exponents)
    assert words.shape == (512, form.words) and form.words == -(-width // 4) + -(-scales // 4)
    powers = 2.0 ** (exponents.astype(float).repeat(32, axis=1)[:, :width] - 127)
    expected = values.view(ml_dtypes.float8_e4m3fn).astype(float) * powers
    with np.errstate(over="ignore"):
        expected = expected.astype(np.float32)
    normal = ~(np.abs(expected) < 2.0**-126)  # XLA flushes subnormal numbers to zero on a CPU
    np.testing.assert_array_equal(np.asarray(jax.jit(form.decode)(words))[normal], expected[normal])


def test_float8_scales_make_rows_fit() -> None:
    """Numbers of any size keep three bits after the leading one, relative to the largest."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 96)) * 10.0 ** generator.integers(-30, 30, (400, 1))
    rows = rows.astype(np.float32)
    form = RowFormat(96, "float8")
    there_and_back = jax.jit(lambda rows: form.decode(form.encode(rows)))
    found = np.asarray(there_and_back(rows))
    largest = np.abs(rows).reshape(400, 3, 32).max(axis=2).repeat(32, axis=1)
    assert (np.abs(found - rows) <= np.maximum(np.abs(rows) / 16, largest * 2.0**-17)).all()
    assert not np.any(there_and_back(np.zeros((400, 96), np.float32)))


@pytest.mark.parametrize("wide", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lowered_for_a_gpu(wide: bool) -> None:
    """Without a GPU: layouts and operations are checked, but no machine code is generated.

    Also with 64-bit types enabled.
    """
    values, slots, order, cotangent = draw(300, 40, 4, 80)

    def run(values: Array, table: Array) -> tuple[Array, ...]:
        expand = partial(hashed_gather.expand, implementation="pallas_gpu")
        out, pullback = jax.vjp(lambda values: expand(values, slots, order), values)
        form = RowFormat(160, "bfloat16")
        read = hashed_gather.read(table, slots, form, implementation="pallas_gpu")
        return out, pullback(cotangent)[0], read

    with jax.enable_x64(wide):
        traced = jax.jit(run).trace(values, jnp.zeros((300, 128), jnp.uint32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_rows_that_are_no_lines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"24 words.*whole lines of 128"):
        hashed_gather.read(
            jnp.zeros((4, 24), jnp.uint32),
            jnp.zeros((1, 1), jnp.int32),
            RowFormat(24),
            implementation=name,
        )


def test_xla_is_the_default_and_an_unknown_implementation_is_refused() -> None:
    values, slots, order, _ = draw(3, 4, 1, 2)
    assert api._module(None) is api._module("xla")
    with pytest.raises(ValueError, match=r"no gather .fastest.*reference, xla"):
        hashed_gather.expand(values, slots, order, implementation="fastest")  # type: ignore[arg-type]
