"""How checkpoints use Orbax: its settings, its errors, and its work in the background."""

import logging
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

from engram_jax.checkpoint_files import FileFacts, read_share

try:
    from orbax.checkpoint import v1 as ocp
except ImportError:  # the path until Orbax moves it
    from orbax.checkpoint.experimental import v1 as ocp

# Chunks of 64 MiB limit the memory in use, and let a restore on another mesh read only the parts it
# needs. No compression: Zstandard saves 8 % on float32 tables and takes five times as long.
CHUNK_BYTES = 64 << 20

# If several devices have copies of an array, each device writes a part, which a separate compiled
# program cuts out. For smaller parts, compiling these programs takes longer than writing.
_LEAST_PART_BYTES = 1 << 20

_WRITE_SECONDS = 24 * 3600  # Orbax gives up after 20 minutes by default


def read_when_written(folder: Path, response: Any) -> futures.Future[dict[str, FileFacts]]:
    """Waits in a thread until Orbax has written all arrays, then reads this process's share.

    The thread does not delay the end of the process. It must not use collectives of the devices:
    their order beside those of the main thread would differ among the processes.
    """
    facts: futures.Future[dict[str, FileFacts]] = futures.Future()

    def work() -> None:
        try:
            response.result()
            facts.set_result(read_share(folder))
        except BaseException as error:
            facts.set_exception(error)

    threading.Thread(target=work, name="checkpoint", daemon=True).start()
    return facts


class _RaisedAsWell(logging.Filter):
    """Drops the errors that Orbax's threads log, with a traceback each, before they raise them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in Path(record.pathname).parts)


logging.getLogger("absl").addFilter(_RaisedAsWell())


def orbax_context(partial: bool = False) -> Any:
    """The settings of reading and writing.

    Args:
        partial: read only some arrays of a checkpoint.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    context.asynchronous.timeout_secs = _WRITE_SECONDS
    context.array.saving.use_compression = False
    context.array.saving.min_slice_bytes_for_replica_parallel = _LEAST_PART_BYTES
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context
