"""Sends the rows of every step to the devices, and writes them back, while other steps run.

    feed.load(tables of step n, plan of step n + 1, plan of step n + 2)  ──▶ tables of step n + 1

Tables outside the devices are in stores (`memory.store`). A step sees a buffer with the rows that
it needs. One thread of the host works one step ahead: while step n + 1 runs, it writes the buffer
of step n to the stores, and reads the rows of step n + 2. Step n + 1 may change some of them. These
rows are copied from the buffer of step n + 1 on the device (`from_previous`). So every step reads
what it would read from a table on the device, bit for bit.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from engram_jax.memory.layout import Table
from engram_jax.memory.plan import BufferPlan
from engram_jax.memory.store import RowStore
from engram_jax.sharding import TABLE_RW, TOKEN_AXES

type BufferPlans = Mapping[int, BufferPlan]  # by layer id

_BY_DEVICE = jax.P(TOKEN_AXES)


class FetchedRows(NamedTuple):
    """The rows of a step on the host, for this process's S devices.

    Attributes:
        places: their places, with padding.
        records: their records in the store.
        from_previous: index of a row in its device's buffer of the step before, or −1.
    """

    places: Int32[np.ndarray, "S V"]
    records: UInt32[np.ndarray, "S V words"]
    from_previous: Int32[np.ndarray, "S V"]


class RowFeed:
    """The buffers of successive steps.

    Close it, or use it in a `with` statement.

    Args:
        stores: of this process's devices, by layer id.
        mesh: the device mesh.
        frozen: steps do not change the rows, so they are not written back.

    Attributes:
        stores: the stores.
        waited: seconds for which `load` has waited for the thread.
    """

    def __init__(
        self, stores: Mapping[int, RowStore], mesh: jax.sharding.Mesh, *, frozen: bool = False
    ) -> None:
        self.stores, self.waited = stores, 0.0
        self._sharding, self._frozen = jax.NamedSharding(mesh, TABLE_RW), frozen
        self._thread = ThreadPoolExecutor(1, "row-feed")
        self._next: Future[dict[int, FetchedRows]] | None = None
        self._planned: BufferPlans | None = None  # of `_next`
        self._running: BufferPlans | None = None  # of the newest step
        self._counted = 0, 0
        # Host arrays of two steps, used in turn. A platform may read them until its step is done.
        self._pools: list[dict[tuple[int, tuple[int, ...]], UInt32[np.ndarray, "_ _ _"]]] = [{}, {}]

    def __enter__(self) -> "RowFeed":
        """The feed itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the thread, after what it is doing."""
        self._thread.shutdown(cancel_futures=True)

    def load(
        self, tables: Mapping[int, Table], plans: BufferPlans, following: BufferPlans
    ) -> dict[int, Table]:
        """The buffers of the next step.

        Args:
            tables: buffers after the newest step; without steps so far, any.
            plans: the rows of the next step.
            following: the rows of the step after it; they are read in the background.

        Raises:
            InputError: a store cannot be written, because the disk is full.
        """
        if self._next is None:
            self._submit(plans, None, None)
        assert self._planned is plans, "not the steps that were announced as following"
        fetched = self._wait()
        before = self._running
        buffers = {
            layer: self._send(layer, rows, tables[layer] if before else None)
            for layer, rows in fetched.items()
        }
        self._running = plans
        self._submit(following, before, tables)
        return buffers

    def flush(self, tables: Mapping[int, Table]) -> None:
        """Writes the buffers after the newest step, so that the stores have all rows."""
        if self._next is not None:
            self._next.result()
        if self._running is not None and not self._frozen:
            self._write(self._running, tables)

    def read(self, plans: BufferPlans) -> dict[int, Table]:
        """Buffers for reading, such as for evaluation. Call `flush` before."""
        rows = {layer: self._fetch(layer, plan, None, {}) for layer, plan in plans.items()}
        return {layer: self._send(layer, of_layer, None) for layer, of_layer in rows.items()}

    def counters(self) -> dict[str, float | int]:
        """For the log: rows and bytes in the stores of this process, and seconds of waiting."""
        rows, size = self._counted
        return {
            "stored_rows": rows,
            "stored_bytes": size,
            "seconds_waited_for_rows": self.waited,
        }

    def _wait(self) -> dict[int, FetchedRows]:
        if self._next is None:
            return {}
        start = time.perf_counter()
        fetched = self._next.result()
        self.waited += time.perf_counter() - start
        self._next, stores = None, self.stores.values()
        self._counted = sum(store.used for store in stores), sum(store.bytes for store in stores)
        return fetched

    def _submit(
        self, plans: BufferPlans, before: BufferPlans | None, tables: Mapping[int, Table] | None
    ) -> None:
        self._planned = plans
        self._next = self._thread.submit(self._work, plans, self._running, before, tables)

    def _work(
        self,
        plans: BufferPlans,
        running: BufferPlans | None,
        before: BufferPlans | None,
        tables: Mapping[int, Table] | None,
    ) -> dict[int, FetchedRows]:
        """Runs in the thread: writes the buffers of one step, and reads the rows of another.

        Args:
            plans: rows to read.
            running: rows of the step that runs meanwhile.
            before: rows of the step before that.
            tables: buffers after that step.
        """
        if before is not None and tables is not None:
            if self._frozen:
                jax.block_until_ready(tables)  # because host arrays are used again
            else:
                self._write(before, tables)
        self._pools.reverse()
        pool = self._pools[0]
        return {
            layer: self._fetch(layer, plan, running[layer] if running else None, pool)
            for layer, plan in plans.items()
        }

    def _fetch(
        self,
        layer: int,
        plan: BufferPlan,
        running: BufferPlan | None,
        pool: dict[tuple[int, tuple[int, ...]], UInt32[np.ndarray, "_ _ _"]],
    ) -> FetchedRows:
        store, shape = self.stores[layer], plan.places.shape
        records = pool.get((layer, shape))
        if records is None:
            records = np.zeros((*shape, store.table.layout.words), np.uint32)
            pool[layer, shape] = records
        from_previous = np.full(shape, -1, np.int32)
        for shard, count in enumerate(plan.distinct):
            places = plan.places[shard, :count]
            store.read(places, records[shard, :count])
            if running is not None and not self._frozen:
                known = running.places[shard, : running.distinct[shard]]
                index = np.searchsorted(known, places)
                inside = index < len(known)
                same = np.zeros(count, bool)
                same[inside] = known[index[inside]] == places[inside]
                from_previous[shard, :count] = np.where(same, index, -1)
        return FetchedRows(plan.places, records, from_previous)

    def _write(self, plans: BufferPlans, tables: Mapping[int, Table]) -> None:
        for layer, plan in plans.items():
            shards = sorted(
                tables[layer].records.addressable_shards,
                key=lambda shard: shard.index[0].start or 0,
            )
            for number, shard in enumerate(shards):
                count = plan.distinct[number]
                records = np.asarray(shard.data)  # waits for the step
                self.stores[layer].write(plan.places[number, :count], records[:count])

    def _send(self, layer: int, rows: FetchedRows, previous: Table | None) -> Table:
        table = self.stores[layer].table

        def put(array: np.ndarray) -> Array:
            flat = array.reshape(-1, *array.shape[2:])
            return jax.make_array_from_process_local_data(self._sharding, flat)

        records, places = put(rows.records), put(rows.places)
        if not self._frozen:
            # Without a previous step this is a copy. Otherwise the step would be donated an array
            # that shares memory with one of the host, and could change it.
            before = records if previous is None else previous.records
            records = _join(before, records, put(rows.from_previous))
        return Table(records, table.layout, layer, places, table.rows)


@jax.jit
def _join(
    previous: UInt32[Array, "P words"],
    fetched: UInt32[Array, "V words"],
    from_previous: Int32[Array, "V"],
) -> UInt32[Array, "V words"]:
    """The fetched records, except for those that are in the buffers of the step before."""

    def join_own(previous: Array, fetched: Array, index: Array) -> Array:
        kept = previous.at[index].get(mode="clip")
        return jnp.where((index >= 0)[:, None], kept, fetched)

    return jax.shard_map(join_own, in_specs=_BY_DEVICE, out_specs=_BY_DEVICE)(
        previous, fetched, from_previous
    )
