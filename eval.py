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
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports, Ctrl-C gives no traceback

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ["MPLBACKEND"] = "agg"  # pictures are only written
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # for --tasks
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import numpy as np
import tyro

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
from engram_jax.evaluation.report import evaluate, format_report, to_json
from engram_jax.files import atomic_write
from engram_jax.processes import end_together, is_leader, join_processes
from engram_jax.run import Run
from engram_jax.sharding import MeshConfig, fit_mesh
from engram_jax.train_state import Weights

MAP_TOKENS = 1024  # maximum number of tokens of a gate map, to keep the page readable
OPENING_TOKENS = 160  # tokens of a held-out document that the map shows if no text is given


@dataclass(frozen=True)
class EvalMesh:
    """Sizes of the mesh. If one is given, the others are 1, and data uses the remaining devices.

    Attributes:
        data: replicas of the parameters.
        fsdp: devices over which each replica of the parameters is split.
        expert: devices over which the experts of a layer are split.
        context: devices over which each sequence is split.
    """

    data: int | None = None
    fsdp: int | None = None
    expert: int | None = None
    context: int | None = None

    def resolve(self, trained: MeshConfig, rows: int) -> MeshConfig:
        """The mesh; if no size is given, one that fits the devices here.

        Args:
            trained: the mesh of the training.
            rows: rows of a batch.
        """
        given = {axis: size for axis, size in asdict(self).items() if size is not None}
        return MeshConfig(**given) if given else fit_mesh(trained, rows)


@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        run: the run folder that train.py wrote.
        step: step of the checkpoint; by default, the newest.
        sources: shipped corpora or paths whose held-out documents are scored; by default, those of
            the run.
        max_tokens: number of held-out tokens to score per source; by default, all.
        statistics: also report statistics of the memory; this reads the training text.
        output: folder to write to; by default, the run folder.
        text: text of the gate map; by default, the start of a held-out document.
        text_file: file with the text of the gate map (UTF-8).
        prompt: text to continue.
        sample_tokens: tokens of the continuation; 0: no continuation.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample from this many most likely tokens; by default, from all.
        seed: seed of the continuation.
        tasks: evaluate only these tasks of lm-evaluation-harness: names of shipped tasks
            (engram_jax/evaluation/tasks), or YAML files.
        batch_size: rows of a batch, over all devices; by default, the run's
            train.evaluate_batch_size, or those of a micro-batch.
        mesh: sizes of the mesh; by default, see below.
        distributed: join the other processes of a pod, SLURM job or cluster first
            (`jax.distributed.initialize`).
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    step: int | None = None
    sources: tuple[str, ...] = ()
    max_tokens: int | None = None
    statistics: bool = True
    output: Path | None = None
    text: str | None = None
    text_file: Path | None = None
    prompt: str = "The city of"
    sample_tokens: int = 60
    temperature: float = 0.8
    top_k: int | None = None
    seed: int = 0
    tasks: tuple[str, ...] = ()
    batch_size: int | None = None
    mesh: EvalMesh = field(default_factory=EvalMesh)
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def parse_options(args: Sequence[str] | None = None) -> EvalOptions:
    """Parses the command line.

    Raises:
        InputError: an invalid value.
    """
    options = parse_flags(EvalOptions, args=args, prog="eval.py", description=__doc__ or "")
    return replace(options, run=options.run.expanduser())


