"""One class for all implementations of the fusion: values, gradients, transforms, odd sizes."""

import math
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from simulation import also_with_races, simulation, simulation_by_xla

from pallas_kernels import gated_fusion
from pallas_kernels.gated_fusion import FusionForm, pallas_gpu, pallas_tpu
from pallas_kernels.gated_fusion.api import IMPLEMENTATIONS

type Fuse = Callable[..., tuple[Array, Array]]
type Size = tuple[int, ...]
type Fit = Callable[[Size], Size]

# B, T, M, D, taps; tiles and halos have 16 tokens. Sizes for GPU kernels are smaller, because their
# simulation is slow: D = 128, and 4 tokens per block.
SIZES = {
    "several tiles, the last in part": (2, 40, 2, 24, 4),
    "taps beyond the row": (1, 5, 2, 8, 4),
}
MORE_SIZES = {
    "one tap": (1, 33, 1, 130, 1),
    "one token": (1, 1, 1, 8, 4),
    "no convolution": (2, 19, 3, 8, 0),
    "fewer tokens than the dilation": (1, 2, 1, 8, 4),
    "many taps": (1, 19, 1, 8, 6),
}
LEAST_SCORE = 1e-3  # below it the root is too steep to compare floats


class Inputs(NamedTuple):
    hidden: Array
    key: Array
    value: Array
    gain: Array
    taps: Array | None


def draw_inputs(size: Size, seed: int = 0, dtype: type = jnp.float32) -> tuple[Inputs, dict]:
    batch, length, branches, width, kernel = size
    generator = np.random.default_rng(seed)

    def normal(*shape: int, dtype: type = np.float32) -> np.ndarray:
        return generator.normal(size=shape).astype(dtype)

    rows = (batch, length, branches, width)
    hidden = normal(*rows)
    toward = generator.choice([-2.0, 2.0], rows[:3]).astype(np.float32)[..., None]
    inputs = Inputs(
        hidden.astype(dtype),
        (normal(*rows) + toward * hidden).astype(dtype),  # few scores near zero
        normal(batch, length, width, dtype=dtype),
        1 + np.float32(0.3) * normal(branches, width),
        normal(kernel, branches, width) if kernel else None,
    )
    segments = np.sort(generator.integers(0, 3, (batch, length)), axis=1).astype(np.int32)
    mask = generator.random((batch, length)) < 0.9
    return jax.tree.map(jnp.asarray, (inputs, {"segments": segments, "token_mask": mask}))


def forward_and_back(fuse: Fuse, inputs: Inputs, **named: Array) -> tuple:
    """Values, and gradients for fixed cotangents of both results."""
    (out, gate), pullback = jax.vjp(lambda *inputs: fuse(*inputs, **named), *inputs)
    generator = np.random.default_rng(9)
    cotangents = [jnp.asarray(generator.normal(size=x.shape), x.dtype) for x in (out, gate)]
    return out, gate, pullback(tuple(cotangents))


FORM = FusionForm(2.0**-23, dilation=3)


@cache
def expect(
    size: Size, dtype: type = jnp.float32, form: FusionForm = FORM, documents: bool = True
) -> tuple:
    """What `forward_and_back` gives by the definition for `draw_inputs`."""
    reference = partial(gated_fusion.fuse, form=form, implementation="reference")
    inputs, named = draw_inputs(size, 0, dtype)
    run = jax.jit(partial(forward_and_back, reference))
    return jax.device_get(run(inputs, **(named if documents else {})))


def assert_near(found: tuple, expected: tuple, inputs: Inputs) -> None:
    """Sums of n floats in another order differ by about √n roundings of their terms.

    Terms are up to 16 times the largest sum, because the root's slope is up to 1 / (2·√score).
    """
    open_gates = np.asarray(expected[1])[np.asarray(expected[1]) > 0]
    roots = np.log(open_gates / (1 - open_gates))
    assert (roots**2).min() > LEAST_SCORE, "choose another seed"
    length = max(inputs.value.shape[0] * inputs.value.shape[1], inputs.value.shape[2])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=16 * 2**-24 * (length**0.5 + 4) * abs(b).max()
        )


