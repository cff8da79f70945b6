"""Evaluates a trained run, with and without its memory.

    python eval.py RUN [--flag VALUE …]
    python eval.py RUN --tasks NAME_OR_FILE …

Prints held-out loss, perplexity and bits per byte of every source, the loss
with the memory suppressed, statistics of the memory, and a sampled
continuation. Writes `eval.json`, a gate map (`gates.html`, `gates.png`) and a
picture of the statistics (`memory.png`) into the run folder. A partial
evaluation (--sources, --step, --max-tokens, --no-statistics) writes
`eval_part.json` and so on.

With --tasks, it runs only tasks of lm-evaluation-harness (offline), prints a
table, and writes `tasks.json`.

Sequences, experts and parameters are split over the devices as in training, as
far as there are enough; --mesh.context, --mesh.expert, --mesh.fsdp and
--mesh.data change that (`--mesh.data 1`: one device). Losses differ by rounding
only. A sample needs one process that splits none of them. --tasks uses one
device.
"""

import json
import os

from engram_jax.beginning import begin

begin()

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # pictures are only written
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # for --tasks

import numpy as np

from engram_jax.command_line import parse_flags
from engram_jax.config import load_config
from engram_jax.data.corpus import Corpus
from engram_jax.data.sources import resolve_source
from engram_jax.decoding.batches import make_batches
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError, one_sentence
from engram_jax.evaluation.gate_map import read_gates, write_html, write_png
from engram_jax.evaluation.health import HealthStudy, format_health
from engram_jax.evaluation.held_out import ScoredBatch, Scorer, Suppress, make_scorer
from engram_jax.evaluation.memory_report import (
    MemoryStudy,
    format_memory,
    memory_json,
    write_memory_png,
)
from engram_jax.evaluation.options import EvalOptions
from engram_jax.evaluation.report import evaluate, format_report, to_json
from engram_jax.files import atomic_write, expand_home
from engram_jax.processes import end_together, is_leader, join_processes
from engram_jax.progress import say_at_first
from engram_jax.run import Run
from engram_jax.train_state import Weights

MAP_TOKENS = 1024  # maximum number of tokens of a gate map, to keep the page readable
OPENING_TOKENS = 160  # tokens of a held-out document that the map shows if no text is given


def parse_options(args: Sequence[str] | None = None) -> EvalOptions:
    """Parses the command line.

    Raises:
        InputError: an invalid value.
    """
    options = parse_flags(EvalOptions, args=args, prog="eval.py", description=__doc__ or "")
    return replace(options, run=expand_home(options.run))


def main(options: EvalOptions) -> None:
    """Evaluates; the leader process prints and writes.

    Raises:
        InputError: invalid options, or data that cannot be read.
    """
    options.check()
    if options.tasks:
        _evaluate_tasks(options)
        return
    text = options.gate_text()
    run = _open(options)
    has_gates = bool(run.config.memory.sites.layers)
    if text and not has_gates:
        raise InputError(
            f"The model in {run.folder} has no Engram layer, so it has no gates; leave out the "
            "text."
        )
    for source in options.sources:
        resolve_source(source)
    settings = _sample_settings(options, run)
    weights = run.restore_weights(options.step)
    corpora = run.corpora(options.sources)
    step = int(weights.step)
    _print(f"{options.run}: {run.config.name}, step {step} of {run.config.train.steps}\n")

    # The slow parts are last, so that errors in a text or an option appear early.
    results: dict[str, Any] = {"run": run.config.name, "step": step}
    outputs: dict[Path, Callable[[Path], object]] = {
        options.file("eval.json"): partial(_write_json, results)
    }
    if settings:
        generator = Generator(run.program, run.tokenizer, weights)
        continuation = generator.generate([options.prompt], settings)[0].text
        results["sample"] = {"prompt": options.prompt, "continuation": continuation}
    study = _study(run, weights) if weights.tables and options.statistics else None
    scorer = say_at_first(make_scorer(run.program), "Compiling the evaluation.")
    if has_gates:
        text = _shorten(run, text or _opening(run, corpora[0]))
        gate_map = read_gates(run, scorer, weights, text)
        outputs[options.file("gates.html")] = partial(write_html, gate_map)
        outputs[options.file("gates.png")] = partial(write_png, gate_map)
        means = {str(layer): gates.mean() for layer, gates in gate_map.gates.items()}
        results["gates"] = {"text": text, "mean": means}
    printed = _score(options, run, weights, corpora, scorer, study, results)
    if study:
        found = study.report()
        printed += f"\n\n{format_memory(found)}"
        results["memory"] = memory_json(found)
        outputs[options.file("memory.png")] = partial(write_memory_png, found)
    if not is_leader():
        return
    failures = _write_all(outputs)
    print(printed)
    if "sample" in results:
        print(f"\nSample: {options.prompt}|{results['sample']['continuation']}")
    if failures:
        raise failures[0]
    print(f"\nWritten: {', '.join(map(str, outputs))}")


