"""TPU kernels with the TPU compiler, without TPUs.

It finds errors that simulation cannot: tiling, VMEM, operations without a lowering.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from engram_jax.costs.ahead_of_time import topology_mesh
from engram_jax.sharding import MeshConfig
from pallas_kernels import gated_fusion, hashed_gather
from pallas_kernels.gated_fusion import FusionForm
from pallas_kernels.hashed_gather import RowFormat

CHIPS = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("v5e", "v6e")]


@pytest.fixture(params=["v5p", *OTHERS])
def chip(request: pytest.FixtureRequest, libtpu: None) -> jax.sharding.Mesh:
    device = topology_mesh(CHIPS[request.param], MeshConfig()).devices.ravel()[0]
    return jax.sharding.Mesh(np.array([device]), ("one",), axis_types=(AxisType.Explicit,))


def temporaries(chip: jax.sharding.Mesh, run: Callable, *shapes: tuple[tuple, type]) -> int:
    """Bytes of temporaries of the compiled program."""
    whole = jax.NamedSharding(chip, jax.P())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    with jax.set_mesh(chip):
        return jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def fusion_shapes(
    size: tuple[int, int, int, int], kernel: int, dtype: type
) -> list[tuple[tuple, type]]:
    batch, length, branches, width = size
    inputs = [(size, dtype)] * 2 + [((batch, length, width), dtype)]
    parameters = [((branches, width), jnp.float32), ((kernel, branches, width), jnp.float32)]
    return inputs + (parameters if kernel else parameters[:1])


DEFAULT = (8, 256, 1, 192), 4, jnp.float32
# Their results have 168 MB.
PAPER = (2, 4096, 4, 2560), 4, jnp.bfloat16
V41 = (1, 4096, 4, 5120), 0, jnp.bfloat16


@pytest.mark.parametrize(
    ("chip", "size", "kernel", "dtype"),
    [
        pytest.param("v5p", *DEFAULT, id="v5p, the default run"),
        *(
            pytest.param(chip, *sizes, id=f"{chip}, {name}", marks=pytest.mark.slow)
            for chip, name, sizes in (
                ("v5e", "the default run", DEFAULT),
                ("v6e", "the default run", DEFAULT),
                ("v5p", "V4.1", V41),
                ("v5e", "the paper", PAPER),
            )
        ),
    ],
    indirect=["chip"],
)
def test_the_fusion_takes_no_memory_of_the_size_of_its_result(
    chip: jax.sharding.Mesh, size: tuple[int, int, int, int], kernel: int, dtype: type
) -> None:
    """Forward pass, and backward pass with remat."""
    form = FusionForm(2.0**-23, dilation=3)
    fuse = partial(gated_fusion.fuse, form=form, implementation="pallas_tpu")
    shapes, result = fusion_shapes(size, kernel, dtype), int(np.prod(size)) * dtype(0).itemsize
    # Flags, gates and gate gradients: a number per token or branch is padded to 128 lanes.
    # (v5p reserves about 6 MB for any program.)
    small = 4 * 512 * size[0] * size[1] + 8 * 2**20
    assert temporaries(chip, fuse, *shapes) <= small

    def back(cotangent: jax.Array, *inputs: jax.Array) -> tuple:
        remat = jax.checkpoint(lambda *inputs: fuse(*inputs)[0])
        return jax.vjp(remat, *inputs)[1](cotangent)

    assert temporaries(chip, back, (size, dtype), *shapes) <= result + 2 * small


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (RowFormat(80), 256),  # with moments, as row Adam stores them
        (RowFormat(160, "bfloat16"), 128),
        (RowFormat(256, "float8"), 128),
        (RowFormat(256), 256),
    ],
    ids=str,
)
def test_reading_takes_no_memory_of_the_size_of_the_table(
    chip: jax.sharding.Mesh, form: RowFormat, words: int
) -> None:
    """And not the result: rows are decoded in the kernel."""
    read = partial(hashed_gather.read, form=form, implementation="pallas_tpu")
    rows, tokens = 2**21, 4096
    taken = temporaries(chip, read, ((rows, words), jnp.uint32), ((tokens, 16), jnp.int32))
    assert taken <= 4 * 2**20


@pytest.mark.parametrize("width", [24, 80, 128])
def test_spreading_rows_compiles(chip: jax.sharding.Mesh, width: int) -> None:
    """Forward and backward, in a scan over micro-batches; temporaries are lines of rows."""
    rows, tokens, columns = 2**15, 2048, 16

    def run(values: jax.Array, slots: jax.Array, order: jax.Array, weight: jax.Array) -> jax.Array:
        def add(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
            slots, order = part

            def loss(values: jax.Array) -> jax.Array:
                out = hashed_gather.expand(values, slots, order, implementation="pallas_tpu")
                return jnp.sum(out * weight)

            return total + jax.grad(loss)(values), None

        return jax.lax.scan(add, jnp.zeros_like(values), (slots, order))[0]

    taken = temporaries(
        chip,
        run,
        ((rows, width), jnp.float32),
        ((2, tokens, columns), jnp.int32),
        ((2, tokens * columns), jnp.int32),
        ((tokens, columns * width), jnp.float32),
    )
    line = 512 * max(rows, tokens * columns)
    assert taken <= 5 * line + 8 * 2**20
