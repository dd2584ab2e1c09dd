"""The Hugging Face Hub, with a small local server."""

import base64
import functools
import hashlib
import http.server
import json
import sys
import threading
import types
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax_io import (
    AdapterError,
    AdapterFileError,
    AdapterNotFoundError,
    Linear,
    load_peft,
    open_adapter,
    pull_from_hub,
    push_to_hub,
    save_peft,
)

COMMIT = "1" * 40
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
NAMES = {"q": Linear("model.q"), "v": Linear("model.v")}


class Hub:
    """A server that answers the calls of the Hub's client, and records them."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}  # by repository: files by name
        self.calls: list[tuple[str, str]] = []
        self.commits: list[Any] = []  # for each: summary, branch and file names
        self.refusal: Any = None  # a status and an error code for all calls
        self.options: dict[str, Any] = {}
        self.pull_options: dict[str, Any] = {}

    def answer(self, method, path, body):
        self.calls.append((method, path))
        if self.refusal is not None:
            return self.error(*self.refusal)
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                code = 409 if repo in self.repos else 200
                self.repos.setdefault(repo, {})
                return code, {}, as_json({"url": f"https://huggingface.co/{repo}"})
            case ["api", "validate-yaml"]:
                return 200, {}, as_json({"errors": [], "warnings": []})
            case ["api", "models", user, name, "preupload", _]:
                files = [{"path": file["path"]} for file in json.loads(body)["files"]]
                modes = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in files]
                return 200, {}, as_json({"files": modes})
            case ["api", "models", user, name, "commit", branch]:
                header, *files = [json.loads(line)["value"] for line in body.splitlines()]
                stored = {file["path"]: base64.b64decode(file["content"]) for file in files}
                self.repos[f"{user}/{name}"] |= stored
                self.commits.append((header["summary"], branch, sorted(stored)))
                url = f"https://huggingface.co/{user}/{name}/commit/{COMMIT}"
                return 200, {}, as_json({"commitUrl": url, "commitOid": COMMIT, "success": True})
            case ["api", "models", user, name, *rest] if f"{user}/{name}" in self.repos:
                files = self.repos[f"{user}/{name}"]
                if rest[0] == "tree":
                    return 200, {}, as_json([tree_entry(*file) for file in files.items()])
                if rest[1] not in ("main", "v1", COMMIT):
                    return self.error(404, "RevisionNotFound")
                siblings = [{"rfilename": file} for file in files]
                model = {"id": f"{user}/{name}", "sha": COMMIT, "siblings": siblings}
                return 200, {}, as_json(model)
            case [user, name, "resolve", _, *inside] if f"{user}/{name}" in self.repos:
                file = unquote("/".join(inside))
                if file not in self.repos[f"{user}/{name}"]:
                    return self.error(404, "EntryNotFound")
                content = self.repos[f"{user}/{name}"][file]
                return 200, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT}, content
            case _:
                return self.error(404, "RepoNotFound")

    def error(self, code, name):
        return code, {"X-Error-Code": name} if name else {}, b"{}"

    def fetched(self):
        return sorted(path.split("/")[-1] for _, path in self.calls if "/resolve/" in path)


def as_json(value):
    return json.dumps(value).encode()


def digest(content):
    return hashlib.sha1(content).hexdigest()


def tree_entry(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": digest(content)}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self):
            assert self.headers["Authorization"] == "Bearer test"
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, headers, content = hub.answer(self.command, self.path.partition("?")[0], body)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = respond

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        hub.options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": "test"}
        hub.pull_options = hub.options | {"cache": tmp_path / "cache"}
        yield hub
        server.shutdown()
        thread.join()


@pytest.fixture
def adapter(tmp_path):
    """A folder of `save_peft` that also contains another file."""
    draw = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), "float32")  # noqa: E731
    tunable = {
        "q": lorax.LoraWeight(draw(5, 2), draw(2, 3), rank=2, alpha=4.0),
        "v": lorax.LoraWeight(draw(5, 2), draw(2, 3), rank=2, alpha=3.0, scaling="rslora"),
    }
    folder = tmp_path / "adapter"
    save_peft(folder, tunable, NAMES, base_model="me/base")
    (folder / "optimizer.bin").write_bytes(b"a pickle")
    return types.SimpleNamespace(folder=folder, tunable=tunable)


def test_one_commit_contains_config_weights_and_card(hub, adapter):
    url = push_to_hub(adapter.folder, "me/new", **hub.options)
    assert url == f"https://huggingface.co/me/new/commit/{COMMIT}"
    assert hub.commits == [("Upload a LoRA adapter", "main", [CARD, CONFIG, WEIGHTS])]
    for name in (CONFIG, WEIGHTS):
        assert hub.repos["me/new"][name] == (adapter.folder / name).read_bytes()


def test_commit_message_and_branch_are_used(hub, adapter):
    hub.repos["me/old"] = {CARD: b"mine"}
    push_to_hub(adapter.folder, "me/old", message="Better", revision="v1", **hub.options)
    assert hub.commits == [("Better", "v1", [CONFIG, WEIGHTS])]
    assert ("HEAD", f"/me/old/resolve/v1/{CARD}") in hub.calls


def test_card_repeats_the_config(hub, adapter):
    push_to_hub(adapter.folder, "me/new", **hub.options)
    card = hub.repos["me/new"][CARD].decode()
    begin, header, text = card.split("---\n")
    assert begin == ""
    assert header == "base_model: me/base\nlibrary_name: peft\ntags:\n- lora\n"
    assert "`me/base`, rank 2, alpha" in text


@pytest.mark.parametrize("base", [None, "/home/me/base", "./base", "base"])
def test_card_omits_a_base_missing_on_the_hub(hub, adapter, base):
    save_peft(adapter.folder, adapter.tunable, NAMES, base_model=base)
    push_to_hub(adapter.folder, "me/new", **hub.options)
    assert b"base_model:" not in hub.repos["me/new"][CARD]


@pytest.mark.parametrize("local_card", [None, "local"])
@pytest.mark.parametrize("remote_card", [None, "remote"])
def test_existing_model_card_is_kept(hub, adapter, local_card, remote_card):
    hub.repos["me/a"] = {} if remote_card is None else {CARD: remote_card.encode()}
    if local_card is not None:
        (adapter.folder / CARD).write_text(local_card)
    push_to_hub(adapter.folder, "me/a", **hub.options)
    card = hub.repos["me/a"][CARD].decode()
    existing = local_card or remote_card
    assert card == existing or (existing is None and "A LoRA adapter" in card)


def spoil_config(folder):
    (folder / CONFIG).write_text("{}")


def spoil_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def replace_weights(folder):
    safetensors.numpy.save_file({"model.q.weight": np.ones((3, 5))}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda folder: (folder / CONFIG).unlink(), AdapterNotFoundError),
        (lambda folder: (folder / WEIGHTS).unlink(), AdapterNotFoundError),
        (spoil_config, AdapterFileError),
        (spoil_weights, AdapterFileError),
        (replace_weights, AdapterFileError),
    ],
    ids=["no config", "no weights", "bad config", "bad weights", "a model"],
)
def test_non_adapter_raises_before_any_call(hub, adapter, change, error):
    change(adapter.folder)
    with pytest.raises(error):
        push_to_hub(adapter.folder, "me/new", **hub.options)
    assert hub.calls == []


def test_pushed_adapter_is_pulled_bit_for_bit(hub, adapter):
    push_to_hub(adapter.folder, "me/a", **hub.options)
    hub.repos["me/a"] |= {"adapter_model.bin": b"a pickle", "code.py": b"evil()"}
    hub.calls.clear()
    folder = pull_from_hub("me/a", **hub.pull_options)
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert {*hub.fetched()} == {CONFIG, WEIGHTS}
    _, tunable = load_peft(folder, {"q": jnp.ones((5, 3)), "v": jnp.ones((5, 3))}, NAMES)
    assert jax.tree.structure(tunable) == jax.tree.structure(adapter.tunable)
    jax.tree.map(np.testing.assert_array_equal, tunable, adapter.tunable)


def test_cached_files_are_not_downloaded_again(hub, adapter):
    push_to_hub(adapter.folder, "me/a", **hub.options)
    first = pull_from_hub("me/a", **hub.pull_options)
    hub.calls.clear()
    assert pull_from_hub("me/a", **hub.pull_options) == first
    assert not [path for method, path in hub.calls if method == "GET" and "/resolve/" in path]


def test_revision_is_pulled(hub, adapter):
    push_to_hub(adapter.folder, "me/a", **hub.options)
    hub.calls.clear()
    pull_from_hub("me/a", revision="v1", **hub.pull_options)
    assert hub.calls[0] == ("GET", "/api/models/me/a/revision/v1")
    with pytest.raises(AdapterNotFoundError, match="me/a: not available on the Hub"):
        pull_from_hub("me/a", revision="v2", **hub.pull_options)


@pytest.fixture
def within(hub, adapter):
    """A repository with an adapter in a subfolder."""
    push_to_hub(adapter.folder, "me/a", **hub.options)
    files = hub.repos["me/a"]
    hub.repos["me/a"] = {f"runs/last/{name}": files[name] for name in (CONFIG, WEIGHTS)}
    hub.repos["me/a"][CONFIG] = b"of another"


def test_only_the_subfolder_is_pulled(hub, within):
    folder = pull_from_hub("me/a", subfolder="runs/last", **hub.pull_options)
    assert (folder.name, folder.parent.name) == ("last", "runs")
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert not (folder.parents[1] / CONFIG).exists()
    assert open_adapter(folder).format == "peft"
    with pytest.raises(AdapterNotFoundError, match=f"has no `runs/first/{WEIGHTS}`"):
        pull_from_hub("me/a", subfolder="runs/first", **hub.pull_options)


@pytest.mark.parametrize("subfolder", ["", "..", "a/../b", "/a", "a/", "a*", "[a]", "a\\b"])
def test_invalid_subfolder_raises_before_any_call(hub, subfolder):
    with pytest.raises(AdapterError, match="is not a folder of a repository"):
        pull_from_hub("me/a", subfolder=subfolder, **hub.pull_options)
    assert not hub.calls


def test_command_accepts_a_name_with_revision_and_subfolder(hub, within, shell, monkeypatch):
    pull = functools.partial(pull_from_hub, **hub.pull_options)
    monkeypatch.setattr("lorax_io._command.options.pull_from_hub", pull)
    hub.calls.clear()
    ran = shell("inspect hf://me/a@v1/runs/last")  # the Hub's client shows bars
    assert ran.code == 0 and "peft" in ran.out
    assert hub.calls[0] == ("GET", "/api/models/me/a/revision/v1")
    ran = shell("inspect hf://me/a@v2/runs/last")
    assert ran.code == 2 and "not available on the Hub" in ran.err


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_repository_without_an_adapter_raises(hub, adapter, missing):
    push_to_hub(adapter.folder, "me/a", **hub.options)
    del hub.repos["me/a"][missing]
    with pytest.raises(AdapterNotFoundError, match=f"^me/a: the repository has no `{missing}`"):
        pull_from_hub("me/a", **hub.pull_options)


def test_missing_repository_raises(hub):
    with pytest.raises(AdapterNotFoundError, match="^me/none: not available on the Hub: 404"):
        pull_from_hub("me/none", **hub.pull_options)


@pytest.mark.parametrize("code", [401, 403])
def test_hub_refusals_raise(hub, adapter, code):
    hub.refusal = code, None
    for call in (
        lambda: push_to_hub(adapter.folder, "me/a", **hub.options),
        lambda: pull_from_hub("me/a", **hub.pull_options),
    ):
        with pytest.raises(AdapterError, match="^me/a: the Hub .*") as raised:
            call()
        assert str(code) in str(raised.value) and "\n" not in str(raised.value)
    assert hub.commits == []


def test_gated_repository_error_explains_access(hub):
    hub.repos["me/a"] = {}
    hub.refusal = 403, "GatedRepo"
    with pytest.raises(AdapterError, match="^me/a: not available on the Hub.*403"):
        pull_from_hub("me/a", **hub.pull_options)


@pytest.mark.parametrize("repo", ["a/b/c", "", "me/--"])
def test_invalid_repository_name_raises(hub, adapter, repo):
    for call in (
        lambda: push_to_hub(adapter.folder, repo, **hub.options),
        lambda: pull_from_hub(repo, **hub.pull_options),
    ):
        with pytest.raises(AdapterError):
            call()


def test_unreachable_hub_raises(adapter, tmp_path):
    options: dict[str, Any] = {"endpoint": "http://127.0.0.1:1", "token": "test"}
    with pytest.raises(AdapterError, match="^me/a: the Hub"):
        push_to_hub(adapter.folder, "me/a", **options)
    with pytest.raises(AdapterError, match="^me/a: the Hub"):
        pull_from_hub("me/a", cache=tmp_path, **options)


def test_missing_hub_package_raises(adapter, monkeypatch):
    assert huggingface_hub  # installed, but hidden in this test
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: push_to_hub(adapter.folder, "me/a"), lambda: pull_from_hub("me/a")):
        with pytest.raises(ImportError, match=r'pip install "lorax-io\[hub\]"') as raised:
            call()
        assert type(raised.value) is lorax.MissingPackageError
