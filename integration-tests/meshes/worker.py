"""Runs one of several processes that share an adapter: `worker.py PROCESS COUNT PORT HOME`."""

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sharded import Setting, adapt, names_for_peft, plain, setting, train

import lorax
from lorax_io import load_adapter, load_peft, save_adapter, save_peft

DEVICES = 8  # of all processes


def setting_for(count: int) -> Setting:
    """The setting for this number of processes. With four, each mesh axis spans several of them."""
    if count == 2:
        return setting("fully sharded", explicit=False, stacked=False)
    return setting("fully sharded and tensor", explicit=True, stacked=False)


def run(where: Setting, home: pathlib.Path) -> list[float]:
    """Trains an adapter, saves it in both formats, loads it from both, and merges it.

    Returns:
        The loss of each step, and the loss of the merged model.
    """
    names = names_for_peft(where.stacked)
    with where.context():
        adapted = adapt(where)
        tunable, losses = train(where, adapted)
        save_adapter(home / "adapter", tunable, base=adapted.params, hash_base=True)
        save_peft(home / "folder", tunable, names)
        loaded = load_adapter(home / "adapter", params=adapted.params)
        assert_same(loaded, tunable)
        _, reloaded = load_peft(home / "folder", adapted.params, names)
        assert_same(reloaded, tunable)
        merged = lorax.merge_params(adapted.frozen, loaded)
        x, y = adapted.batch
        model = plain(where)
        loss = jax.jit(lambda params, x, y: jnp.mean((model(params, x) - y) ** 2))
        return [*losses, float(loss(merged, x, y))]


def assert_same(actual: Any, expected: Any) -> None:
    """Asserts equal values on the same devices, of those of this process."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        parts = {shard.device: shard for shard in y.addressable_shards}
        assert parts.keys() == {shard.device for shard in x.addressable_shards}
        for shard in x.addressable_shards:
            assert shard.index == parts[shard.device].index
            np.testing.assert_array_equal(shard.data, parts[shard.device].data)


def main(process: int, count: int, port: int, home: pathlib.Path) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process, initialization_timeout=60)
    assert (jax.process_count(), jax.device_count()) == (count, DEVICES)
    losses = run(setting_for(count), home)
    (home / f"losses of process {process}.json").write_text(json.dumps(losses))
    jax.distributed.shutdown()


if __name__ == "__main__":
    number, count, port, home = sys.argv[1:]
    main(int(number), int(count), int(port), pathlib.Path(home))
