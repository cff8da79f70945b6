"""Keys and values of all positions, where each device has only a part of a sequence.

A query needs the keys and values of all earlier positions. So every device gathers what they are
computed from, over the devices that share its sequences, and computes its own copy of them. For
latent attention that is the latent and one rotary key, which are many times smaller.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from engram_jax.sharding import position_axis, spec_axes


def on_all_positions(
    compute: Callable[..., tuple[Array, Array]],
    sources: tuple[Array, ...],
    parameters: tuple[Array, ...] = (),
) -> tuple[Float[Array, "copies slots J P"], Float[Array, "copies slots J O"]]:
    """The keys and values of all T positions, on every device that has some of the queries.

    If T is split over n devices, the results have n·B rows, one copy for each of the n devices.
    Every copy has its own gradient. These are summed for the sources, which are smaller, by a
    reduce-scatter.

    Args:
        compute: gives keys and values, from `sources` of any positions and `parameters`.
        sources: arrays [B, T, …], all split over devices alike.
        parameters: complete on every device (see `gather_parameters`).
    """
    along_t = position_axis(sources[0])
    if along_t is None:
        return compute(*sources, *parameters)
    spec = jax.typeof(sources[0]).sharding.spec
    axes = spec_axes(spec)
    complete = jax.P(reduced=set(axes))

    def compute_own(
        sources: tuple[Array, ...], parameters: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        everywhere = (jax.lax.all_gather(part, along_t, axis=1, tiled=True) for part in sources)
        return compute(*everywhere, *jax.lax.pcast(parameters, axes, to="varying"))

    return jax.shard_map(compute_own, in_specs=(jax.P(*spec[:2]), complete), out_specs=jax.P(axes))(
        sources, jax.sharding.reshard(parameters, complete)
    )
