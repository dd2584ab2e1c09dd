"""Adapts thirty layers of 5000 × 5000: 3 GB of weights, and 9 million trained parameters.

pip install lorax-core optax
python examples/thirty_layers.py [--dim 500]
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from lorax import count_params, init_lora, lora, merge_params

LAYERS, RANK, BATCH = 30, 30, 16


def model(params, x):
    """A plain model."""
    for w in params:
        x = jax.nn.relu(x @ w)
    return x


def main(dim, steps):
    keys = jax.random.split(jax.random.PRNGKey(0), LAYERS)
    params = [jax.random.normal(key, (dim, dim)) * (2 / dim) ** 0.5 for key in keys]
    x = jax.random.normal(jax.random.PRNGKey(1), (BATCH, dim))

    lora_spec = [RANK] * LAYERS
    lora_model = lora(model)
    frozen_params, tunable_params = init_lora(
        params=params, spec=lora_spec, key=jax.random.PRNGKey(0)
    )
    print(f"{count_params(params):,} parameters, of which the adapter trains")
    print(f"{count_params(tunable_params):,}, so Adam keeps two numbers only for each of these")

    optimizer = optax.adam(learning_rate=1e-4)
    state = optimizer.init(tunable_params)

    # The frozen weights are an argument. As captured variables, they would be constants of the
    # program, and the compiler would copy all of them.
    @jax.jit
    def step(tunable_params, state, frozen_params):
        def loss(tunable_params):
            return jnp.mean((lora_model((frozen_params, tunable_params), x) - 1) ** 2)

        value, grads = jax.value_and_grad(loss)(tunable_params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(tunable_params, updates), state, value

    for i in range(steps):
        tunable_params, state, value = step(tunable_params, state, frozen_params)
        print(f"step {i + 1}: loss {value:.4f}")

    split = lora_model((frozen_params, tunable_params), x)
    # This makes a second set of weights; `donate=True` would free the frozen ones.
    merged_params = merge_params(frozen_params, tunable_params)
    merged = model(merged_params, x)
    difference = jnp.max(jnp.abs(merged - split)) / jnp.max(jnp.abs(merged))
    print(f"merged and split differ by {difference:.1e} of the largest output")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=5000, help="of every layer")
    parser.add_argument("--steps", type=int, default=5, help="of training")
    options = parser.parse_args()
    main(options.dim, options.steps)
