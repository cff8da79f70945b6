"""The model card of an export."""

import json
from pathlib import Path
from typing import Any

from engram_jax.config import Config
from engram_jax.formats.quantize import TableType
from engram_jax.hashing import NgramHash

_TYPES: dict[TableType, str] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float8": "float8 (e4m3), with one power of two (e8m0) per 32 numbers",
    "int8": "int8, with one bfloat16 factor per 32 numbers",
}

_KINDS = {
    "engram": "A language model with conditional memory (hashed n-gram tables, Engram)",
    "over_encoding": "A language model with hashed n-gram tables at its input (OverEncoding)",
    "added": "A language model with hashed n-gram rows added to its input",
    "none": "A language model without memory",
}


def model_card(
    config: Config,
    ngram_hash: NgramHash | None,
    *,
    step: int,
    dense: int,
    table_type: TableType,
    evaluation: Path,
) -> str:
    """The card as Markdown. It depends on nothing but its arguments.

    Args:
        config: the exported configuration.
        ngram_hash: the hash; None for a model without memory.
        step: number of finished optimizer steps.
        dense: number of dense parameters.
        table_type: storage type of the tables.
        evaluation: `eval.json`; it may be missing, or of another step.
    """
    model, sources = config.model, ", ".join(Path(name).name for name in config.data.sources)
    lines = [
        f"# {config.name}",
        "",
        f"{_KINDS[config.memory.fusion if ngram_hash else 'none']}, trained with engram-jax",
        "([arXiv 2601.07372](https://arxiv.org/abs/2601.07372)).",
        "",
        "| | |",
        "|---|---|",
        f"| steps × tokens | {step:,} × {config.data.batch_size * config.data.sequence_length:,} |",
        f"| text | {sources} |",
        f"| dense parameters | {dense:,} in float32 |",
        f"| vocabulary, width, layers | {model.vocabulary:,}, {model.width}, {model.layers} |",
    ]
    if ngram_hash is not None:
        for layer, rows in zip(ngram_hash.spec.layers, ngram_hash.rows, strict=True):
            lines.append(
                f"| table of layer {layer} | {rows:,} rows × {config.memory.row_width}, "
                f"{_TYPES[table_type]} |"
            )
        lines.append(f"| hash | {ngram_hash.fingerprint} |")
    lines += ["", *_figures(evaluation, step)]
    lines += [
        "`python -m engram_jax.import_run FOLDER RUN` makes a run of this folder.",
        "`docs/use_elsewhere.md` of engram-jax reads it with NumPy alone.",
        "",
    ]
    return "\n".join(lines)


def _figures(evaluation: Path, step: int) -> list[str]:
    """The table of held-out losses, if there is one of this step."""
    try:
        found: dict[str, Any] = json.loads(evaluation.read_text("utf-8"))
        if found["step"] != step:
            return []
        rows = [
            (name, score, score["without_memory"].get("output"))
            for name, score in found["held_out"].items()
        ]
        lines = [
            "| held-out text | loss | bits per byte | loss without the memory |",
            "|---|---|---|---|",
            *(
                f"| {name} | {_loss(score)} | {score['bits_per_byte']:.3f} | "
                f"{_loss(without) if without else ''} |"
                for name, score, without in rows
            ),
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    note = "Nats per token ± standard error over documents, with tables in the type of the run."
    return [*lines, "", note, ""]


def _loss(score: dict[str, Any]) -> str:
    error = score["standard_error"]
    return f"{score['loss']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
