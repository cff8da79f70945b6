"""A run: the folder, what defines it, and the program that is made from that.

A run folder holds `config.json`, `hash.json` (if the model has memory), `texts.json` (fingerprints
of the tokenized corpora), `metrics.jsonl` with TensorBoard event files beside it, `checkpoints/`,
and what evaluation writes.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Int32

from engram_jax.checkpoint import Checkpoints
from engram_jax.compression import project_vocabulary
from engram_jax.config import Config, load_config, save_config
from engram_jax.data.corpus import Corpus
from engram_jax.data.pipeline import BatchIterator, make_batches, mix_rows
from engram_jax.data.sources import resolve_source, source_name
from engram_jax.data.token_cache import build_corpus
from engram_jax.errors import InputError
from engram_jax.files import hold_lock, written_whole
from engram_jax.hashing import NgramHash
from engram_jax.identity import (
    check_fitting,
    check_same_run,
    check_texts,
    checkpoint_identity,
    row_adam_facts,
    stored_hash,
)
from engram_jax.memory import lookup
from engram_jax.memory.layout import Table
from engram_jax.platforms import default_workers, without_foreign_kernels
from engram_jax.processes import collective, is_leader
from engram_jax.program import Program, make_config_row_adam
from engram_jax.sharding import MeshConfig, make_mesh, platform_of
from engram_jax.tokenizer import Tokenizer, load_tokenizer
from engram_jax.train_state import TrainState, Weights

# What a start that was killed before it wrote config.json leaves in the folder.
_BEGUN = {
    *("lock", "hash.json", "partial-hash.json", "texts.json", "partial-texts.json"),
    "partial-config.json",
}


@dataclass(frozen=True)
class Run:
    """A folder, a tokenizer and a program. Make one with `Run.start` or `Run.open`.

    Attributes:
        program: what the devices run.
        folder: the run folder.
        tokenizer: the tokenizer.
        checkpoints: the folder's checkpoints.
        start_from: folder of another run whose weights begin this one; None: random ones do.
        start_step: which checkpoint of that run; None: the newest.
    """

    program: Program
    folder: Path
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    start_from: Path | None = None
    start_step: int | None = None

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.program.config

    @classmethod
    def start(
        cls,
        config: Config,
        folder: Path,
        *,
        start_from: Path | None = None,
        start_step: int | None = None,
        reschedule: bool = False,
    ) -> "Run":
        """Makes the folder, or takes one that holds a run of this very configuration.

        Args:
            config: the configuration.
            folder: the run folder.
            start_from: folder of another run, if that run's weights begin this one.
            start_step: which checkpoint of that run; None: the newest.
            reschedule: take a folder whose run has another number of steps, other settings of the
                same optimizers, or tables that are not frozen as these are, and go on with these;
                the folder's configuration is then this one.

        Raises:
            InputError: the folder holds something else, the tokenizer does not fit the model,
                sizes do not divide the mesh, the run is beyond the configuration's steps, or the
                other run's weights do not fit.
        """
        with collective(f"begin the run in {folder}"):
            run = cls._check_start(config, folder, reschedule)
            done = run.checkpoints.steps()
            if done and done[-1] > config.train.steps:
                raise InputError(
                    f"{folder} is at step {done[-1]}, beyond train.steps {config.train.steps}; "
                    "give more."
                )
            run = replace(run, start_from=start_from, start_step=start_step)
            if start_step is not None and start_from is None:
                raise InputError("--start-step chooses a checkpoint of --start-from; give both.")
            if start_from is not None and not done:
                run.fitting(start_from).checkpoints.require(start_step)
        with collective(f"write to {folder}"):
            if is_leader() and not (folder / "config.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                with _locked(folder):
                    run._write_beginning()
                _warn_of_padding(config)
            elif is_leader() and reschedule:
                with _locked(folder):
                    save_config(config, folder / "config.json")
        return run

    def _write_beginning(self) -> None:
        """Writes what defines the run; config.json, last, says that all of it is there."""
        if self.program.ngram_hash is not None:
            self.program.ngram_hash.save(self.folder / "hash.json")
        with written_whole(self.folder / "texts.json") as partial:
            partial.write_text(json.dumps(self._texts(), indent=1) + "\n")
        save_config(self.config, self.folder / "config.json")

    @classmethod
    def _check_start(cls, config: Config, folder: Path, reschedule: bool) -> "Run":
        """Makes the run without writing to its folder: what is wrong leaves none behind."""
        tokenizer, ngram_hash = _make_hash(config)
        resumes = (folder / "config.json").exists()
        if resumes:
            check_same_run(config, folder, reschedule=reschedule)
            if ngram_hash is not None:
                ngram_hash = stored_hash(ngram_hash, config, folder)
        elif folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; name a folder for the run.")
        elif folder.exists() and any(path.name not in _BEGUN for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run; name another folder.")
        run = cls._assemble(folder, config, tokenizer, ngram_hash, make_mesh(config.mesh))
        data = config.data
        mix_rows(run.corpora(), data.weights, data.sequence_length, config.train.seed)
        if resumes:
            check_texts(run._texts(), folder)
        return run

    def _texts(self) -> dict[str, Any]:
        """Fingerprints of the tokenizer and of the tokenized corpora."""
        corpora = {corpus.name: corpus.folder.name for corpus in self.corpora()}
        return {"tokenizer": self.tokenizer.fingerprint, "corpora": corpora}

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Opens a run to read it, on one device, whatever mesh and platform it was trained on.

        Raises:
            InputError: the folder holds no run, or its tokenizer is gone.
        """
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        config = without_foreign_kernels(load_config(folder / "config.json"), platform_of(mesh))
        tokenizer = _load_tokenizer(config)
        ngram_hash = NgramHash.load(folder / "hash.json") if config.memory.layers else None
        return cls._assemble(folder, config, tokenizer, ngram_hash, mesh)

    @classmethod
    def _assemble(
        cls,
        folder: Path,
        config: Config,
        tokenizer: Tokenizer,
        ngram_hash: NgramHash | None,
        mesh: jax.sharding.Mesh,
    ) -> "Run":
        return cls(
            program=Program.build(config, ngram_hash, mesh),
            folder=folder,
            tokenizer=tokenizer,
            checkpoints=Checkpoints(
                folder / "checkpoints",
                keep=config.train.keep_checkpoints,
                identity=checkpoint_identity(tokenizer, ngram_hash, config.memory.layout),
            ),
        )

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Holds the folder against other programs that would train in it.

        Raises:
            InputError: one does already.
        """
        with ExitStack() as stack:
            with collective(f"train in {self.folder}"):
                if is_leader():
                    stack.enter_context(_locked(self.folder))
                check_same_run(self.config, self.folder)  # somebody may have begun another since
            yield

    def corpora(self, sources: Sequence[str] = ()) -> list[Corpus]:
        """The corpora of these sources, tokenized now if they are not in the cache.

        Args:
            sources: shipped corpora or paths; by default those of the run.

        Raises:
            InputError: a source cannot be read (see `build_corpus`), has nothing held out, or has
                another's name.
        """
        return self._read_corpora(sources) if sources else list(self._own_corpora)

    @cached_property
    def _own_corpora(self) -> list[Corpus]:
        return self._read_corpora(self.config.data.sources)

    def _read_corpora(self, sources: Sequence[str]) -> list[Corpus]:
        data = self.config.data
        names = [source_name(resolve_source(source)) for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise InputError(
                    f"Two sources are called {name!r}, which is how results name them; rename one."
                )
        corpora = [
            build_corpus(source, self.tokenizer, Path(data.cache), data.held_out)
            for source in sources
        ]
        for corpus in corpora:
            if not len(corpus.held_out):
                raise InputError(
                    f"None of the {corpus.manifest.documents} documents of {corpus.name} is held "
                    "out for evaluation; raise data.held_out, or cut the text into more documents "
                    "(a .txt file is one; of JSON Lines, every line)."
                )
        return corpora

    def batches(self, first_batch: int = 0) -> BatchIterator:
        """This process's training batches from a number on; close them (see `make_batches`)."""
        data, train = self.config.data, self.config.train
        workers = data.workers
        if workers is None:
            workers = default_workers(platform_of(self.program.mesh))
        return make_batches(
            self.corpora(),
            data.weights,
            sequence_length=data.sequence_length,
            batch_size=data.batch_size,
            accumulation=train.accumulation,
            seed=train.seed,
            planner=self.program.planner(),
            first_batch=first_batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=workers,
            prefetch=data.prefetch,
        )

    def restore(self, step: int | None = None) -> TrainState:
        """The newest intact checkpoint's state, or a given step's.

        If the checkpoint's row optimizer or its schedule was another, its tables are settled by
        that, once, and a sentence says so.

        Raises:
            InputError: there is none, or it belongs to another tokenizer, hash or model.
        """
        found, state = self.checkpoints.restore(self.program.abstract_state(), step)
        return replace(state, tables=self._take_over(found, state.tables, state.step))

    def restore_weights(self, step: int | None = None) -> Weights:
        """As `restore`, without the state of the dense parameters' optimizer."""
        abstract = self.program.abstract_state().weights
        found, weights = self.checkpoints.restore(abstract, step, partial=True)
        return replace(weights, tables=self._take_over(found, weights.tables, weights.step))

    def _take_over(
        self, checkpoint: int, tables: dict[int, Table], step: Int32[Array, ""]
    ) -> dict[int, Table]:
        """A checkpoint's tables for this run's row optimizer."""
        theirs = load_config(self.checkpoints.path(checkpoint) / "config.json")
        if not tables or row_adam_facts(theirs) == row_adam_facts(self.config):
            return tables
        if is_leader():
            print(
                f"The checkpoint of step {checkpoint} in {self.checkpoints.folder} had another row "
                "optimizer or schedule; the pending updates of its idle rows are applied now."
            )
        before, keep = make_config_row_adam(theirs), not self.config.memory.frozen
        with self.program.use_mesh():
            return {
                layer: lookup.settle(table, before, step, keep_moments=keep)
                for layer, table in tables.items()
            }

    def fitting(self, folder: Path) -> "Run":
        """The run in another folder, whose weights can begin this one.

        Raises:
            InputError: there is none, or its tokenizer, hash or sizes are others.
        """
        other = Run.open(folder)
        check_fitting(folder, (self.program, self.tokenizer), (other.program, other.tokenizer))
        return other

    def save(self, state: TrainState) -> Path:
        """Saves the state as a checkpoint of its step, with the configuration and the hash."""
        names = ["config.json", *(["hash.json"] if self.program.ngram_hash else [])]
        return self.checkpoints.save(
            int(state.step),
            state,
            config=asdict(self.config),
            files=[self.folder / name for name in names],
        )


