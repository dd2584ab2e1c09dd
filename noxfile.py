#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2026.2.9"]
# ///
"""Every check of this repository, each in its own environment.

`pip install nox && nox` runs those that any machine can run in reasonable time. The header above
tells nox that it also needs uv, which it installs from PyPI if it is missing.

The tests form a matrix of package × Python × JAX × backend. `nox -t matrix` runs all of it, the
tags `cpu`, `cuda12`, `cuda13`, `tpu` and `floor` run a part, and `nox -s "tests(lorax-core, 3.13)"`
runs one cell.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import nox

sys.path.insert(0, str(Path(__file__).parent))

from matrix.cells import (  # noqa: E402
    ARGUMENTS,
    CELLS,
    CPU,
    HERE,
    OLDEST_PYTHON,
    PACKAGES,
    WITH_TORCH,
)
from matrix.devices import missing_device  # noqa: E402
from matrix.records import counts, recorded  # noqa: E402

nox.needs_version = ">=2026.2.9"
nox.options.default_venv_backend = "uv"
# Interpreters are never downloaded. If one is missing, its sessions are skipped with a message, so
# that all sessions need only a package index.
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False

# The sessions that plain `nox` runs.
DEFAULT = ["default"]
nox.options.tags = DEFAULT

FINETUNE = ["--requirement", "examples/finetune/requirements.txt"]

# Files that GitHub and citation managers read, by the schema that each has to match.
SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-actions": ".github/actions/*/action.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}

# One worker per processor: these tests spend their time compiling small programs in XLA.
PYTEST = ["pytest", "--numprocesses=auto"]


# The default extra of a package in its sessions.
EXTRAS = {"lorax-hf": "lorax-hf[flax]"}


def editable(*packages: str) -> list[str]:
    named = [EXTRAS.get(package, package) for package in packages]
    return [arg for package in named for arg in ("--editable", f"packages/{package}")]


def test_group(package: str) -> list[str]:
    return ["--group", f"packages/{package}/pyproject.toml:test"]


def install_locked(session: nox.Session, *args: str) -> None:
    """Installs `args` at the versions in uv.lock.

    The lock file is used as constraints, not as a source, so that pip's settings for another index
    than PyPI are respected.
    """
    constraints = f"{session.create_tmp()}/constraints.txt"
    everything = ["--all-packages", "--all-groups", "--no-emit-workspace"]
    session.run_install(
        *["uv", "export", "--quiet", "--frozen", "--no-hashes", *everything],
        *["--output-file", constraints],
        silent=True,
    )
    session.install("--constraint", constraints, *args)


@nox.session(tags=DEFAULT)
def lint(session: nox.Session) -> None:
    """Ruff, zizmor, and the schemas of workflows. `nox -s lint -- --fix` applies Ruff's fixes."""
    install_locked(session, "--group", "lint")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))
    # Reports actions that are not pinned by hash, persisted credentials, and injected inputs.
    session.run("zizmor", "--offline", "--quiet", "--min-severity=medium", ".github")
    for schema, pattern in SCHEMAS.items():
        files = map(str, sorted(Path().glob(pattern)))
        session.run("check-jsonschema", "--quiet", "--builtin-schema", f"vendor.{schema}", *files)


@nox.session(tags=DEFAULT)
def types(session: nox.Session) -> None:
    """Runs Pyright over the packages and the integration tests."""
    groups = [arg for package in PACKAGES for arg in test_group(package)]
    groups += ["--group", "types", "--group", "integration", "--group", "site"]
    install_locked(session, *editable(*PACKAGES), *groups, *FINETUNE)
    session.run("pyright", *session.posargs)


# The matrix


def install_cell(session: nox.Session, package: str, jax: str, *args: str) -> str:
    """Installs a package with its newest or oldest dependencies; returns JAX's version."""
    requirements = [*editable(package), *test_group(package), *args]
    if jax == "floor":
        session.install("--resolution=lowest-direct", *requirements)
    else:
        install_locked(session, *requirements)
    return jax_version(session)


def jax_version(session: nox.Session) -> str:
    program = "import importlib.metadata as metadata; print(metadata.version('jax'))"
    return str(session.run("python", "-c", program, silent=True)).strip()


