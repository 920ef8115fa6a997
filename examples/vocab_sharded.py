# SPDX-License-Identifier: Apache-2.0
"""A head whose kernel is sharded, on an explicit mesh: nothing to say but where the arrays lie.

Tokens lie over `data`, the kernel over `data` along its hidden axis (FSDP) and over `vocab` along
its classes. The head reads that from the arrays: it gathers the hidden axis once, and gives every
gradient the sharding of its argument.

    python examples/vocab_sharded.py
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoftmax

TOKENS, WIDTH, CLASSES = 512, 64, 1024


def main() -> None:
    """Compare with one device."""
    # Eight devices of any CPU, asked for before JAX looks for some. To be left out where there are.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH))
    kernel = jax.random.normal(keys[1], (WIDTH, CLASSES)) / WIDTH**0.5
    labels = jax.random.randint(keys[2], (TOKENS,), 0, CLASSES)

    step = jax.jit(jax.value_and_grad(jaxsoftmax.linear_softmax_cross_entropy, argnums=(0, 1)))
    alone = step(hidden, kernel, labels)

    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("data", "vocab"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        hidden = jax.device_put(hidden, P("data", None))
        kernel = jax.device_put(kernel, P("data", "vocab"))
        labels = jax.device_put(labels, P("data"))
        loss, (d_hidden, d_kernel) = step(hidden, kernel, labels)

    print("hidden gradient", jax.typeof(d_hidden))
    print("kernel gradient", jax.typeof(d_kernel))
    print(f"loss {loss:.6f}, on one device {alone[0]:.6f}")
    difference = jnp.max(jnp.abs(jax.device_get(d_kernel) - jax.device_get(alone[1][1])))
    print(f"largest difference of the kernel gradients {difference:.1e}")


if __name__ == "__main__":
    main()