def _open(options: EvalOptions) -> Run:
    """The run on the mesh of the options, by default on one that fits the devices here."""
    config = load_config(options.run / "config.json")
    mesh = options.mesh.resolve(config.mesh, options.batch_size or config.evaluate_batch_size)
    return Run.open(options.run, mesh, evaluate_batch_size=options.batch_size)


def _sample_settings(options: EvalOptions, run: Run) -> GenerationSettings | None:
    """The settings of the sample, for which the prompt is checked; None: there is no sample."""
    settings = options.sample_settings()
    if settings is None:
        return None
    if not run.program.can_decode:
        _print(
            "No sample: it needs one process that splits neither parameters, experts nor sequences "
            "(python -m engram_jax.generate).\n"
        )
        return None
    make_batches(run.config, run.tokenizer, [options.prompt], settings, run.program.mesh.size)
    return settings


def _print(text: str) -> None:
    """Prints a text once for all processes."""
    if is_leader():
        print(text)


def _evaluate_tasks(options: EvalOptions) -> None:
    """Runs tasks, prints a table, and writes the results."""
    used, defaults = {"run", "step", "output", "tasks"}, EvalOptions(options.run)
    for option in fields(EvalOptions):
        name = option.name
        if name not in used and getattr(options, name) != getattr(defaults, name):
            flag = name.replace("_", "-")
            raise InputError(f"With --tasks, only tasks are evaluated; leave out --{flag}.")
    try:
        from engram_jax.evaluation.harness import load_tasks, run_tasks
    except ModuleNotFoundError as error:
        raise InputError(
            f"--tasks needs the package {error.name}; run pip install -c constraints.txt -e "
            "'.[lm-eval]'."
        ) from error
    run = Run.open(options.run)
    loaded = load_tasks(options.tasks)
    weights = run.restore_weights(options.step)
    step = int(weights.step)
    print(f"{options.run}: {run.config.name}, step {step} of {run.config.train.steps}\n")
    results, table = run_tasks(Generator(run.program, run.tokenizer, weights), loaded)
    print(table)
    path = options.file("tasks.json")
    _write_json({"run": run.config.name, "step": step} | results, path)
    print(f"\nWritten: {path}")


def _write_json(results: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as incomplete:
        incomplete.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _write_all(outputs: Mapping[Path, Callable[[Path], object]]) -> list[OSError]:
    """Writes each file that can be written; returns the errors of the others."""
    failures = []
    for path, write in outputs.items():
        try:
            write(path)
        except OSError as error:
            failures.append(error)
    return failures


def _study(run: Run, weights: Weights) -> MemoryStudy:
    try:
        return MemoryStudy(run, weights)
    except InputError as error:
        raise InputError(
            f"{error} Or skip the statistics of the memory: --no-statistics."
        ) from error


def _score(
    options: EvalOptions,
    run: Run,
    weights: Weights,
    corpora: Sequence[Corpus],
    scorer: Scorer,
    study: MemoryStudy | None,
    results: dict[str, Any],
) -> str:
    """Adds held-out losses and `HealthStudy.report` to the results; returns both as text."""
    health = HealthStudy()

    def watch(suppressed: Suppress, scored: ScoredBatch) -> None:
        if suppressed == "nothing":
            health(scored)
        if study:
            study(suppressed, scored)

    report = evaluate(
        run.program,
        scorer,
        weights,
        corpora,
        max_tokens=options.max_tokens,
        watch=watch,
        with_gates=study is not None,
    )
    results["held_out"], printed = to_json(report), format_report(report)
    if by_layer := health.report():
        results["health"] = by_layer
        printed += f"\n\n{format_health(by_layer)}"
    return printed


def _opening(run: Run, corpus: Corpus) -> str:
    """The start of the corpus's first held-out document."""
    ids = corpus.held_out.tokens(0)[1:-1]  # without bos and eos
    return _decode_whole(run, ids[:OPENING_TOKENS])


def _shorten(run: Run, text: str) -> str:
    ids = run.tokenizer.encode(text)
    if len(ids) <= MAP_TOKENS:
        return text
    _print(f"The gate map shows the first {MAP_TOKENS:,} of the text's {len(ids):,} tokens.\n")
    return _decode_whole(run, ids[:MAP_TOKENS])


def _decode_whole(run: Run, ids: np.ndarray) -> str:
    """The text of ids, without a character that they cut in two."""
    return run.tokenizer.decode(ids).rstrip("\ufffd")


if __name__ == "__main__":
    with one_sentence():
        given = parse_options()
        if given.distributed:
            join_processes()
    with end_together(), one_sentence():
        main(given)
