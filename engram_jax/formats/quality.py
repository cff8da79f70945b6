"""The effect of a storage type of the tables on the held-out loss."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from engram_jax.data.corpus import Corpus
from engram_jax.evaluation.held_out import (
    Score,
    count_scored,
    difference,
    evaluate_held_out,
    make_scorer,
    pool,
)
from engram_jax.formats.export import exported_config
from engram_jax.formats.mapped_table import MappedTable
from engram_jax.formats.own_table import make_table, settled_rows
from engram_jax.formats.quantize import TableType, quantize
from engram_jax.program import Program
from engram_jax.run import Run
from engram_jax.train_state import Weights


def loss_change(
    run: Run,
    weights: Weights,
    table_type: TableType,
    corpora: Sequence[Corpus],
    max_tokens: int | None = None,
) -> tuple[Score, Score]:
    """The held-out loss of a run, and its change when the tables have a storage type.

    Args:
        run: the run.
        weights: its weights.
        table_type: the storage type.
        corpora: corpora whose held-out documents are scored.
        max_tokens: number of tokens to score per corpus; None: all.
    """

    def score(program: Program, weights: Weights, title: str) -> dict[str, Score]:
        total = count_scored(corpora, max_tokens)
        with (
            program.use_mesh(),
            tqdm(total=total, desc=title, unit=" tokens", unit_scale=True, leave=False) as bar,
        ):
            return evaluate_held_out(
                program,
                make_scorer(program),
                weights,
                corpora,
                max_tokens=max_tokens,
                watch=lambda scored: bar.update(int(scored.mask.sum())),
            )

    before = score(run.program, weights, "scoring the run")
    config = exported_config(run.config, table_type)
    program = Program.build(config, run.program.ngram_hash, run.program.mesh)
    tables = {
        layer: make_table(
            program, layer, _through(table_type, settled_rows(run.program, weights, layer))
        )
        for layer in weights.tables
    }
    after = score(program, replace(weights, tables=tables), f"scoring tables in {table_type}")
    return (
        pool(list(before.values())),
        pool([difference(after[name], before[name]) for name in before]),
    )


def _through(
    table_type: TableType, parts: Iterable[Float32[np.ndarray, "n F"]]
) -> Iterator[Float32[np.ndarray, "n F"]]:
    """Rows as they are read after they were stored in a type."""
    for rows in parts:
        stored, scales = quantize(rows, table_type)
        table = MappedTable((stored,), None if scales is None else (scales,))
        yield table.read(np.arange(len(rows)))
