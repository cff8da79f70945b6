"""Compares the input pipeline's tokens per second with those of the default model's training step.

Both are measured in this process.

    python -m benchmarks.data [--workers K] [--repeats N]
"""

import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from configs.default import config
from engram_jax.command_line import run_function
from engram_jax.data.pipeline import make_batches
from engram_jax.run import Run
from engram_jax.train_step import make_train_step


def main(workers: int = 0, repeats: int = 7, batches: int = 100, steps: int = 10) -> None:
    """Prints throughputs and their ratios.

    Args:
        workers: number of processes that build batches; 0: a thread does, as in the default run.
        repeats: number of measurements, alternating between pipeline and model.
        batches: batches per measurement of the pipeline.
        steps: steps per measurement of the model.
    """
    data = config.data
    tokens = data.batch_size * data.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(config, Path(folder) / "run")
        corpora = run.corpora()
        sizes: dict[str, Any] = {
            "sequence_length": data.sequence_length,
            "batch_size": data.batch_size,
            "prefetch": data.prefetch,
            "workers": workers,
        }

        def time_pipeline(with_plan: bool) -> float:
            planner = run.program.planner() if with_plan else None
            with make_batches(corpora, data.weights, planner=planner, **sizes) as stream:
                for _ in range(data.prefetch + 1):  # batches built before the measurement
                    next(stream)
                start = time.perf_counter()
                for _ in range(batches):
                    next(stream)
                return batches * tokens / (time.perf_counter() - start)

        with run.program.use_mesh():
            train_step, row_adam = make_train_step(run.program), run.program.row_adam
            with make_batches(
                corpora, data.weights, planner=run.program.planner(), **sizes
            ) as stream:
                ready = [run.program.put(batch) for batch in islice(stream, steps)]
            state, _ = train_step(run.program.initial_state(), ready[0], row_adam)  # compiles
            rates: dict[str, list[float]] = {"plan": [], "rows": [], "model": []}
            for _ in range(repeats):
                rates["plan"].append(time_pipeline(with_plan=True))
                rates["rows"].append(time_pipeline(with_plan=False))
                start = time.perf_counter()
                for batch in ready:
                    state, metrics = train_step(state, batch, row_adam)
                jax.block_until_ready((state, metrics))
                rates["model"].append(steps * tokens / (time.perf_counter() - start))

    where = f"{workers} workers" if workers else "a thread"
    print(f"{data.batch_size} rows of {data.sequence_length} tokens, built in {where}")
    _print("pipeline, packing only", rates["rows"])
    _print("pipeline with hash and plan", rates["plan"])
    _print(f"training step of the default model on {jax.devices()[0].device_kind}", rates["model"])
    ratios = [plan / model for plan, model in zip(rates["plan"], rates["model"], strict=True)]
    print(
        f"pipeline with hash and plan / training step: {statistics.median(ratios):.1f}× "
        f"({min(ratios):.1f} to {max(ratios):.1f})"
    )


def _print(what: str, rates: list[float]) -> None:
    print(
        f"{what}: {statistics.median(rates):,.0f} tokens/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}, {len(rates)} runs)"
    )


if __name__ == "__main__":
    run_function(main)
