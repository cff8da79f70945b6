"""Compares the kernels with a large copy and with XLA, on this machine's device.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --topology v5p:2x2x1    # only compile for a TPU: temporaries

Prints for every implementation that the device supports: the bytes that must be moved (each input
once, each result once) per second; the ratio of that to a large copy in the same run; and the ratio
of the time to XLA's. Ratios are medians and quartiles over rounds that alternate between the
implementations. Writes them to benchmarks/results/, in a file with the device's name.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array

from engram_jax.command_line import run_function
from engram_jax.costs.ahead_of_time import topology_mesh
from engram_jax.sharding import MeshConfig
from pallas_kernels import gated_fusion, hashed_gather
from pallas_kernels.gated_fusion import FusionForm
from pallas_kernels.hashed_gather import RowFormat

RESULTS = Path(__file__).parent / "results"
FORM = FusionForm(2.0**-23, dilation=3)


@dataclass(frozen=True)
class Sizes:
    """The sizes; by default those of Engram-27B's layer, with rows of 128 numbers.

    Attributes:
        batch: rows of the batch B.
        length: tokens T of each.
        branches: M.
        width: model width D.
        columns: hash columns H.
        row_width: width F of a table's row.
        rows: rows of the table, which has 32-bit words; random rows are read.
        dtype: of hidden states, keys and values.
    """

    batch: int = 4
    length: int = 4096
    branches: int = 4
    width: int = 2560
    columns: int = 16
    row_width: int = 128
    rows: int = 2**23
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.length


@dataclass(frozen=True)
class Task:
    """A computation to measure.

    Attributes:
        run: maps an implementation's name to a function of `inputs`.
        inputs: shape and dtype of each input.
        moved: bytes that must be read and written.
    """

    run: Callable[[str], Callable[..., Any]]
    inputs: list[jax.ShapeDtypeStruct]
    moved: int


def tasks(sizes: Sizes) -> dict[str, Task]:
    """The computations to measure, by name."""
    batch, length, branches, width = sizes.batch, sizes.length, sizes.branches, sizes.width
    columns, row_width = sizes.columns, sizes.row_width
    distinct, form = sizes.tokens * columns, RowFormat(row_width)
    shape = jax.ShapeDtypeStruct
    hidden = shape((batch, length, branches, width), jnp.dtype(sizes.dtype))
    value = shape((batch, length, width), hidden.dtype)
    gain, taps = (
        shape((branches, width), jnp.float32),
        shape((4, branches, width), jnp.float32),
    )
    lines = -(-form.words // 128) * 128
    table = shape((sizes.rows, lines), jnp.uint32)
    numbers = shape((sizes.tokens, columns), jnp.int32)
    values = shape((distinct, row_width), jnp.float32)
    order = shape((distinct,), jnp.int32)
    memory = shape((sizes.tokens, columns * row_width), jnp.float32)

    def size(*arrays: jax.ShapeDtypeStruct) -> int:
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays)

    def read(name: str) -> Callable[..., Array]:
        return partial(hashed_gather.read, form=form, implementation=name)  # type: ignore[arg-type]

    def expand_back(name: str) -> Callable[..., Array]:
        def run(values: Array, slots: Array, order: Array, cotangent: Array) -> Array:
            expand = partial(
                hashed_gather.expand,
                implementation=name,  # type: ignore[arg-type]
            )
            return jax.vjp(lambda values: expand(values, slots, order), values)[1](cotangent)[0]

        return run

    def fuse(name: str) -> Callable[..., Any]:
        return partial(gated_fusion.fuse, form=FORM, implementation=name)  # type: ignore[arg-type]

    def fuse_back(name: str) -> Callable[..., Any]:
        def run(cotangent: Array, gate_cotangent: Array, *inputs: Array) -> Any:
            out, pullback = jax.vjp(fuse(name), *inputs)
            return out, pullback((cotangent, gate_cotangent))

        return run

    fusion = [hidden, hidden, value, gain, taps]
    gate = shape(hidden.shape[:3], jnp.float32)
    return {
        "read": Task(read, [table, numbers], 2 * size(memory)),
        "spread, backward": Task(
            expand_back, [values, numbers, order, memory], size(memory, values)
        ),
        "fusion": Task(fuse, fusion, size(*fusion, hidden)),
        "fusion, forward and backward": Task(
            fuse_back, [hidden, gate, *fusion], 2 * size(*fusion, hidden) + size(*fusion)
        ),
    }


def draw(task: Task) -> list[Array]:
    """Draws random inputs. Integers are row numbers of the table, or slots and their sort order."""
    arrays: list[Array] = []
    for index, x in enumerate(task.inputs):
        key = jax.random.key(index)
        if jnp.issubdtype(x.dtype, jnp.floating):
            arrays.append(jax.random.normal(key, x.shape, x.dtype))
        elif x.dtype == jnp.uint32:
            arrays.append(jax.random.bits(key, x.shape) & 0x3FFFFFFF)  # finite as float32
        elif len(x.shape) == 1:
            arrays.append(jnp.argsort(arrays[-1].reshape(-1), stable=True).astype(x.dtype))
        else:
            arrays.append(jax.random.randint(key, x.shape, 0, len(arrays[0]), x.dtype))
    return jax.block_until_ready(arrays)


def seconds(run: Callable[..., Any], inputs: list[Array], calls: int) -> float:
    """Seconds per call, from several consecutive calls."""
    begin = time.perf_counter()
    for _ in range(calls):
        out = run(*inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls


def measure(sizes: Sizes, rounds: int, calls: int) -> dict[str, Any]:
    """Measures every task and implementation, and a copy."""
    here = {"cpu": [], "tpu": ["pallas_tpu"], "gpu": ["pallas_gpu"]}[jax.default_backend()]
    source = jax.random.normal(jax.random.key(0), (2**28 if here else 2**25,))
    copy = jax.jit(lambda x: x + 1)
    found: dict[str, Any] = {}
    for name, task in tasks(sizes).items():
        inputs = draw(task)
        runs: dict[str, Any] = {"xla": jax.jit(task.run("xla"))}
        for implementation in here:
            runs[implementation] = jax.jit(task.run(implementation))
        for run in runs.values():
            jax.block_until_ready(run(*inputs))
        jax.block_until_ready(copy(source))
        times: dict[str, list[float]] = {key: [] for key in ("copy", *runs)}
        for _ in range(rounds):
            times["copy"].append(seconds(copy, [source], calls))
            for implementation, run in runs.items():
                times[implementation].append(seconds(run, inputs, calls))
        copied = 2 * source.nbytes / np.median(times["copy"])
        found[name] = {
            implementation: {
                "GB/s": task.moved / np.median(values) / 1e9,
                "of_copy": quartiles(task.moved / np.array(values) / copied),
                "times_xla": quartiles(np.array(values) / np.array(times["xla"])),
            }
            for implementation, values in times.items()
            if implementation != "copy"
        }
        found[name]["copy"] = {"GB/s": copied / 1e9}
        del inputs
    return found


def quartiles(values: np.ndarray) -> list[float]:
    """Median and quartiles."""
    return [round(float(np.quantile(values, q)), 3) for q in (0.5, 0.25, 0.75)]


def temporaries(sizes: Sizes, topology: str) -> dict[str, dict[str, float]]:
    """MB of temporaries of the compiled programs."""
    chip = topology_mesh(topology, MeshConfig()).devices.ravel()[:1]
    mesh = jax.sharding.Mesh(chip, ("one",), axis_types=(AxisType.Explicit,))
    whole = jax.NamedSharding(mesh, jax.P())
    found: dict[str, dict[str, float]] = {}
    for name, task in tasks(sizes).items():
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in task.inputs]
        found[name] = {}
        for implementation in ("xla", "pallas_tpu"):
            with jax.set_mesh(mesh):
                compiled = jax.jit(task.run(implementation)).lower(*inputs).compile()
            memory: Any = compiled.memory_analysis()
            found[name][implementation] = memory.temp_size_in_bytes / 1e6
    return found


def main(
    sizes: Sizes | None = None, topology: str | None = None, rounds: int = 15, calls: int = 5
) -> None:
    """Measures, or only compiles, and prints.

    Args:
        sizes: the sizes; None: Engram-27B's, or on a CPU those of a small model.
        topology: compile for this TPU slice instead of measuring.
        rounds: rounds of the measurement.
        calls: consecutive calls per round.
    """
    on_cpu = topology is None and jax.default_backend() == "cpu"
    small = Sizes(8, 256, 1, 192, row_width=24, rows=2**20, dtype="float32")
    sizes = sizes or (small if on_cpu else Sizes())
    device = topology or jax.devices()[0].device_kind
    if topology:
        for name, by_implementation in temporaries(sizes, topology).items():
            for implementation, megabytes in by_implementation.items():
                print(f"{name:30} {implementation:12} {megabytes:10,.1f} MB of temporaries")
        return
    found = measure(sizes, rounds, calls)
    for name, by_implementation in found.items():
        for implementation, result in by_implementation.items():
            line = f"{name:30} {implementation:12} {result['GB/s']:8,.1f} GB/s"
            if "of_copy" in result:
                median, low, high = result["of_copy"]
                line += f"   {median:.3f} of a copy ({low:.3f}–{high:.3f})"
                median, low, high = result["times_xla"]
                line += f"   × {median:.2f} XLA's time ({low:.2f}–{high:.2f})"
            print(line)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels_{re.sub('[^a-z0-9]+', '_', device.lower())}.json"
    written = {"device": device, "jax": jax.__version__, "sizes": vars(sizes), "results": found}
    path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"Written: {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    run_function(main)
