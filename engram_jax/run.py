"""A run: the folder, what defines it, and the program that is made from that.

A run folder holds `config.json`, `hash.json` (if the model has memory), `texts.json` (fingerprints
of the tokenized corpora), `metrics.jsonl` with TensorBoard event files beside it, `checkpoints/`,
and what evaluation writes.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Int32

from engram_jax.checkpoint import Checkpoints
from engram_jax.compression import project_vocabulary
from engram_jax.config import Config, load_config, save_config
from engram_jax.data.corpus import Corpus, build_corpus
from engram_jax.data.pipeline import mix_rows
from engram_jax.data.sources import resolve_source, source_name
from engram_jax.errors import InputError
from engram_jax.files import hold_lock, written_whole
from engram_jax.hashing import NgramHash
from engram_jax.memory import lookup
from engram_jax.memory.layout import Table
from engram_jax.optimizer import OptimizerConfig
from engram_jax.processes import collective, is_leader
from engram_jax.program import Program, make_config_row_adam, without_foreign_kernels
from engram_jax.sharding import MeshConfig, make_mesh, platform_of
from engram_jax.tokenizer import Tokenizer, load_tokenizer
from engram_jax.train_state import TrainState, Weights
from engram_jax.typing import PyTree

# What a start that was killed before it wrote config.json leaves in the folder.
_BEGUN = {
    *("lock", "hash.json", "partial-hash.json", "texts.json", "partial-texts.json"),
    "partial-config.json",
}


# What may change when a run is resumed: none of it changes what is learned.
_CHANGEABLE = (
    "memory.gather",
    "model.attention.implementation",
    "model.engram.implementation",
    "model.experts.implementation",
    "model.remat",
    "model.scan",
    "mesh.",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "train.log_every",
    "train.evaluate_",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


# What may change if `reschedule` is given: how it goes on learning, from the newest checkpoint.
_RESCHEDULABLE = (
    *("train.steps", "memory.frozen"),
    # All but which optimizers there are: their states differ.
    *(f"optimizer.{f.name}" for f in fields(OptimizerConfig) if f.name != "matrices"),
    *(f"memory.adam.{name}" for name in ("factor", "b1", "b2", "eps")),
)


@dataclass(frozen=True)
class Run(Program):
    """A program with a folder and a tokenizer. Make one with `Run.start` or `Run.open`.

    Attributes:
        folder: the run folder.
        tokenizer: the tokenizer.
        checkpoints: the folder's checkpoints.
        start_from: folder of another run whose weights begin this one; None: random ones do.
        start_step: which checkpoint of that run; None: the newest.
    """

    mesh: jax.sharding.Mesh  # of devices that are there
    folder: Path
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    start_from: Path | None = None
    start_step: int | None = None

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
            elif is_leader() and reschedule:
                with _locked(folder):
                    save_config(config, folder / "config.json")
        return run

    def _write_beginning(self) -> None:
        """Writes what defines the run; config.json, last, says that all of it is there."""
        if self.ngram_hash is not None:
            self.ngram_hash.save(self.folder / "hash.json")
        with written_whole(self.folder / "texts.json") as partial:
            partial.write_text(json.dumps(self._texts(), indent=1) + "\n")
        save_config(self.config, self.folder / "config.json")

    @classmethod
    def _check_start(cls, config: Config, folder: Path, reschedule: bool) -> "Run":
        """Makes the run without writing to its folder: what is wrong leaves none behind."""
        tokenizer, ngram_hash = _make_hash(config)
        resumes = (folder / "config.json").exists()
        if resumes:
            _check_same(config, folder, reschedule=reschedule)
            if ngram_hash is not None:
                ngram_hash = _stored_hash(ngram_hash, config, folder)
        elif folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; name a folder for the run.")
        elif folder.exists() and any(path.name not in _BEGUN for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run; name another folder.")
        run = cls._assemble(folder, config, tokenizer, ngram_hash, make_mesh(config.mesh))
        data = config.data
        mix_rows(run.corpora(), data.weights, data.sequence_length, config.train.seed)
        if resumes:
            _check_texts(run._texts(), folder)
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
        program = Program.build(config, ngram_hash, mesh)
        identity = {"tokenizer": tokenizer.fingerprint}
        if ngram_hash is not None:
            identity["hash"] = ngram_hash.fingerprint
            identity["record"] = str(config.memory.layout)
        return cls(
            **{item.name: getattr(program, item.name) for item in fields(program)},
            folder=folder,
            tokenizer=tokenizer,
            checkpoints=Checkpoints(
                folder / "checkpoints",
                keep=config.train.keep_checkpoints,
                identity=identity,
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
                _check_same(self.config, self.folder)  # somebody may have begun another since
            yield

    def corpora(self, sources: Sequence[str] = ()) -> list[Corpus]:
        """The corpora, tokenized now if they are not in the cache; by default those of the run.

        Raises:
            InputError: a source cannot be read (see `build_corpus`), has nothing held out, or has
                another's name.
        """
        data = self.config.data
        sources = sources or data.sources
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

    def restore(self, step: int | None = None) -> TrainState:
        """The newest intact checkpoint's state, or a given step's.

        If the checkpoint's row optimizer or its schedule was another, its tables are settled by
        that, once, and a sentence says so.

        Raises:
            InputError: there is none, or it belongs to another tokenizer, hash or model.
        """
        found, state = self.checkpoints.restore(self.abstract_state(), step)
        return replace(state, tables=self._take_over(found, state.tables, state.step))

    def restore_weights(self, step: int | None = None) -> Weights:
        """As `restore`, without the state of the dense parameters' optimizer."""
        abstract = self.abstract_state().weights
        found, weights = self.checkpoints.restore(abstract, step, partial=True)
        return replace(weights, tables=self._take_over(found, weights.tables, weights.step))

    def _take_over(
        self, checkpoint: int, tables: dict[int, Table], step: Int32[Array, ""]
    ) -> dict[int, Table]:
        """A checkpoint's tables for this run's row optimizer."""
        theirs = load_config(self.checkpoints.path(checkpoint) / "config.json")
        if not tables or _row_adam_facts(theirs) == _row_adam_facts(self.config):
            return tables
        if is_leader():
            print(
                f"The checkpoint of step {checkpoint} in {self.checkpoints.folder} had another row "
                "optimizer or schedule; what that one owes its idle rows is settled now."
            )
        owes, keep = make_config_row_adam(theirs), not self.config.memory.frozen
        with jax.set_mesh(self.mesh):
            return {
                layer: lookup.settle(table, owes, step, keep_moments=keep)
                for layer, table in tables.items()
            }

    def fitting(self, folder: Path) -> "Run":
        """The run in another folder, whose weights can begin this one.

        Raises:
            InputError: there is none, or its tokenizer, hash or sizes are others.
        """
        other = Run.open(folder)
        if other.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InputError(
                f"{folder} has another tokenizer than this run, so its embeddings mean other "
                "tokens; give this run the same data.tokenizer."
            )
        ours, theirs = self.ngram_hash, other.ngram_hash
        if ours and theirs and ours.fingerprint != theirs.fingerprint:
            raise InputError(
                f"{folder} hashes with {theirs.fingerprint}, this run with {ours.fingerprint}: its "
                "table rows would mean other n-grams. Give this run the same memory and tokenizer."
            )
        if ours and self.config.memory.layout != other.config.memory.layout:
            raise InputError(
                f"{folder} stores its rows as {other.config.memory.layout}, this run as "
                f"{self.config.memory.layout}; give this run the same memory.row_width and "
                "memory.storage."
            )
        wanted, found = (_shapes(run.abstract_state().weights) for run in (self, other))
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise InputError(
                    f"The model in {folder} has other weights than this run: at {name} "
                    f"{found.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} here; give "
                    "this run the same model and memory sizes."
                )
        return other

    def save(self, state: TrainState) -> Path:
        """Saves the state as a checkpoint of its step, with the configuration and the hash."""
        names = ["config.json", *(["hash.json"] if self.ngram_hash else [])]
        return self.checkpoints.save(
            int(state.step),
            state,
            config=asdict(self.config),
            files=[self.folder / name for name in names],
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


def _row_adam_facts(config: Config) -> tuple[Any, ...]:
    """What `make_config_row_adam` depends on."""
    optimizer = config.optimizer
    schedule = (
        *(optimizer.learning_rate, optimizer.warmup_steps),
        *(optimizer.decay, optimizer.final_fraction),
    )
    return config.memory.adam, config.memory.frozen, schedule, config.train.steps


def _stored_hash(ours: NgramHash, config: Config, folder: Path) -> NgramHash:
    """The hash that a folder's run began with, whatever multipliers NumPy draws today."""
    stored = NgramHash.load(folder / "hash.json")
    if stored.projection.fingerprint != ours.projection.fingerprint:
        raise InputError(
            f"{folder} was hashed for another tokenizer than {config.data.tokenizer!r}; restore "
            "that tokenizer or start another run."
        )
    if stored.spec != ours.spec:
        raise InputError(
            f"{folder / 'hash.json'} is of another memory than {folder / 'config.json'}: "
            f"{stored.spec} there, {ours.spec} here; restore it from a checkpoint's folder."
        )
    return stored


def _check_same(config: Config, folder: Path, *, reschedule: bool = False) -> None:
    stored = load_config(folder / "config.json")
    ours, theirs = _flatten(asdict(config)), _flatten(asdict(stored))
    changeable = _CHANGEABLE + (_RESCHEDULABLE if reschedule else ())
    # Parts that only one of them has, as experts, are a difference in all their fields.
    differ = [
        name
        for name in ours | theirs
        if ours.get(name) != theirs.get(name) and not name.startswith(changeable)
    ]
    if not differ:
        return
    if "name" in differ or ours.keys() != theirs.keys():
        wanted = f"the configuration {theirs['name']} and the flags that it was begun with"
    else:
        wanted = " ".join(_as_flag(name, theirs[name]) for name in differ)
    message = f"{folder} holds another run: give {wanted} to resume it"
    if all(name.startswith(_RESCHEDULABLE) for name in differ):
        message += ", add --reschedule to go on with yours"
    if any((folder / "checkpoints").glob("*")):
        weights = f" (to begin with the weights of this one, add --start-from {folder})"
    else:
        message += f", delete {folder}, which has no checkpoint, to start anew"
        weights = ""
    raise InputError(f"{message}, or name another --run folder{weights}.")


def _as_flag(name: str, value: Any) -> str:
    """As one would type it."""
    values = value if isinstance(value, (list, tuple)) else [value]
    words = [shlex.quote(str(word)) for word in values]
    return " ".join([f"--{name.replace('_', '-')}", *words])


def _check_texts(texts: dict[str, Any], folder: Path) -> None:
    """Compares the fingerprints of tokenizer and corpora with those a resumed run began with."""
    path = folder / "texts.json"
    try:
        begun = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"{path}, the fingerprints of the texts, is missing or damaged ({error}); restore it, "
            "or give another --run folder to start anew."
        ) from error
    if begun["tokenizer"] != texts["tokenizer"]:
        raise InputError(
            f"{folder} was begun with another tokenizer; restore that, or give another --run "
            "folder to start anew."
        )
    ours, theirs = texts["corpora"], begun["corpora"]
    changed = [name for name in ours if theirs.get(name) != ours[name]]
    if changed:
        raise InputError(
            f"The text of {', '.join(changed)} is not what {folder} was begun with; restore it, or "
            "give another --run folder to start anew."
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat
