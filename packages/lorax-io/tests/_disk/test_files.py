"""Links, pipes, folders and pickles in place of files."""

import os
import socket

import pytest
from untrusted import NAMES, assert_refused, make_params, rows

from lorax_io import (
    AdapterFileError,
    AdapterNotFoundError,
    load_peft,
)


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def moved_out(path):
    """Replaces a file by a link to a copy outside its folder."""
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def moved_through(path):
    outside = path.parent.parent / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    (path.parent / "inside").symlink_to(outside)
    path.symlink_to("inside/" + path.name)


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replaced_by_socket(path):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets must be short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


def only_pickle(path):
    path.rename(path.with_name("adapter_model.bin"))


PLACES = rows(
    ("no file", lambda path: path.unlink(), AdapterNotFoundError, "no such file"),
    ("link to nothing", lambda path: link(path, "nothing"), AdapterNotFoundError, "no such file"),
    ("link to itself", lambda path: link(path, path.name), AdapterFileError, "cannot be opened"),
    ("folder", replaced_by_folder, AdapterFileError, "is a folder"),
    ("pipe", replaced_by_pipe, AdapterFileError, "neither a file nor a folder"),
    ("socket", replaced_by_socket, AdapterFileError, "neither a file nor a folder"),
    ("device", lambda path: link(path, "/dev/zero"), AdapterFileError, "neither a file nor a"),
)


@pytest.mark.skipif(os.name != "posix", reason="has other files")
@pytest.mark.parametrize("which", ["native", "config", "weights"])
@pytest.mark.parametrize(("change", "error", "message"), PLACES)
def test_non_file_raises(place, which, change, error, message):
    place.write_native()
    change(getattr(place, which))
    assert_refused(place, "native" if which == "native" else "peft", error, message)


@pytest.mark.parametrize("which", ["config", "weights"])
@pytest.mark.parametrize("change", [moved_out, moved_through])
def test_link_out_of_the_folder_raises(place, which, change):
    change(getattr(place, which))
    assert_refused(place, "peft", AdapterFileError, "is a link to .*, outside its folder")


@pytest.mark.parametrize("which", ["config", "weights"])
def test_link_inside_the_folder_is_followed(place, which):
    path = getattr(place, which)
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].rank == 2


def test_folder_can_be_a_link(place):
    folder = place.home / "link"
    folder.symlink_to(place.folder)
    assert load_peft(folder, make_params(), NAMES)[1]["q"].rank == 2


def make_cache(place):
    """The layout of the Hub's cache: the files in `snapshots` are links to `blobs`."""
    repo = place.home / "models--me--adapter"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for k, path in enumerate((place.config, place.weights)):
        path.rename(repo / "blobs" / str(k))
        (snapshot / path.name).symlink_to(f"../../blobs/{k}")
    place.folder.rmdir()
    place.folder = snapshot
    place.config, place.weights = (snapshot / p.name for p in (place.config, place.weights))


def test_hub_cache_is_read(place):
    make_cache(place)
    assert load_peft(place.folder, make_params(), NAMES)[1]["q"].rank == 2


def test_link_out_of_the_hub_cache_raises(place):
    make_cache(place)
    outside = place.home / "outside"
    place.weights.resolve().rename(outside)
    link(place.weights, outside)
    assert_refused(place, "peft", AdapterFileError, "is a link to .*, outside its folder")


def test_pickle_is_never_read(place):
    only_pickle(place.weights)
    assert_refused(place, "peft", AdapterFileError, "are a pickle, which may run code")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: place.config.unlink(), "adapter_config.json: there is no such file"),
        (
            lambda place: setattr(place, "folder", place.home / "no"),
            "is not a folder.*pull_from_hub",
        ),
        (lambda place: setattr(place, "folder", place.weights), "is not a folder"),
    ],
    ids=["no config", "no folder", "a file"],
)
def test_non_peft_folder_raises(place, change, message):
    change(place)
    assert_refused(place, "peft", AdapterNotFoundError, message)
