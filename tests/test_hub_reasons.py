"""What goes wrong between this machine and the Hub reaches the user: the Hub's reason, the variable, what to do."""

import shutil
from pathlib import Path

import pytest
import torch
from hub_client import TOKEN, Client, warnings_of_pull
from hub_server import serve
from safetensors.torch import save_file

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError, hub_errors
from cvlab.checkpoint.hub import HubError, is_id, name_of
from cvlab.models import build
from cvlab.models.timm import read_weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 2780000\n".format("0" * 64)
STORAGE = "Private repository storage limit reached, please upgrade your plan to increase it"
NAMESPACE = "You don't have the rights to create a model under the namespace"
LICENSE = '"license" must be one of [apache-2.0, mit, ...]'


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("hub"), token=TOKEN) as hub:
        yield hub


@pytest.fixture(autouse=True)
def quiet(hub):
    yield
    hub.faults.clear()
    hub.bad_metadata.clear()


@pytest.fixture(scope="module")
def owner(hub, tmp_path_factory):
    return Client(hub, tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text('{"cvlab": {}}')
    (folder / "README.md").write_text("---\nlicense: none\n---\n")
    save_file({"weight": torch.arange(1000.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model_id(owner, small) -> str:
    owner.push(small, "user/small")
    return "user/small"


# --- publishing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "status", "reason"),
    [
        ("/api/repos/create", 403, f'{NAMESPACE} "acme"'),
        ("/preupload/", 403, STORAGE),
        ("/objects/batch", 403, STORAGE),
        ("/commit/", 403, "Pull requests and discussions are disabled"),
        ("/commit/", 400, LICENSE),
        ("/commit/", 413, "Your commit is too large"),
        ("/api/repos/create", 429, "You have created too many repositories, retry tomorrow"),
    ],
)
def test_why_the_hub_refuses_a_push(hub, owner, small, where, status, reason):
    hub.faults[where] = status, "", reason
    with pytest.raises(HubError) as refused:
        owner.push(small, f"acme/{status}{len(reason)}")
    assert reason in str(refused.value)
    assert "HF_TOKEN" not in str(refused.value)  # another token would not help


def test_a_token_that_only_reads_is_told_apart(hub, owner, small):
    hub.faults["/preupload/"] = 403, "", "Forbidden: you must use a write token to upload to a repository."
    with pytest.raises(HubError, match=r"HF_TOKEN.*must use a write token"):
        owner.push(small, "user/read-only")


def test_what_is_wrong_with_the_metadata_of_a_card(hub, owner, small):
    hub.bad_metadata[:] = [LICENSE, '"tags" must be an array']
    with pytest.raises(HubError) as refused:
        owner.push(small, "user/bad-metadata")
    assert all(each in str(refused.value) for each in hub.bad_metadata)
    assert "\n" not in str(refused.value)


# --- downloading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (403, "Access to this resource is disabled."),
        (451, "Unavailable for legal reasons"),
        (503, "The Hub is in maintenance until noon"),
    ],
)
def test_why_the_hub_refuses_a_download(hub, owner, status, reason):
    hub.faults["/api/models/user/refused"] = status, "", reason
    with pytest.raises(HubError) as refused:
        owner.pull("user/refused")
    assert reason.rstrip(".") in str(refused.value)
    assert "user/refused" in str(refused.value)


def test_a_token_that_the_hub_does_not_know_is_not_a_missing_model(hub, owner):
    hub.faults["/api/models/user/small"] = 401, "", "Invalid credentials in Authorization header"
    with pytest.raises(HubError, match="HF_TOKEN"):
        owner.pull("user/small")


@pytest.mark.parametrize("token", [f"\u201c{TOKEN}\u201d", f'"{TOKEN}"', f"{TOKEN} # mine"])
def test_a_token_in_quotation_marks_names_its_variable(hub, model_id, small, tmp_path, token):
    visitor = Client(hub, tmp_path, token=token)
    with pytest.raises(HubError, match="HF_TOKEN"):
        visitor.pull(model_id)
    with pytest.raises(HubError, match="HF_TOKEN"):
        visitor.push(small, model_id)


# --- the cache --------------------------------------------------------------------------------------------------------


def publish_another(owner, small, folder, model_id) -> None:
    """A newer commit, with weights that are larger."""
    shutil.copytree(small, folder)
    (folder / "config.json").write_text('{"cvlab": "newer"}')
    save_file({"weight": torch.arange(100_000.0)}, folder / "model.safetensors")
    owner.push(folder, model_id)


def test_a_cache_that_cannot_be_written_serves_what_it_has(hub, owner, small, model_id, tmp_path):
    owner.push(small, "user/cached")
    home = tmp_path / "home"
    folder = Client(hub, home).pull("user/cached")
    publish_another(owner, small, tmp_path / "newer", "user/cached")
    places = [home, *(path for path in home.rglob("*") if path.is_dir())]
    for place in places:
        place.chmod(0o555)
    try:
        visitor = Client(hub, home)
        served, warned = visitor.call(warnings_of_pull, "user/cached")
        with pytest.raises(HubError, match="HF_HOME"):
            visitor.call(warnings_of_pull, model_id)
    finally:
        for place in places:
            place.chmod(0o755)
    assert served == folder
    assert (served / "config.json").read_bytes() == (small / "config.json").read_bytes()
    assert "HF_HOME" in "".join(warned)
    assert (Client(hub, home).pull("user/cached") / "config.json").read_text() == '{"cvlab": "newer"}'


def test_a_full_disk_leaves_what_was_there(hub, owner, small, tmp_path):
    """Also for the next time, when the Hub cannot be reached: a branch moves when its new files are whole."""
    owner.push(small, "user/full")
    home = tmp_path / "home"
    folder = Client(hub, home).pull("user/full")
    publish_another(owner, small, tmp_path / "newer", "user/full")
    served, warned = Client(hub, home).call(warnings_of_pull, "user/full", largest_file=100_000)
    assert served == folder
    assert "HF_HOME" in "".join(warned)
    assert Client(hub, home, HF_HUB_OFFLINE="1").pull("user/full") == folder


@pytest.mark.parametrize("missing", ["a file", "no folder can be made"])
def test_a_home_on_a_disk_that_is_not_there_is_named(hub, model_id, tmp_path, missing):
    home = tmp_path / "data"
    if missing == "a file":
        home.write_text("")
    else:
        home = Path("/proc/data")
    with pytest.raises(HubError, match=f"HF_HOME.*{model_id}|{model_id}.*HF_HOME"):
        Client(hub, home).pull(model_id)


# --- names and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("user/m ", "user/m"),
        ("\u200buser/m\u00a0\n", "user/m"),
        ("\u201cuser/m\u201d", "user/m"),
        ("https://huggingface.co/user/m", "user/m"),
        ("huggingface.co/user/m/", "user/m"),
        ("https://hf.co/user/m?library=timm#files", "user/m"),
        ("https://huggingface.co/user/m/tree/v1.0", "user/m@v1.0"),
        ("https://huggingface.co/user/m/blob/exp%2Fone/config.json", "user/m@exp/one"),
    ],
)
def test_what_is_pasted_is_a_name(text, name):
    assert name_of(text) == name
    assert is_id(name_of(text))