def _warn_of_padding(config: Config) -> None:
    layout = config.memory.layout
    if config.memory.layers and layout.padding > 0.25:
        narrower, wider = layout.better_widths()
        print(
            f"{layout.padding:.0%} of every table row is padding at memory.row_width "
            f"{layout.width}; {narrower} or {wider} use the memory better.",
            file=sys.stderr,
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(folder / "lock", wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"Another process is training in {folder}; wait for it, or name another --run "
                "folder."
            ) from error
        yield


def _load_tokenizer(config: Config) -> Tokenizer:
    data = config.data
    return load_tokenizer(
        data.tokenizer, pad_id=data.pad_id, bos_id=data.bos_id, eos_id=data.eos_id
    )


def _make_hash(config: Config) -> tuple[Tokenizer, NgramHash | None]:
    """The tokenizer, and the hash of the memory if there is one."""
    tokenizer = _load_tokenizer(config)
    if tokenizer.vocab_size > config.model.vocabulary:
        raise InputError(
            f"Tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} pieces and the model "
            f"has {config.model.vocabulary}; set model.vocabulary to {tokenizer.vocab_size}."
        )
    if not config.memory.layers:
        return tokenizer, None
    spec = config.memory.hash_spec(tokenizer.pad_id)
    return tokenizer, NgramHash.build(spec, project_vocabulary(tokenizer))