def main(options: EvalOptions) -> None:
    """Evaluates; the leader process prints and writes.

    Raises:
        InputError: invalid options, or data that cannot be read.
    """
    settings = _check(options)
    if options.tasks:
        _evaluate_tasks(options)
        return
    text = _given_text(options)
    run = _open(options)
    has_gates = bool(run.config.memory.sites.layers)
    if text and not has_gates:
        raise InputError(
            f"The model in {run.folder} has no Engram layer, so it has no gates; leave out the "
            "text."
        )
    for source in options.sources:
        resolve_source(source)
    if settings and not _can_continue(run):
        settings = None
        _print(
            "No sample: it needs one process that splits neither parameters nor sequences "
            "(python -m engram_jax.generate).\n"
        )
    if settings:
        make_batches(run.config, run.tokenizer, [options.prompt], settings, run.program.mesh.size)
    weights = run.restore_weights(options.step)
    corpora = run.corpora(options.sources)
    step = int(weights.step)
    _print(f"{options.run}: {run.config.name}, step {step} of {run.config.train.steps}\n")

    # The slow parts are last, so that errors in a text or an option appear early.
    results: dict[str, Any] = {"run": run.config.name, "step": step}
    outputs: dict[Path, Callable[[Path], object]] = {
        _output(options, "eval.json"): partial(_write_json, results)
    }
    if settings:
        generator = Generator(run.program, run.tokenizer, weights)
        continuation = generator.generate([options.prompt], settings)[0].text
        results["sample"] = {"prompt": options.prompt, "continuation": continuation}
    study = _study(run, weights) if weights.tables and options.statistics else None
    scorer = make_scorer(run.program)
    if has_gates:
        text = _shorten(run, text or _opening(run, corpora[0]))
        gate_map = read_gates(run, scorer, weights, text)
        outputs[_output(options, "gates.html")] = partial(write_html, gate_map)
        outputs[_output(options, "gates.png")] = partial(write_png, gate_map)
        means = {str(layer): gates.mean() for layer, gates in gate_map.gates.items()}
        results["gates"] = {"text": text, "mean": means}
    printed = _score(options, run, weights, corpora, scorer, study, results)
    if study:
        found = study.report()
        printed += f"\n\n{format_memory(found)}"
        results["memory"] = memory_json(found)
        outputs[_output(options, "memory.png")] = partial(write_memory_png, found)
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


def _can_continue(run: Run) -> bool:
    """Whether a prompt can be continued on the mesh of the run."""
    mesh = run.program.mesh
    return jax.process_count() == 1 and mesh.shape["data"] == mesh.size


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
    path = _output(options, "tasks.json")
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


def _folder(options: EvalOptions) -> Path:
    """The folder to write to."""
    return (options.output or options.run).expanduser()


def _output(options: EvalOptions, name: str) -> Path:
    """The file to write; a partial evaluation does not replace a complete one."""
    parts = options.sources, options.step is not None, options.max_tokens, not options.statistics
    stem, suffix = name.split(".")
    return _folder(options) / f"{stem}{'_part' if any(parts) else ''}.{suffix}"


def _check(options: EvalOptions) -> GenerationSettings | None:
    """The settings of the sampled continuation; None: none is asked for."""
    if not options.run.is_dir():
        raise InputError(f"There is no run folder {options.run}; train.py creates runs/NAME.")
    output = _folder(options)
    if not (output.is_dir() and os.access(output, os.W_OK)):
        raise InputError(f"Cannot write to {output}; give a folder with --output.")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise InputError(f"--max-tokens is {options.max_tokens}; score at least 1 token.")
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"--batch-size is {options.batch_size}; it must be at least 1.")
    if options.sample_tokens < 0:
        raise InputError(f"--sample-tokens is {options.sample_tokens}; it must be 0 or more.")
    if not options.sample_tokens:
        return None
    return GenerationSettings(
        tokens=options.sample_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )


def _given_text(options: EvalOptions) -> str | None:
    """The text that the command line gives for the gate map, or None."""
    if options.text_file is None:
        text = options.text
    elif options.text is not None:
        raise InputError("Give --text or --text-file, not both.")
    else:
        try:  # like a source: line ends stay, a byte order mark does not
            text = options.text_file.expanduser().read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"Cannot read {options.text_file}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{options.text_file} is not UTF-8; convert it.") from error
    if text is not None and not text.strip():
        raise InputError("The text for the gate map is empty; give a text, or omit the option.")
    return text


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
    """Adds held-out scores and the health of the memory to the results; returns them as text."""
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
