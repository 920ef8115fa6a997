# SPDX-License-Identifier: Apache-2.0
"""The same head inside `jax.shard_map`: each device sees its part, `axis_name` joins the classes.

Tokens over `data`, classes over `vocab`. Labels are global class numbers.

    python examples/shard_map_head.py
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoftmax

TOKENS, WIDTH, CLASSES = 512, 64, 1024


def local_loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all tokens: this device's sum by the global count, then over the devices."""
    total = jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, axis_name="vocab", reduction="sum"
    )
    return lax.psum(total / TOKENS, "data")


def main() -> None:
    """Compare with one device."""
    # Eight devices of any CPU, asked for before JAX looks for some. To be left out where there are.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH))
    kernel = jax.random.normal(keys[1], (WIDTH, CLASSES)) / WIDTH**0.5
    labels = jax.random.randint(keys[2], (TOKENS,), 0, CLASSES)

    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("data", "vocab"), (AxisType.Auto,) * 2)
    specs = (P("data", None), P(None, "vocab"), P("data"))
    sharded = jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=P())
    loss, d_kernel = jax.jit(jax.value_and_grad(sharded, argnums=1))(hidden, kernel, labels)
    plain = jaxsoftmax.linear_softmax_cross_entropy
    alone, d_alone = jax.jit(jax.value_and_grad(plain, argnums=1))(hidden, kernel, labels)

    print(f"loss {loss:.6f}, on one device {alone:.6f}")
    difference = jnp.max(jnp.abs(jax.device_get(d_kernel) - jax.device_get(d_alone)))
    print(f"largest difference of the kernel gradients {difference:.1e}")


if __name__ == "__main__":
    main()
