"""`import lorax` imports JAX only, and only `_compat` uses private JAX."""

import pathlib
import subprocess
import sys

import lorax

SCRIPT = """
import sys
before = set(sys.modules)
import jax, jax.export, jax.extend.core, jax.numpy
with_jax = {name.partition(".")[0] for name in sys.modules}
import lorax, lorax.testing
with_lorax = {name.partition(".")[0] for name in sys.modules}
imported = with_lorax - with_jax - {"lorax"} - set(sys.stdlib_module_names)
assert not imported, imported
"""


def test_lorax_imports_only_jax():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_only_compat_uses_private_jax():
    root = pathlib.Path(lorax.__file__).parent
    private = [
        path.name
        for path in root.rglob("*.py")
        if "jax._src" in path.read_text() or "jax.core" in path.read_text()
    ]
    assert private == ["_compat.py"]
