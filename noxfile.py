#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2026.2.9"]
# ///
"""Every check of this repository, each in an environment of its own.

`pip install nox && nox` runs all of them but `finetune`, `minilm` and `bench`. nox sees from the
header above that it needs uv as well, and fetches it from PyPI into `.nox` where it is not
installed.
"""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2026.2.9"
nox.options.default_venv_backend = "uv"
# An interpreter is used where there is one and never downloaded: its session is skipped, in so many
# words, and all other sessions need nothing but a package index.
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False

PACKAGES = ["lorax-core", "lorax-hf", "lorax-io"]
OLDEST_PYTHON = "3.11"
FINETUNE = ["--requirement", "examples/finetune/requirements.txt"]

# A worker for each processor: these tests spend their time in XLA compiling small programs.
PYTEST = ["pytest", "--numprocesses=auto"]

for_each_package = nox.parametrize("package", PACKAGES, ids=PACKAGES)


def editable(*packages: str) -> list[str]:
    return [arg for package in packages for arg in ("--editable", f"packages/{package}")]


def test_group(package: str) -> list[str]:
    return ["--group", f"packages/{package}/pyproject.toml:test"]


def install_locked(session: nox.Session, *args: str) -> None:
    """Installs what `args` ask for, at the versions of uv.lock where it has one.

    The lock file serves as constraints and not as the source, so that an index other than PyPI,
    set in the usual way, is respected.
    """
    constraints = f"{session.create_tmp()}/constraints.txt"
    everything = ["--all-packages", "--all-groups", "--no-emit-workspace"]
    session.run_install(
        *["uv", "export", "--quiet", "--frozen", "--no-hashes", *everything],
        *["--output-file", constraints],
        silent=True,
    )
    session.install("--constraint", constraints, *args)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format. `nox -s lint -- --fix` mends what it can."""
    install_locked(session, "--group", "lint")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))


@nox.session
def types(session: nox.Session) -> None:
    """Pyright over the packages and the integration tests."""
    groups = [arg for package in PACKAGES for arg in test_group(package)]
    groups += ["--group", "types", "--group", "integration"]
    install_locked(session, *editable(*PACKAGES), *groups, *FINETUNE)
    session.run("pyright", *session.posargs)


@nox.session
@for_each_package
def tests(session: nox.Session, package: str) -> None:
    """One package's tests, with what it declares and nothing else. `-P 3.13`: another Python."""
    install_locked(session, *editable(package), *test_group(package))
    session.run(*PYTEST, f"packages/{package}/tests", *session.posargs)


@nox.session(python=OLDEST_PYTHON)
@for_each_package
def minimums(session: nox.Session, package: str) -> None:
    """One package's tests, with the oldest versions that it says it works with."""
    oldest = "--resolution=lowest-direct"
    session.install(oldest, *editable(package), *test_group(package))
    session.run(*PYTEST, f"packages/{package}/tests", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """What crosses packages and frameworks, and the parts of the examples."""
    install_locked(session, *editable(*PACKAGES), "--group", "integration", *FINETUNE)
    tests = ["integration-tests", "--ignore=integration-tests/peft"]
    session.run(*PYTEST, *tests, *session.posargs)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv")
def peft(session: nox.Session) -> None:
    """PEFT, transformers and diffusers read what we write, and we read what they write.

    By pip, for the sake of torch: uv would take the build with CUDA from PyPI.
    """
    session.install("--requirement", "integration-tests/peft/requirements.txt", *FINETUNE)
    session.install("--no-deps", *editable(*PACKAGES))
    session.run("pytest", "integration-tests/peft", *session.posargs)


@nox.session(default=False)
def vllm(session: nox.Session) -> None:
    """vLLM's reader accepts the folders that we write. Downloads its wheel of 340 MB."""
    install_locked(session, *editable("lorax-core", "lorax-io"), "pip")
    folder = session.create_tmp()
    wheel = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--dest", folder]
    session.run("python", "-m", "pip", "download", "vllm==0.33.0", *wheel)
    session.run("python", "-m", "zipfile", "-e", str(next(Path(folder).glob("vllm*.whl"))), folder)
    session.run("python", "integration-tests/vllm/check.py", folder)


@nox.session
def docs(session: nox.Session) -> None:
    """Runs the examples in README files, docs/ and docstrings."""
    install_locked(session, *editable(*PACKAGES), "--group", "docs")
    pages = ["README.md", "docs", *(f"packages/{package}/README.md" for package in PACKAGES)]
    sources = [f"packages/{package}/src" for package in PACKAGES]
    plugin = ["-p", "markdown_examples"]
    session.run(
        *["pytest", *plugin, "--doctest-modules", *pages, *sources, *session.posargs],
        env={"PYTHONPATH": "docs"},
    )


# Run in the new environment: each package as a user gets it, not as it lies in this folder.
CHECK_INSTALLED = """
import importlib, importlib.metadata as metadata, sys
for name in sys.argv[1:]:
    module = importlib.import_module({"lorax-core": "lorax"}.get(name, name.replace("-", "_")))
    files = [str(file) for file in metadata.files(name)]
    for wanted in ("__init__.py", "py.typed", "LICENSE"):
        assert any(file.endswith(wanted) for file in files), f"{name}: no {wanted} in {files}"
    assert module.__version__ == metadata.version("lorax-core"), f"{name}: another version"
    print(name, module.__version__, module.__file__)
"""


@nox.session
def build(session: nox.Session) -> None:
    """Builds sdists and wheels into dist/, installs the wheels and imports them."""
    shutil.rmtree("dist", ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--out-dir", "dist")
    install_locked(session, *(str(wheel) for wheel in sorted(Path("dist").glob("*.whl"))))
    session.run("python", "-I", "-c", CHECK_INSTALLED, *PACKAGES)


@nox.session(default=False)
def finetune(session: nox.Session) -> None:
    """The fine-tuning example. Arguments after `--` go to the program."""
    install_locked(session, *editable("lorax-core", "lorax-io"), *FINETUNE)
    session.run("python", "examples/finetune/finetune.py", *session.posargs)


@nox.session(default=False)
def minilm(session: nox.Session) -> None:
    """The same sentences, with a model of transformers. Arguments after `--` go to the program."""
    install_locked(session, *editable(*PACKAGES), *FINETUNE)
    session.run("python", "examples/finetune/minilm.py", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Prints every number that README and docs show. Arguments after `--` go to the program."""
    install_locked(session, *editable("lorax-core"))
    session.run("python", "benchmarks/run.py", *session.posargs)


if __name__ == "__main__":
    nox.main()