def run_cell(session: nox.Session, record: dict[str, Any], *command: str, **options: Any) -> None:
    """Runs pytest, and records how many tests passed."""
    junit = Path(session.create_tmp(), "junit.xml")
    junit.unlink(missing_ok=True)
    try:
        session.run(*command, f"--junitxml={junit}", *session.posargs, **options)
    finally:
        record["counts"] = counts(junit)


@nox.session
@nox.parametrize(
    ARGUMENTS,
    [cell.param() for cell in CELLS if cell.backend == CPU and cell.package != WITH_TORCH],
)
def tests(session: nox.Session, package: str, backend: str, jax: str) -> None:
    """Runs the tests of one package, with only its declared dependencies."""
    with recorded(session.name) as record:
        record["jax"] = install_cell(session, package, jax)
        record["did"] = "tests"
        options = transform_options(session, package, jax)
        env = fast_compilation(record["jax"]) if package == "lorax-core" else {}
        run_cell(session, record, *PYTEST, f"packages/{package}/tests", *options, env=env)


def transform_options(session: nox.Session, package: str, jax: str) -> list[str]:
    """Applies transforms to the core's table rows in one cell only; others check value and work."""
    with_transforms = package != "lorax-core" or (session.python, jax) == (HERE, "newest")
    return [] if with_transforms else ["--without-transforms"]