@pytest.fixture(params=also_with_races(*[x for x in IMPLEMENTATIONS if x != "reference"]))
def simulated(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation, in a context where it runs."""
    name, races = request.param
    with simulation(name, races=races):
        yield name


class TestFuse:
    @pytest.fixture
    def fuse(self, simulated: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fuse]:
        monkeypatch.setattr(pallas_tpu, "MOST_TOKENS", 16)
        for name in ("SUMMED", "STRIP", "WALK"):
            monkeypatch.setattr(pallas_gpu, name, 4)
        yield partial(gated_fusion.fuse, form=FORM, implementation=simulated)
        jax.clear_caches()  # functions traced with small tiles

    @pytest.fixture
    def fit(self, simulated: str) -> Fit:
        if simulated != "pallas_gpu":
            return lambda size: size
        return lambda size: (1, min(size[1], 14), min(size[2], 2), 128, size[4])

    @pytest.mark.parametrize(
        "size",
        [
            *SIZES.values(),
            *(pytest.param(size, marks=pytest.mark.slow) for size in MORE_SIZES.values()),
        ],
        ids=[*SIZES, *MORE_SIZES],
    )
    def test_values_and_gradients(self, fuse: Fuse, fit: Fit, size: Size) -> None:
        size = fit(size)
        inputs, documents = draw_inputs(size)
        run = jax.jit(partial(forward_and_back, fuse))
        found, again = run(inputs, **documents), run(inputs, **documents)
        assert_near(found, expect(size), inputs)
        jax.tree.map(np.testing.assert_array_equal, again, found)

    @pytest.mark.slow_for("pallas_tpu", "pallas_gpu")
    def test_without_documents_and_mask(self, fuse: Fuse, fit: Fit) -> None:
        size = fit(SIZES["several tiles, the last in part"])
        inputs, _ = draw_inputs(size)
        found = jax.jit(partial(forward_and_back, fuse))(inputs)
        assert_near(found, expect(size, documents=False), inputs)

    @pytest.mark.slow_for("pallas_tpu", "pallas_gpu")
    def test_one_document_a_token(self, fuse: Fuse, fit: Fit) -> None:
        """Then a tap reads only the token itself."""
        inputs, _ = draw_inputs(fit((1, 20, 2, 8, 4)))
        segments = jnp.arange(inputs.value.shape[1], dtype=jnp.int32)[None]
        found, _ = fuse(*inputs, segments)
        alone, _ = fuse(*inputs._replace(taps=inputs.taps[-1:]))
        np.testing.assert_allclose(found, alone, rtol=1e-6, atol=1e-6)

    @pytest.mark.slow_for("pallas_tpu", "pallas_gpu")
    def test_nothing_enters_from_another_document(self, fuse: Fuse, fit: Fit) -> None:
        """Not even NaN passes a boundary, in the forward or the backward pass."""
        inputs, _ = draw_inputs(fit((1, 14, 1, 8, 4)))
        segments = jnp.asarray([[0] * 8 + [1] * 6], jnp.int32)
        value = inputs.value.at[0, 6].set(jnp.nan)
        run = jax.jit(partial(forward_and_back, fuse))
        found = run(inputs._replace(value=value), segments=segments)
        expected = run(inputs, segments=segments)
        for array, clean in zip(
            jax.tree.leaves((*found[:2], found[2][:3])),
            jax.tree.leaves((*expected[:2], expected[2][:3])),
            strict=True,
        ):
            np.testing.assert_allclose(array[0, 8:], clean[0, 8:], rtol=1e-5, atol=1e-6)

        @jax.jit
        def of_early_tokens(cotangent: Array) -> list[Array]:
            _, pullback = jax.vjp(lambda *x: fuse(*x, segments=segments)[0], *inputs)
            return [gradient[0, :8] for gradient in pullback(cotangent)[:3]]

        ones = jnp.ones_like(inputs.hidden)
        for array, clean in zip(
            of_early_tokens(ones.at[0, 9].set(jnp.nan)), of_early_tokens(ones), strict=True
        ):
            np.testing.assert_allclose(array, clean, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow_for("pallas_tpu", "pallas_gpu")
    def test_bfloat16(self, fuse: Fuse, fit: Fit) -> None:
        """Intermediate values are float32, so there is one rounding at the end."""
        size = fit((2, 24, 2, 24, 4))
        inputs, documents = draw_inputs(size, 0, jnp.bfloat16)
        found = jax.jit(partial(forward_and_back, fuse))(inputs, **documents)
        expected = expect(size, jnp.bfloat16)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            # Results can round to neighboring numbers, which differ by at most 2⁻⁷.
            np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=1e-4 * abs(b).max())

    @pytest.mark.slow_for("pallas_tpu", "pallas_gpu")
    def test_released_form(self, fuse: Fuse, fit: Fit) -> None:
        form = FusionForm(1e-20, signed_root="copysign")
        size = fit(MORE_SIZES["no convolution"])
        inputs, documents = draw_inputs(size)
        found = jax.jit(partial(forward_and_back, partial(fuse, form=form)))(inputs, **documents)
        assert_near(found, expect(size, form=form), inputs)

    @pytest.mark.slow_for("pallas_tpu", "pallas_gpu")
    def test_vmap(self, fuse: Fuse, fit: Fit) -> None:
        drawn = [draw_inputs(fit((2, 6, 2, 8, 3)), seed)[0] for seed in (1, 2)]
        both = jax.tree.map(lambda *x: jnp.stack(x), *drawn)

        run = jax.jit(partial(forward_and_back, fuse))
        found = jax.jit(jax.vmap(run))(both)
        for index, inputs in enumerate(drawn):
            assert_near(jax.tree.map(lambda x, i=index: x[i], found), run(inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("size", [48, 32])
def test_tiles_of_other_sizes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two and three times as large as a halo."""
    monkeypatch.setattr(pallas_tpu, "MOST_TOKENS", size)
    sizes = (1, 80, 1, 8, 4)
    inputs, documents = draw_inputs(sizes)
    with simulation("pallas_tpu"):
        fuse = partial(gated_fusion.fuse, form=FORM, implementation="pallas_tpu")
        found = jax.jit(partial(forward_and_back, fuse))(inputs, **documents)
    assert_near(found, expect(sizes), inputs)
    jax.clear_caches()


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
)
def test_remat(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_tpu, "MOST_TOKENS", 32)
    size = (1, 40, 2, 8, 4)
    inputs, documents = draw_inputs(size)
    fuse = jax.checkpoint(partial(gated_fusion.fuse, form=FORM, implementation=implementation))
    with simulation_by_xla():
        found = jax.jit(partial(forward_and_back, fuse))(inputs, **documents)
    assert_near(found, expect(size), inputs)


