"""The exchange of rows between the devices that need them and their owners; inside `shard_map`.

A device's distinct rows are sorted, so the rows of one owner are contiguous, and also those of any
range of the owner's rows. Round k of n exchanges the k-th of n equal parts of every owner's rows.
In a round, every device requests at most C rows from every other (`exchange_capacity`). Usually one
round is enough; more are needed if a pair of devices exceeds C. A row is in the same round on all
devices, so its owner gets all of its gradients in that round.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from engram_jax.memory.places import exchange_capacity


@dataclass(frozen=True)
class Route:
    """One device's distinct rows, and how to reach their owners.

    Attributes:
        places: places of the distinct rows, ascending, then padding from R up.
        rounds: rounds n of this step, the same on all devices.
        owned: rows that each device owns, R / S.
        axes: mesh axes over which tables and tokens are split.
        buffered: where the owners keep these rows, if they only have the rows of this step (see
            `plan.BufferPlan`). Rounds and order remain those of the places.
    """

    places: Int32[Array, "U"]
    rounds: Int32[Array, ""]
    owned: int
    axes: tuple[str, ...]
    buffered: Int32[Array, "U"] | None = None

    @property
    def own_places(self) -> Int32[Array, "U"]:
        """On one device: where its records are."""
        return self.places if self.buffered is None else self.buffered

    @property
    def shards(self) -> int:
        """Number S of devices."""
        return jax.lax.axis_size(self.axes)

    @property
    def capacity(self) -> int:
        """Rows C that a pair of devices exchanges in a round."""
        return exchange_capacity(len(self.places), self.shards, self.owned)

    def load(self) -> Float[Array, ""]:
        """Rows that all devices request from the fullest owner, relative to the mean of owners."""
        edges = jnp.arange(self.shards + 1, dtype=jnp.int32) * self.owned
        ends = jnp.searchsorted(self.places, edges, method="compare_all")
        asked = jax.lax.psum(jnp.diff(ends), self.axes)
        return jnp.max(asked) / jnp.mean(asked)

    def fetch(
        self, number: Int32[Array, ""], answer: Callable[[Int32[Array, "n"]], Float[Array, "n F"]]
    ) -> tuple[Float[Array, "U F"], Bool[Array, "U"]]:
        """The owners' answers for the distinct rows of a round, and which rows are in it.

        Args:
            number: the round.
            answer: runs on the owner; maps its own places to the data to send. Places from
                `owned` up are padding.
        """
        starts, ends, asked = self._ask(number)
        sent = answer(asked).reshape(self.shards, self.capacity, -1)
        received = self._swap(sent).reshape(self.shards * self.capacity, -1)
        owner = self.places // self.owned
        position = jnp.arange(len(self.places)) - starts.at[owner].get(mode="fill", fill_value=0)
        count = (ends - starts).at[owner].get(mode="fill", fill_value=0)
        here = (position >= 0) & (position < count)
        index = jnp.where(here, owner * self.capacity + position, len(received))
        return received.at[index].get(mode="fill", fill_value=0), here

    def deliver(
        self, number: Int32[Array, ""], gradient: Float[Array, "U F"]
    ) -> tuple[Int32[Array, "n"], Float[Array, "n F"]]:
        """The distinct own rows for which devices send gradients in a round, and the sums of these.

        Gradients of equal rows are summed in the order of the devices that sent them. Row numbers
        are ascending and distinct; those from `owned` up are padding.
        """
        starts, ends, asked = self._ask(number)
        index = starts[:, None] + jnp.arange(self.capacity)[None]
        sent = gradient.at[index].get(mode="fill", fill_value=0)
        sent = jnp.where((index < ends[:, None])[..., None], sent, 0)
        received = self._swap(sent).reshape(len(asked), -1)
        order = jnp.argsort(asked, stable=True)
        ascending = asked[order]
        is_new = jnp.concatenate([jnp.ones(1, bool), ascending[1:] != ascending[:-1]])
        segment = jnp.cumsum(is_new) - 1
        sums = jax.ops.segment_sum(
            received[order], segment, num_segments=len(asked), indices_are_sorted=True
        )
        padding = self.owned + 1 + jnp.arange(len(asked), dtype=jnp.int32)
        rows = padding.at[segment].set(ascending, indices_are_sorted=True)
        return rows, sums

    def _ask(
        self, number: Int32[Array, ""]
    ) -> tuple[Int32[Array, "S"], Int32[Array, "S"], Int32[Array, "n"]]:
        """What this device requests in a round, and what all devices request from it.

        Args:
            number: number of the round.

        Returns:
            Begin and end, in `places`, of each owner's rows of this round; and where the requested
            rows are on this device, by requesting device (padding: `owned`).
        """
        first = jnp.arange(self.shards, dtype=jnp.int32) * self.owned

        def begin(number: Array) -> Int32[Array, "S"]:
            # ⌈number · owned / rounds⌉ without leaving 32 bits.
            whole, rest = self.owned // self.rounds, self.owned % self.rounds
            edge = number * whole + -(-number * rest // self.rounds)
            return jnp.searchsorted(self.places, first + edge, method="compare_all")

        starts, ends = begin(number), begin(number + 1)
        index = starts[:, None] + jnp.arange(self.capacity)[None]
        if self.buffered is None:
            wanted = self.places.at[index].get(mode="clip") - first[:, None]
        else:
            wanted = self.buffered.at[index].get(mode="clip")
        wanted = jnp.where(index < ends[:, None], wanted, self.owned)
        return starts, ends, self._swap(wanted).reshape(-1)

    def _swap(self, by_other: Array) -> Array:
        """Sends part s to device s; part s of the result came from device s."""
        return jax.lax.all_to_all(by_other, self.axes, split_axis=0, concat_axis=0, tiled=True)