def fast_compilation(version: str) -> dict[str, str]:
    """The environment in which XLA compiles loops for the CPU fastest, for the core's tests.

    These compile thousands of small programs, and the older loop emitter takes 0.6 to 0.7 of the
    processor time of the default one. Products and the structure of programs are the same. In JAX
    0.12, XLA no longer has this option, so the cells of the newest JAX test the default. The option
    changes fusions, so it is not used for the other packages, which compare whole models bit for
    bit.
    """
    supported = tuple(map(int, version.split(".")[:2])) < (0, 11)
    return {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"} if supported else {}


@nox.session
def nightly(session: nox.Session) -> None:
    """Runs the tests of the core with JAX's nightly build."""
    session.install(*editable("lorax-core"), *test_group("lorax-core"))
    index = "https://us-python.pkg.dev/ml-oss-artifacts-published/jax/simple/"
    session.install("--prerelease=allow", "--upgrade", "--index", index, "jax", "jaxlib")
    session.log(f"JAX {jax_version(session)}")
    session.run(*PYTEST, "packages/lorax-core/tests", "--without-transforms", *session.posargs)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def coverage(session: nox.Session, package: str) -> None:
    """Measures the line and branch coverage of a package's tests; writes coverage-PACKAGE.md."""
    install_cell(session, package, "newest", "pytest-cov>=7")
    source = [f"--cov=packages/{package}/src", "--cov-branch"]
    report = f"--cov-report=markdown:coverage-{package}.md"
    session.run(
        *[*PYTEST, f"packages/{package}/tests", *source, report, "--cov-report=term"],
        *session.posargs,
    )


# Older versions raise `topology not implemented for cuda`. (0.9.1 was not tested.)
OLDEST_COMPILER_FOR_CUDA = (0, 9, 2)


def install_compiler(session: nox.Session, backend: str, version: str) -> None:
    """Installs the compiler for a backend, of the same version as JAX."""
    if backend == "tpu":
        session.install(f"jax[tpu]=={version}")
    else:
        # Without CUDA itself, which takes gigabytes and is not needed for compilation.
        parts = [f"jax-{backend}-{part}=={version}" for part in ("plugin", "pjrt")]
        session.install("--no-deps", *parts)


def compile_only(backend: str) -> dict[str, str]:
    """The environment for compiling without a device."""
    env = {"JAX_PLATFORMS": "cpu"}
    if backend == "tpu":
        # Otherwise libtpu asks a cloud's metadata server for the type of the TPU.
        env |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        env |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    return env


@nox.session
@nox.parametrize(ARGUMENTS, [cell.param() for cell in CELLS if cell.backend != CPU])
def accelerator(session: nox.Session, package: str, backend: str, jax: str) -> None:
    """Tests one package on a GPU or TPU; without a device, compiles its programs for one."""
    platform = backend.rstrip("0123456789")
    with recorded(session.name) as record:
        reason = missing_device(backend)
        version = install_cell(session, package, jax, "--group", "accelerators")
        record["jax"] = version
        if reason is None:
            session.install(f"jax[{backend}]=={version}")
            record["did"] = "tests on the device"
            # The tests expect exact products; by default, matrix units round their inputs.
            exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
            on_device = {
                "JAX_PLATFORMS": f"{platform},cpu",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            }
            run_cell(session, record, "pytest", f"packages/{package}/tests", env=on_device | exact)
            return
        if platform == "cuda" and tuple(map(int, version.split("."))) < OLDEST_COMPILER_FOR_CUDA:
            reason = f"{reason}, and JAX {version} cannot compile for CUDA without one"
            record |= {"outcome": "skipped", "reason": reason}
            session.skip(reason)
        session.log(f"{reason}: programs are compiled for one")
        install_compiler(session, backend, version)
        record["did"] = "compiled"
        file = f"accelerators/test_{package.removeprefix('lorax-')}.py"
        env = compile_only(backend)
        run_cell(session, record, "pytest", file, f"--platform={platform}", env=env)


# Other sessions


@nox.session(tags=DEFAULT)
def integration(session: nox.Session) -> None:
    """Tests packages and frameworks together, and the parts of the examples."""
    install_locked(session, *editable(*PACKAGES), "--group", "integration", *FINETUNE)
    tests = ["integration-tests", "--ignore=integration-tests/peft", f"--ignore={PYTORCH}"]
    session.run(*PYTEST, *tests, *session.posargs)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv", tags=DEFAULT)
def peft(session: nox.Session) -> None:
    """Tests that PEFT, transformers and diffusers read our files, and that we read theirs.

    Installed with pip, since uv would install the CUDA build of torch from PyPI.
    """
    session.install("--requirement", "integration-tests/peft/requirements.txt", *FINETUNE)
    # The tests use one module, which writes GPTQ files. The package itself needs datasets.
    session.install("--no-deps", "auto-gptq==0.7.1")
    session.install("--no-deps", *editable(*PACKAGES))
    session.run("pytest", "integration-tests/peft", *session.posargs)


PYTORCH = "integration-tests/pytorch"


def install_torch(session: nox.Session, *args: str) -> None:
    """Installs lorax-hf[torch] at the pinned versions. uv would install torch with CUDA."""
    pinned = ["--constraint", f"{PYTORCH}/requirements.txt"]
    session.install(*pinned, *editable("lorax-core", WITH_TORCH), *args)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv", tags=[*DEFAULT, "matrix", CPU])
def torch(session: nox.Session) -> None:
    """Tests lorax-hf with PyTorch: first alone, then together with lorax-io and PEFT."""
    with recorded(session.name) as record:
        install_torch(session, "pytest", "pytest-xdist")
        record |= {"jax": jax_version(session), "did": "tests"}
        tests = ["packages/lorax-hf/tests", "--ignore=packages/lorax-hf/tests/flax_models"]
        run_cell(session, record, *PYTEST, *tests)
        session.install(
            *("--requirement", f"{PYTORCH}/requirements.txt", *editable("lorax-io"), *FINETUNE)
        )
        # One test runs a sample of the sweep, which is imported from the root.
        session.run(*PYTEST, PYTORCH, env={"PYTHONPATH": "."})
        plugin = ["-p", "markdown_examples", "--doctest-modules"]
        pages = ["docs/frameworks/pytorch.md", "packages/lorax-hf/src/lorax_hf/__init__.py"]
        session.run("pytest", *plugin, *pages, env={"PYTHONPATH": "docs"})
        # The session `types` does not have PyTorch.
        session.install("--group", "types")
        session.run("pyright", "--project", f"{PYTORCH}/pyrightconfig.json")


@nox.session(name="sweep-torch", python=OLDEST_PYTHON, venv_backend="virtualenv")
def sweep_torch(session: nox.Session) -> None:
    """Runs every PyTorch model type that has a tiny config. `-- --record` writes the table."""
    install_torch(session)
    session.install("--requirement", f"{PYTORCH}/requirements.txt", *editable("lorax-io"))
    # timm requires torchvision, which requires PyTorch with CUDA.
    timm = str(Path(session.create_tmp(), "timm").absolute())
    into = ["--upgrade", "--no-deps", "--target", timm]
    session.install(*into, "timm==1.0.31", "torchvision==0.28.0")
    env = {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore", "TIMM": timm}
    session.run("python", "-m", "sweep", *session.posargs, env=env)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv")
def depth(session: nox.Session) -> None:
    """Times tracing and compiling a PyTorch module of many layers, with and without a scan."""
    install_torch(session, "transformers")
    session.run("python", "benchmarks/depth.py", *session.posargs, env={"JAX_PLATFORMS": "cpu"})


@nox.session(name="bench-torch", python=OLDEST_PYTHON, venv_backend="virtualenv")
def bench_torch(session: nox.Session) -> None:
    """Times a step of transformers' Llama in JAX, PEFT's on PyTorch, and a hand-written Llama's."""
    install_torch(session, *editable("lorax-io"), "gguf")
    session.install("--requirement", f"{PYTORCH}/requirements.txt")
    session.run("python", "benchmarks/torch_step.py", *session.posargs)


@nox.session
def vllm(session: nox.Session) -> None:
    """Tests that vLLM's reader accepts our folders. Downloads its wheel (340 MB)."""
    install_locked(session, *editable("lorax-core", "lorax-io"), "pip")
    folder = session.create_tmp()
    wheel = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--dest", folder]
    session.run("python", "-m", "pip", "download", "vllm==0.33.0", *wheel)
    session.run("python", "-m", "zipfile", "-e", str(next(Path(folder).glob("vllm*.whl"))), folder)
    session.run("python", "integration-tests/vllm/check.py", folder)


@nox.session
def mlx(session: nox.Session) -> None:
    """Tests that mlx-lm and lorax-io read each other's adapters, on the CPU."""
    session.install(
        *editable("lorax-core", "lorax-io"), "-r", "integration-tests/mlx/requirements.txt"
    )
    session.run("python", "integration-tests/mlx/check.py")


@nox.session
def keras(session: nox.Session) -> None:
    """Tests that KerasHub and lorax-io read each other's files, on JAX."""
    session.install(
        *editable("lorax-core", "lorax-io"), "-r", "integration-tests/keras/requirements.txt"
    )
    session.install("--no-deps", "keras-hub==0.32.0")
    session.run("python", "integration-tests/keras/check.py")


@nox.session(python=OLDEST_PYTHON)
def tunix(session: nox.Session) -> None:
    """Tests that tunix and lorax-io read each other's checkpoints of models with qwix's LoRA."""
    session.install("-r", "integration-tests/tunix/requirements.txt")
    # tunix requires an older safetensors than lorax-io.
    session.install("--no-deps", "safetensors>=0.8", *editable("lorax-core", "lorax-io"))
    session.run("python", "integration-tests/tunix/check.py", env={"JAX_PLATFORMS": "cpu"})


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv")
def torchtune(session: nox.Session) -> None:
    """Tests that torchtune's adapters, with its own and PEFT's names, compute the same in JAX."""
    session.install("-r", "integration-tests/torchtune/requirements.txt")
    session.install("--no-deps", "torchao==0.13.0", "torchtune==0.6.1")
    session.install("--no-deps", *editable("lorax-core", "lorax-io"))
    session.run("python", "integration-tests/torchtune/check.py", env={"JAX_PLATFORMS": "cpu"})


@nox.session(python="3.12")
def wild(session: nox.Session) -> None:
    """Tests models of other packages. `-- --record` accepts the results, and writes docs/wild.md.

    Uses the only Python version for which all of those packages are published.
    """
    session.install("--requirement", "wild/requirements.txt")
    session.install("--no-deps", *editable("lorax-core"))
    session.run("python", "-m", "wild", *session.posargs, env={"JAX_PLATFORMS": "cpu"})


@nox.session(tags=DEFAULT)
def docs(session: nox.Session) -> None:
    """Runs the examples in README files, docs/ and docstrings."""
    install_locked(session, *editable(*PACKAGES), "--group", "docs")
    pages = ["README.md", "docs", *(f"packages/{package}/README.md" for package in PACKAGES)]
    sources = [f"packages/{package}/src" for package in PACKAGES]
    plugin = ["-p", "markdown_examples"]
    # JAX warns, and so pytest fails, if an example makes weights constants of a jitted program.
    environment = {"PYTHONPATH": "docs", "JAX_CAPTURED_CONSTANTS_WARN_BYTES": "4096"}
    session.run(
        *["pytest", *plugin, "--doctest-modules", *pages, *sources, *session.posargs],
        env=environment,
    )


@nox.session(tags=DEFAULT)
def site(session: nox.Session) -> None:
    """Builds the documentation site, warnings as errors. `-- --serve` shows it while you edit."""
    packages = editable("lorax-core", "lorax-io", "lorax-hf")
    install_locked(session, *packages, "--group", "site")
    # Silences the notice about Material for MkDocs' end of life in 2027, which every run prints.
    env = {"JAX_PLATFORMS": "cpu", "NO_MKDOCS_2_WARNING": "1"}
    if "--serve" in session.posargs:
        session.run("mkdocs", "serve", env=env | {"SITE_KEEP_OUTPUTS": "1"})
    else:
        session.run("python", "-m", "pytest", "website", *session.posargs)
        session.run("mkdocs", "build", "--strict", env=env)
        session.run("python", "-m", "website.links", "site")


# Runs in a new environment, to check the installed package and not the files in this folder.
CHECK_INSTALLED = """
import importlib, importlib.metadata as metadata, sys
for name in sys.argv[1:]:
    module = importlib.import_module({"lorax-core": "lorax"}.get(name, name.replace("-", "_")))
    files = [str(file) for file in metadata.files(name)]
    for wanted in ("__init__.py", "py.typed", "LICENSE"):
        assert any(file.endswith(wanted) for file in files), f"{name}: no {wanted} in {files}"
    assert not any(file.startswith("tests/") for file in files), f"{name}: tests are installed"
    assert module.__version__ == metadata.version("lorax-core"), f"{name}: wrong version"
    print(name, module.__version__, module.__file__)
installed = {dist.name for dist in metadata.distributions() if dist.name.startswith("lorax-")}
assert installed == {"lorax-core", *sys.argv[1:]}, f"{sys.argv[1:]} installed {installed}"
"""


@nox.session(tags=DEFAULT)
def build(session: nox.Session) -> None:
    """Builds wheels and sdists, checks them, and installs the packages alone and together."""
    build_and_install(session)


@nox.session(name="release-check")
def release_check(session: nox.Session) -> None:
    """Does every step of a release but publishing. `-- --tag v0.1.0` also checks tag and notes."""
    install_locked(session, "--group", "release")
    manifests = [f"packages/{package}/pyproject.toml" for package in PACKAGES]
    session.run("validate-pyproject", *manifests)
    session.run("python", "-m", "release.check", *session.posargs)
    build_and_install(session)


def build_and_install(session: nox.Session) -> None:
    """Builds the three packages into dist/, and imports each from its wheel and from its sdist."""
    shutil.rmtree("dist", ignore_errors=True)
    session.run("uv", "build", "--all-packages", "--out-dir", "dist")
    install_locked(session, "--group", "release")
    session.run("twine", "check", "--strict", *map(str, sorted(Path("dist").glob("*lorax*"))))
    session.run("check-wheel-contents", *map(str, sorted(Path("dist").glob("lorax*.whl"))))
    for suffix in (".whl", ".tar.gz"):
        files = {
            p: str(next(Path("dist").glob(f"{p.replace('-', '_')}-*{suffix}"))) for p in PACKAGES
        }
        for together in (*([package] for package in PACKAGES), PACKAGES):
            # The other packages depend on the core, which is not on an index yet.
            built = [files[package] for package in dict.fromkeys(["lorax-core", *together])]
            folder = Path(session.create_tmp(), "alone")
            session.run(
                "uv", "venv", "--quiet", "--clear", "--python", session.python or HERE, folder
            )
            python = str(folder / "bin" / "python")
            session.run("uv", "pip", "install", "--quiet", "--python", python, *built)
            session.run(python, "-I", "-c", CHECK_INSTALLED, *together, external=True)


@nox.session(name="matrix-report", tags=DEFAULT)
def matrix_report(session: nox.Session) -> None:
    """Prints which cells of the matrix ran, which did not, and why."""
    session.install("nox", "rich>=13.7")
    session.run("python", "-m", "matrix.report")


@nox.session
def finetune(session: nox.Session) -> None:
    """Runs the fine-tuning example. Arguments after `--` are passed to the program."""
    install_locked(session, *editable("lorax-core", "lorax-io"), *FINETUNE)
    session.run("python", "examples/finetune/finetune.py", *session.posargs)


@nox.session(name="finetune-torch", python=OLDEST_PYTHON, venv_backend="virtualenv")
def finetune_torch(session: nox.Session) -> None:
    """Runs the example also with transformers' Llama, and checks the adapter with PEFT."""
    install_torch(session, *editable("lorax-io"), *FINETUNE)
    session.install("--requirement", f"{PYTORCH}/requirements.txt")
    session.run("python", "examples/finetune/finetune_torch.py", *session.posargs)


@nox.session
@nox.parametrize("backend", ["tpu", "cuda13"], ids=["tpu", "cuda13"])
def large(session: nox.Session, backend: str) -> None:
    """Compiles a step of a 7B model for 16 TPU v5e or 8 H100, ours and hand-written.

    Also compiles quantized models for one chip.
    """
    platform = backend.rstrip("0123456789")
    version = install_cell(session, "lorax-core", "newest", "--group", "accelerators")
    install_compiler(session, backend, version)
    env = compile_only(backend) | {"PYTHONPATH": "benchmarks"}
    session.run("python", "accelerators/seven_billion.py", platform, env=env)
    session.run("python", "accelerators/quantized.py", platform, env=env)


@nox.session
def minilm(session: nox.Session) -> None:
    """Runs the example with a Flax model of transformers. Arguments are passed to the program."""
    install_locked(session, *editable(*PACKAGES), *FINETUNE)
    session.run("python", "examples/finetune/minilm.py", *session.posargs)


@nox.session
def costs(session: nox.Session) -> None:
    """Counts FLOPs and bytes, ours and hand-written. Arguments are passed to the program."""
    install_locked(session, *editable("lorax-core"))
    session.run("python", "benchmarks/costs.py", *session.posargs)


@nox.session
def bases(session: nox.Session) -> None:
    """Counts and times each format of a quantized base, relative to floats."""
    install_locked(session, *editable("lorax-core"))
    session.run("python", "benchmarks/bases.py", *session.posargs)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv")
def kinds(session: nox.Session) -> None:
    """Counts and times each kind of adapter, relative to LoRA and to PEFT. Installed with pip."""
    install_peers(session)
    session.run("python", "benchmarks/kinds.py", *session.posargs)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv")
def banks(session: nox.Session) -> None:
    """Counts and times many adapters in one step and in one batch. Installed with pip.

    `--rounds N` after `--` is passed to both programs.
    """
    install_peers(session)
    session.run("python", "benchmarks/bank_steps.py", *session.posargs)
    session.run("python", "benchmarks/banks.py", *session.posargs)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv")
def bench(session: nox.Session) -> None:
    """Times training steps: ours, hand-written, and with other libraries. Installed with pip."""
    install_peers(session)
    session.run("python", "benchmarks/bench.py", *session.posargs)


@nox.session(python=OLDEST_PYTHON, venv_backend="virtualenv")
def profile(session: nox.Session) -> None:
    """Profiles a training step by kind of operation, in JAX and in PEFT on torch."""
    install_peers(session)
    session.run("python", "benchmarks/profile_step.py", *session.posargs)


def install_peers(session: nox.Session) -> None:
    session.install("--requirement", "benchmarks/requirements.txt")
    session.install("--no-deps", *editable("lorax-core"))


if __name__ == "__main__":
    nox.main()