def test_too_many_taps_are_refused() -> None:
    inputs, _ = draw_inputs((1, 40, 1, 8, 31))
    with pytest.raises(ValueError, match=r"31 taps; at most 30"):
        gated_fusion.fuse(*inputs, form=FORM)


def test_taps_that_reach_too_far_for_a_tpu_are_refused() -> None:
    inputs, _ = draw_inputs((1, 512, 4, 2560, 4))
    form = FusionForm(2.0**-23, dilation=64)
    with pytest.raises(ValueError, match=r"192 tokens back.*'xla'"):
        gated_fusion.fuse(*inputs, form=form, implementation="pallas_tpu")


def test_a_width_that_the_gpu_kernel_does_not_take_is_refused() -> None:
    inputs, _ = draw_inputs((1, 2, 1, 192, 0))
    with pytest.raises(ValueError, match=r"128 divides, not 192.*'xla'"):
        gated_fusion.fuse(*inputs, form=FORM, implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("width", "kernel", "dtype"),
    [
        (256, 4, jnp.float32),
        (5120, 0, jnp.bfloat16),
        pytest.param(256, 4, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(2560, 4, jnp.float32, marks=pytest.mark.slow),
        pytest.param(2560, 4, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(5120, 0, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_lowered_for_a_gpu(width: int, kernel: int, dtype: type) -> None:
    """Without a GPU: layouts and operations are checked, but no machine code is generated."""
    inputs, documents = draw_inputs((1, 40, 4, width, kernel), 0, dtype)
    fuse = partial(gated_fusion.fuse, form=FORM, implementation="pallas_gpu")
    lowered = (
        jax.jit(partial(forward_and_back, fuse))
        .trace(inputs, **documents)
        .lower(lowering_platforms=("cuda",))
    )
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 4


@pytest.mark.slow
def test_lowered_for_a_gpu_in_a_program_of_64_bits() -> None:
    with jax.enable_x64(True):
        inputs, documents = draw_inputs((1, 40, 2, 128, 4))
        fuse = partial(gated_fusion.fuse, form=FORM, implementation="pallas_gpu")
        traced = jax.jit(partial(forward_and_back, fuse)).trace(inputs, **documents)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 4


def test_a_gpu_takes_a_batch_of_more_blocks_than_cuda_has_along_other_axes_than_the_first() -> None:
    """2²² tokens need more than 65,535 blocks, which CUDA supports along one grid axis only."""
    hidden = jax.ShapeDtypeStruct((2**10, 2**12, 1, 128), jnp.bfloat16)
    value = jax.ShapeDtypeStruct((2**10, 2**12, 128), jnp.bfloat16)
    gain = jax.ShapeDtypeStruct((1, 128), jnp.float32)
    fuse = partial(gated_fusion.fuse, form=FORM, implementation="pallas_gpu")

    def run(*inputs: Array) -> tuple:
        (out, gate), pullback = jax.vjp(fuse, *inputs)
        return pullback((out, gate))

    grids = re.findall(r"grid=\(([\d, ]+)\)", str(jax.make_jaxpr(run)(hidden, hidden, value, gain)))
    assert len(grids) == 4
    for grid in grids:
        *others, _ = (int(size) for size in grid.split(",") if size.strip())
        assert math.prod(others) < 2**16


def test_an_unknown_implementation_is_refused() -> None:
    inputs, _ = draw_inputs((1, 2, 1, 8, 0))
    with pytest.raises(ValueError, match=r"no fusion .fastest.*reference, xla, pallas_tpu"):
        gated_fusion.fuse(*inputs, form=FORM, implementation="fastest")  # type: ignore[arg-type]
