"""Trains or resumes a run.

    python train.py [CONFIG] [--run FOLDER] [--SECTION.FIELD VALUE …]

CONFIG is one of the configurations listed below; by default, `default`.

Common flags: --run, --data.sources, --train.steps, --data.batch-size,
--model.width, --model.layers, --memory.rows-per-head,
--optimizer.learning-rate.

A list flag without values is an empty list (`--memory.layers`: no memory).
"""

import os
import signal
import sys

from engram_jax.beginning import begin

begin()  # before the imports that take seconds

from dataclasses import dataclass
from pathlib import Path

import jax

from engram_jax.command_line import parse
from engram_jax.config import Config
from engram_jax.costs.accounting import allocate
from engram_jax.decoding.generate import Generator
from engram_jax.decoding.settings import GenerationSettings
from engram_jax.errors import InputError, one_sentence
from engram_jax.files import expand_home
from engram_jax.memory.store import Placement
from engram_jax.placement import open_stores
from engram_jax.processes import end_together, is_leader, join_processes
from engram_jax.run import Run
from engram_jax.train_state import Weights
from engram_jax.trainer import train
from engram_jax.training_progress import Diverged

PROMPT = "The city is the capital of"
INTERRUPTED = 128 + signal.SIGINT  # exit status of a run that was stopped by any signal


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run.

    Attributes:
        run: run folder; by default, runs/NAME. If it holds this run, the run is resumed.
        start_from: folder of another run, to start with its weights; step, optimizer state and
            moments of rows start anew, and a checkpoint of step 0 is saved.
        start_step: step of that run's checkpoint; by default, the newest.
        allocation: change the allocation of sparse parameters (those that a token does not
            activate): this share to experts, the rest to table rows (the paper's ρ). Needs a
            configuration with experts and, below 1, memory.
        reschedule: resume a run with another number of steps, other settings of the same
            optimizers, or another value of memory.frozen.
        profile: write a trace of ten steps to FOLDER/profile (for TensorBoard or Perfetto).
        distributed: join the other processes of a pod, SLURM job or cluster first
            (`jax.distributed.initialize`).
    """

    run: Path | None = None
    start_from: Path | None = None
    start_step: int | None = None
    allocation: float | None = None
    reschedule: bool = False
    profile: bool = False
    distributed: bool = False


def main(options: TrainOptions, config: Config) -> int:
    """Trains, and prints the next command. Returns the exit status."""
    if options.allocation is not None:
        config = allocate(config, options.allocation)
    if options.run is None and not config.name.strip("./ "):
        raise InputError(f"--name is {config.name!r}; give a name, or a folder with --run.")
    run = Run.start(
        config,
        expand_home(options.run or Path("runs") / config.name),
        start_from=options.start_from and expand_home(options.start_from),
        start_step=options.start_step,
        reschedule=options.reschedule,
    )
    if is_leader():
        print(*run.describe_data(), sep="\n")
        if saved := run.checkpoints.steps():
            print(f"Resuming: the newest checkpoint is of step {saved[-1]}.")
    try:
        state = train(run, profile=options.profile)
    except Diverged as error:
        sys.exit(f"error: {error}")
    stopped = state.step < config.train.steps
    if is_leader():
        print(f"{run.folder} has finished {int(state.step)} of {config.train.steps} steps.")
        python = "python" if "VIRTUAL_ENV" in os.environ else os.path.relpath(sys.executable)
        flags = " --distributed" if jax.process_count() > 1 else ""
        following = f"Next: {python} eval.py {run.folder}{flags}"
        print("The same command resumes it." if stopped else following)
    if stopped:
        return INTERRUPTED
    if run.program.can_decode:
        print(f"Sample: {PROMPT}|{sample(run, state.weights)}")
    elif is_leader():
        print(
            "No sample: it needs one process that splits neither parameters, experts nor sequences."
        )
    return 0


def sample(run: Run, weights: Weights) -> str:
    """A continuation of `PROMPT` by the trained model.

    Tables in host memory or in a file stay there. In that case, all weights are read from the
    newest checkpoint, because the stores of training are closed.
    """
    settings = GenerationSettings(tokens=40, temperature=0.7, top_k=40)
    placement: Placement = "device"
    if not run.program.tables_on_device:
        placement = run.config.memory.placement
        run = Run.open(run.folder)
    with open_stores(run.program, run.folder, placement) as stores:
        if stores:
            weights = run.restore_weights(stores=stores)
        generator = Generator(run.program, run.tokenizer, weights, stores)
        return generator.generate([PROMPT], settings)[0].text


if __name__ == "__main__":
    with one_sentence():
        arguments = parse(TrainOptions, __doc__ or "")
        if arguments[0].distributed:
            join_processes()
    with end_together(), one_sentence():
        status = main(*arguments)
    sys.exit(status)
