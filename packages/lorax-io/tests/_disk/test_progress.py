"""Progress bars: shown on a terminal after a second, if enabled and `rich` is installed."""

import sys
from typing import Any

import jax.numpy as jnp
import pytest

from lorax_io import Linear, load_adapter, load_any, load_peft, save_adapter, save_merged, save_peft
from lorax_io._disk import progress


@pytest.fixture
def started(monkeypatch):
    """The labels of started bars, on a simulated terminal where everything is slow."""
    labels = []

    class Bar:
        def update(self, *args, **kwargs):
            pass

        stop = update

    def start(label, total):
        labels.append(label)
        return Bar(), None

    monkeypatch.setattr(progress, "_start", start)
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return labels


def calls(home) -> dict[str, Any]:
    from lorax import LoraWeight

    row = LoraWeight(jnp.ones((5, 2)), jnp.ones((2, 3)), 2)
    tunable, params, names = {"q": row}, {"q": jnp.ones((5, 3))}, {"q": Linear("q")}
    return {
        "save_adapter": lambda **kw: save_adapter(home / "a", tunable, **kw),
        "load_adapter": lambda **kw: load_adapter(home / "a", params=params, **kw),
        "like": lambda **kw: load_adapter(home / "a", like=tunable, **kw),
        "save_peft": lambda **kw: save_peft(home / "peft", tunable, names, **kw),
        "load_peft": lambda **kw: load_peft(home / "peft", params, names, **kw),
        "load_any": lambda **kw: load_any(home / "peft", params, names, **kw),
        "save_merged": lambda **kw: save_merged(home / "m", params, tunable, names, **kw),
    }


def test_progress_bar_can_be_disabled(tmp_path, started):
    for name, call in calls(tmp_path).items():
        call(progress=False)
        assert started == [], name
        if name != "save_merged":  # its folder exists now
            call()
            assert started, name
        started.clear()


def test_no_progress_bar_without_rich(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    made = calls(tmp_path)
    made["save_adapter"]()
    assert made["load_adapter"]()["q"].rank == 2
