import subprocess
import sys

SCRIPT = """
import sys
before = set(sys.modules)
import jax, jax.export, jax.extend.core, jax.numpy
with_jax = {name.partition(".")[0] for name in sys.modules}
import lorax, lorax.testing
with_lorax = {name.partition(".")[0] for name in sys.modules}
brought = with_lorax - with_jax - {"lorax"} - set(sys.stdlib_module_names)
assert not brought, brought
"""


def test_lorax_imports_only_jax():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_only_compat_reaches_past_public_jax():
    import pathlib

    import lorax

    root = pathlib.Path(lorax.__file__).parent
    private = [
        path.name
        for path in root.rglob("*.py")
        if "jax._src" in path.read_text() or "jax.core" in path.read_text()
    ]
    assert private == ["_compat.py"]
