"""Adapters on the Hugging Face Hub."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from lorax import MissingPackageError

from ._errors import AdapterError, AdapterNotFoundError, about
from ._formats.peft.config import CONFIG_NAME, PeftConfig
from ._formats.peft.folder import WEIGHTS_NAME, open_peft
from ._formats.table import FORMATS

_CARD_NAME = "README.md"
_WEIGHTS = (WEIGHTS_NAME, *(n for row in FORMATS.values() for n in row.files if n != WEIGHTS_NAME))


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload a LoRA adapter",
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads a PEFT folder, as written by `save_peft`, to the Hub in one commit.

    Sends the config, the weights, and a model card: the folder's `README.md`, or a short generated
    one if neither the folder nor the repository has one. Creates the repository if it does not
    exist. Needs `pip install "lorax-io[hub]"`.

    Args:
        folder: the PEFT folder. Its config and the header of its weights are checked before
            anything is sent.
        repo_id: the repository, as `"user/name"`.
        private: whether to make the repository private if it is created.
        revision: the branch to commit to; by default the main branch.
        message: the commit message.
        token: the user's access token; by default that of `hf auth login`.
        endpoint: the address of the Hub, if it is not huggingface.co.

    Returns:
        The URL of the commit.

    Raises:
        AdapterError: if the folder is not a PEFT adapter, or the Hub rejects the upload.

    Example:
        >>> from lorax_io import push_to_hub
        >>> push_to_hub("my-adapter", "me/my-adapter")  # doctest: +SKIP
        'https://huggingface.co/me/my-adapter/commit/…'
    """
    hub = _import_hub()
    folder = Path(folder)
    with open_peft(folder) as source:
        config = source.config
    files: dict[str, Any] = {name: folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)}
    api = hub.HfApi(token=token, endpoint=endpoint)
    with about(repo_id), _explained(hub):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if (folder / _CARD_NAME).is_file():
            files[_CARD_NAME] = folder / _CARD_NAME
        elif not api.file_exists(repo_id, _CARD_NAME, revision=revision):
            files[_CARD_NAME] = _card(config).encode()
        commit = api.create_commit(
            repo_id,
            [hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
            revision=revision,
        )
    return commit.commit_url


def pull_from_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    endpoint: str | None = None,
) -> Path:
    """Downloads an adapter's config and weights from the Hub; cached files are reused.

    Downloads no other files, and in particular no pickles. Needs `pip install "lorax-io[hub]"`.

    Args:
        repo_id: the repository, as `"user/name"`.
        revision: a branch, tag or commit; by default the main branch.
        subfolder: the folder of the repository that contains the adapter; by default its root.
        token: the user's access token; by default that of `hf auth login`.
        cache: the cache folder; by default the Hub client's own.
        endpoint: the address of the Hub, if it is not huggingface.co.

    Returns:
        The local folder, for `load_peft` or `load_any`.

    Raises:
        AdapterNotFoundError: if the repository does not exist, or contains no adapter.
        AdapterError: if the Hub rejects the request or cannot be reached, and the adapter is not
            cached.

    Example:
        >>> from lorax_io import load_peft, pull_from_hub
        >>> folder = pull_from_hub("me/my-adapter")  # doctest: +SKIP
        >>> frozen, tunable = load_peft(folder, params, names)  # doctest: +SKIP
    """
    hub = _import_hub()
    parts = [] if subfolder is None else subfolder.split("/")
    if any(part in ("", ".", "..") or set(part) & set("*?[\\") for part in parts):
        raise AdapterError(f"subfolder={subfolder!r} is not a folder of a repository.", repo_id)
    inside = f"{subfolder}/" if subfolder else ""
    with about(repo_id), _explained(hub):
        folder = hub.HfApi(token=token, endpoint=endpoint).snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache,
            allow_patterns=[f"{inside}{name}" for name in (CONFIG_NAME, *_WEIGHTS)],
        )
    local = Path(folder, inside)
    weights = [name for name in _WEIGHTS if (local / name).exists()]
    if not weights:
        raise AdapterNotFoundError(f"the repository has no `{inside}{WEIGHTS_NAME}`.", repo_id)
    if weights[0] == WEIGHTS_NAME and not (local / CONFIG_NAME).exists():
        raise AdapterNotFoundError(f"the repository has no `{inside}{CONFIG_NAME}`.", repo_id)
    return local


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackageError(
            'the Hub needs huggingface_hub: pip install "lorax-io[hub]"'
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _explained(hub: Any) -> Generator[None]:
    try:
        yield
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise AdapterNotFoundError(f"not available on the Hub: {_first_line(error)}") from error
    except hub.errors.LocalEntryNotFoundError as error:
        # The Hub did not answer, for the reason in `__cause__`, and the cache is empty too.
        reason = _first_line(error.__cause__ or error)
        raise AdapterError(f"the Hub rejected the request: {reason}") from error
    # The Hub's HTTP errors derive from those of its HTTP client. Since huggingface_hub 1.0 that is
    # `httpx`, whose connection errors are not an `OSError`.
    except (*hub.errors.HfHubHTTPError.__bases__, hub.errors.HFValidationError, OSError) as error:
        raise AdapterError(f"the Hub rejected the request: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _card(config: PeftConfig) -> str:
    base = config.base_model_name_or_path
    header = ["library_name: peft", "tags:", "- lora"]
    if base is not None and "/" in base and not base.startswith(("/", ".")):
        header.insert(0, f"base_model: {base}")
    of = f" of `{base}`" if base else ""
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"A LoRA adapter{of}, rank {config.r}, alpha {config.lora_alpha}.",
            "",
        ]
    )