@pytest.mark.parametrize(
    "text",
    ["./x", "../x ", "/x/y", "runs/x/", "https://huggingface.co/spaces/user/m", "https://example.org/user/m", ""],
)
def test_what_names_no_model_stays_none(text):
    assert not is_id(name_of(text))


def test_the_address_of_a_page_is_pulled_loaded_and_published_to(hub, owner, small, model_id):
    commit = hub.repos["models", model_id]["branches"]["main"]
    for text in (f" {model_id}\n", f"{hub.url}/{model_id}", f"{hub.url}/{model_id}/tree/{commit}"):
        assert owner.pull(text).name == commit
    owner.push(small, f"{hub.url}/user/by-address ")
    assert ("models", "user/by-address") in hub.repos
    with pytest.raises(CheckpointError, match="neither a folder nor a name"):
        checkpoint.load("https://huggingface.co/spaces/user/page")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_is_named_with_its_cure(tmp_path, name):
    checkpoint.save(build("convnet", ["cat", "dog"], 16, {"widths": [4, 8]}), tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_pointer_in_place_of_given_weights(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match="git lfs pull"):
        read_weights(tmp_path / name)


def test_every_reason_is_one_line_of_limited_length(hub, owner, small):
    hub.faults["/commit/"] = 400, "", "x " * 5000
    with pytest.raises(HubError) as refused:
        owner.push(small, "user/long")
    assert len(str(refused.value)) < hub_errors.MAX_REASON + 100
