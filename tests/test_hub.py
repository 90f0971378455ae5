"""cvlab.checkpoint.hub and train/publish.py against a Hub on this machine, by the true huggingface_hub client."""

import json
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_client import TOKEN, Client, logits_by_timm, logits_of, of_hub, progress_of_pull
from hub_server import serve
from safetensors.torch import save_file

from cvlab import checkpoint
from cvlab.checkpoint.hub import HubError, is_id
from cvlab.models import build


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("hub"), token=TOKEN) as hub:
        yield hub


@pytest.fixture(autouse=True)
def quiet(hub):
    """Each test begins without faults and reads only its own requests."""
    hub.faults.clear()
    hub.log.clear()


@pytest.fixture(scope="module")
def owner(hub, tmp_path_factory):
    return Client(hub, tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder that the Hub takes for a checkpoint: what is in its files concerns only cvlab.checkpoint."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text('{"cvlab": {}}')
    save_file({"weight": torch.arange(1000.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model_id(owner, small) -> str:
    """The small folder on the Hub."""
    owner.push(small, "user/small")
    return "user/small"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A true checkpoint with everything that a run leaves beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(build("convnet", ["cat", "dog"], 32, {"widths": [8, 16]}), folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Cats and dogs\n")
    (folder / "report" / "photos").mkdir(parents=True)
    for name in ("metrics.json", "report/confusion.png", "report/README.md", "report/photos/cat [1].png"):
        (folder / name).write_text(name)
    (folder / "state" / "step-9").mkdir(parents=True)
    for name in ("test_reads.jsonl", "weights.pkl", "report/scores.csv", "state/step-9/model.safetensors"):
        (folder / name).write_text("stays here")
    return folder


@pytest.fixture(scope="module")
def published(hub, owner, trained) -> subprocess.CompletedProcess:
    """`python train/publish.py RUN user/pets` has been run."""
    return owner.run("train/publish.py", trained, "user/pets")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/name", True),
        ("user/name@v1.0", True),
        ("user/name@exp/one", True),
        ("name", False),
        ("user/name@", False),
        ("user/name@../x", False),
        ("user/name@a/../../../x", False),
        ("user/name@/etc/passwd", False),
        ("./x", False),
        ("../x", False),
        ("/x", False),
        ("runs/shapes/", False),
        ("a/b/c", False),
        ("https://huggingface.co/user/name", False),
        ("", False),
    ],
)
def test_is_id(text, expected):
    assert is_id(text) is expected


def test_publish_sends_the_checkpoint_and_nothing_else(hub, published):
    assert published.returncode == 0, published.stderr
    repo = hub.repos["models", "user/pets"]
    report = {"report/confusion.png", "report/README.md"}
    assert set(hub.files(repo, "main")) == {"config.json", "model.safetensors", "README.md", "metrics.json"} | report
    assert f"{hub.url}/user/pets/commit/{repo['branches']['main']}" in published.stdout
    assert not repo["private"]


def test_a_published_model_is_loaded_by_its_id(hub, published, trained, tmp_path):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = checkpoint.load(trained)(images)
    visitor = Client(hub, tmp_path / "home", token=None)
    assert torch.equal(torch.tensor(visitor.call(logits_of, "user/pets", images.tolist())), expected)


def test_a_published_network_of_timm_is_opened_by_timm_and_by_us(hub, owner, tmp_path):
    """By "hf-hub:" without cvlab, and by its id with it; both give the logits of before, to the bit."""
    torch.manual_seed(0)
    model = build("timm", ["cat", "dog"], 64, {"architecture": "test_vit"}).eval()
    checkpoint.save(model, tmp_path / "run")
    owner.command("train/publish.py", tmp_path / "run", "user/vit")
    card = hub.blob(hub.files(hub.repos["models", "user/vit"], "main")["README.md"]["sha256"]).read_text()
    assert 'load("user/vit")' in card
    assert str(tmp_path) not in card
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        normalized, expected = model.normalize(images), model(images)
    visitor = Client(hub, tmp_path / "home")
    assert torch.equal(torch.tensor(visitor.call(logits_by_timm, "user/vit", normalized.tolist())), expected)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(visitor.pull("user/vit"))(images), expected)


def test_a_loaded_model_knows_its_commit(hub, owner, published):
    commit = hub.repos["models", "user/pets"]["branches"]["main"]
    assert checkpoint.load(owner.pull("user/pets")).source == f"user/pets@{commit}"


@pytest.mark.parametrize("where", ["/_lfs/", "/commit/"])
def test_a_push_that_is_killed_leaves_the_repository_as_it_was(hub, owner, small, tmp_path, where):
    folder = shutil.copytree(small, tmp_path / "run")
    owner.push(folder, "user/interrupted")
    repo = hub.repos["models", "user/interrupted"]
    before = json.dumps([repo["branches"], repo["commits"]])
    (folder / "config.json").write_text('{"cvlab": "changed"}')
    save_file({"weight": torch.rand(1000)}, folder / "model.safetensors")
    hub.faults[where] = "hang"
    hub.log.clear()
    pushing = Client(hub, owner.home)
    pushing.send(of_hub, "push", [folder, "user/interrupted"], {})
    while not any(where in path for _, path, _ in hub.log):
        assert not pushing.connection.poll(0.02), "it ended before it was killed"
    pushing.process.kill()
    assert json.dumps([repo["branches"], repo["commits"]]) == before
    hub.faults.clear()
    owner.push(folder, "user/interrupted")
    assert (owner.pull("user/interrupted") / "config.json").read_text() == '{"cvlab": "changed"}'


def test_a_push_that_the_hub_refuses_leaves_the_repository_as_it_was(hub, owner, model_id, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "run")
    (folder / "config.json").write_text('{"cvlab": "refused"}')
    before = dict(hub.repos["models", model_id]["branches"])
    hub.faults["/commit/"] = 400
    with pytest.raises(HubError, match=model_id):
        owner.push(folder, model_id)
    assert hub.repos["models", model_id]["branches"] == before


def test_a_silent_hub_is_not_waited_for(hub, owner, small, model_id):
    hub.faults[f"/api/models/{model_id}"] = "hang"
    with pytest.raises(HubError, match=model_id):
        owner.call(of_hub, "push", [small, model_id], {}, {"PROBE_SECONDS": 0.5})
    assert not [path for method, path, _ in hub.log if method == "POST"]


def test_model_onnx_is_sent_never_fetched_and_gone_with_its_weights(hub, owner, small, tmp_path):
    folder, names = shutil.copytree(small, tmp_path / "run"), ("model.onnx", "familiarity.safetensors")
    for name in names:
        (folder / name).write_bytes(b"of these weights")
    owner.push(folder, "user/exported")
    files = partial(hub.files, hub.repos["models", "user/exported"], "main")
    assert set(names) < set(files())
    visitor = Client(hub, tmp_path / "home")
    visitor.pull("user/exported")
    assert visitor.cached() == {"config.json", "model.safetensors", "familiarity.safetensors"}
    for name in names:
        (folder / name).unlink()
    owner.push(folder, "user/exported")
    assert set(files()) == {"config.json", "model.safetensors"}


def test_photos_are_sent_only_when_asked(hub, owner, trained):
    owner.push(trained, "user/photos", with_photos=True)
    assert "report/photos/cat [1].png" in hub.files(hub.repos["models", "user/photos"], "main")


def test_a_strangers_files_are_never_downloaded(hub, owner, small, tmp_path):
    owner.push(small, "user/stranger")
    strange = ("weights.pkl", "evil.py", "sub/config.json", "model.safetensors.py", "pytorch_model.bin")
    hub.add(hub.repos["models", "user/stranger"], dict.fromkeys(strange, b"import os"))
    visitor = Client(hub, tmp_path)
    visitor.pull("user/stranger")
    assert visitor.cached() == {"config.json", "model.safetensors"}
    assert not [path for _, path, _ in hub.log if path.endswith(strange)]


@pytest.mark.parametrize("constants", [{"MAX_WEIGHTS_BYTES": 100}, {"MAX_TEXT_BYTES": 5}])
def test_too_large_is_refused_before_the_download(hub, model_id, tmp_path, constants):
    visitor = Client(hub, tmp_path)
    with pytest.raises(HubError, match=model_id):
        visitor.pull(model_id, **constants)
    assert not visitor.cached()
    assert not [path for method, path, _ in hub.log if method == "GET" and ("/resolve/" in path or "/_cdn/" in path)]


def test_a_repository_without_weights_is_refused(hub, owner, small, tmp_path):
    owner.push(small, "user/empty")
    repo = hub.repos["models", "user/empty"]
    hub.commit(repo, {"config.json": hub.files(repo, "main")["config.json"]}, "main")
    with pytest.raises(HubError, match=r"model\.safetensors"):
        Client(hub, tmp_path).pull("user/empty")


def test_20_mb_go_in_parts_and_come_back_whole(hub, owner, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.rand(5 * 2**20)}, folder / "model.safetensors")
    owner.push(folder, "user/heavy")
    assert sum(method == "PUT" for method, _, _ in hub.log) == 3
    pulled = Client(hub, tmp_path / "home").pull("user/heavy")
    assert (pulled / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_branches_and_commits(hub, owner, small, tmp_path):
    other = shutil.copytree(small, tmp_path / "other")
    (other / "config.json").write_text('{"cvlab": "of the branch"}')
    owner.push(small, "user/branches")
    owner.push(other, "user/branches", revision="exp/one")
    first = hub.repos["models", "user/branches"]["branches"]["main"]
    owner.push(other, "user/branches")
    for revision, folder in (("", other), ("@exp/one", other), (f"@{first}", small)):
        pulled = owner.pull(f"user/branches{revision}")
        assert (pulled / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    with pytest.raises(HubError, match="nowhere"):
        owner.pull("user/branches@nowhere")


def test_the_cache_serves_when_the_hub_does_not(hub, model_id, tmp_path):
    commit = hub.repos["models", model_id]["branches"]["main"]
    visitor = Client(hub, tmp_path)
    folder = visitor.pull(model_id)
    with socket.socket() as nobody:  # bound and not listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        unreachable = Client(hub, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert unreachable.pull(model_id) == folder
        assert unreachable.pull(f"{model_id}@{commit}") == folder
    hub.log.clear()
    offline = Client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.pull(model_id) == folder
    assert not hub.log
    hub.faults[f"/api/models/{model_id}"] = 429
    assert visitor.pull(model_id) == folder
    with pytest.raises(HubError, match=model_id):  # a copy that another program has fetched, without our limits
        offline.pull(model_id, MAX_WEIGHTS_BYTES=100)
    (folder / "model.safetensors").unlink()
    with pytest.raises(HubError, match=model_id):  # a copy that is not whole
        offline.pull(model_id)


def test_not_cached_and_no_hub(hub, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        nowhere = Client(hub, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(HubError, match="user/pets"):
            nowhere.pull("user/pets")
        silent.listen()  # connections are taken and never answered
        with pytest.raises(HubError, match="user/pets"):
            nowhere.pull("user/pets", PROBE_SECONDS=0.2)
        with pytest.raises(HubError, match="user/pets"):
            Client(hub, tmp_path, HF_HUB_OFFLINE="1").pull("user/pets")


@pytest.mark.parametrize("status", [429, 503])
def test_not_cached_and_the_hub_refuses(hub, tmp_path, status):
    hub.faults["/api/models/user/pets"] = status
    with pytest.raises(HubError, match="user/pets"):
        Client(hub, tmp_path).pull("user/pets")


def test_private_repositories_need_a_token(hub, owner, small, tmp_path):
    owner.push(small, "user/secret", private=True)
    assert hub.repos["models", "user/secret"]["private"]
    for token in (None, "hf_of_somebody_else"):
        with pytest.raises(HubError, match="user/secret"):
            Client(hub, tmp_path, token=token).pull("user/secret")
    assert owner.pull("user/secret").is_dir()


def test_a_repository_whose_files_are_withheld(hub, model_id, tmp_path):
    hub.faults[f"/{model_id}/resolve/"] = 403
    with pytest.raises(HubError, match=model_id):
        Client(hub, tmp_path).pull(model_id)


def test_a_gated_repository_says_where_to_agree(hub, model_id, tmp_path):
    hub.faults[f"/api/models/{model_id}"] = 403, "GatedRepo"
    with pytest.raises(HubError, match=f"huggingface.co/{model_id}"):
        Client(hub, tmp_path).pull(model_id)


def test_progress_counts_every_byte(hub, model_id, small, tmp_path):
    calls = Client(hub, tmp_path).call(progress_of_pull, model_id)
    total = sum(path.stat().st_size for path in small.iterdir())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_an_unknown_repository(owner):
    with pytest.raises(HubError, match="user/nobody"):
        owner.pull("user/nobody")


@pytest.mark.parametrize(
    ("name", "fault"), [("config.json", "corrupt"), ("model.safetensors", "corrupt"), ("model.safetensors", "truncate")]
)
def test_a_damaged_download_is_refused_and_not_kept(hub, model_id, small, tmp_path, name, fault):
    visitor = Client(hub, tmp_path)
    hub.faults[name] = fault
    with pytest.raises(HubError, match=model_id):
        visitor.pull(model_id)
    hub.faults.clear()
    assert (visitor.pull(model_id) / name).read_bytes() == (small / name).read_bytes()


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_pushing_needs_a_token(hub, small, published, tmp_path, token):
    visitor = Client(hub, tmp_path, token=token)
    before = dict(hub.repos["models", "user/pets"]["branches"])
    for model_id in ("user/unborn", "user/pets"):
        with pytest.raises(HubError, match="HF_TOKEN"):
            visitor.push(small, model_id)
    assert ("models", "user/unborn") not in hub.repos
    assert hub.repos["models", "user/pets"]["branches"] == before


def test_private_is_not_promised_for_a_public_repository(hub, owner, small):
    owner.push(small, "user/public")
    commits = len(hub.repos["models", "user/public"]["commits"])
    with pytest.raises(HubError, match="public"):
        owner.push(small, "user/public", private=True, revision="hidden")
    assert len(hub.repos["models", "user/public"]["commits"]) == commits


def test_a_folder_without_weights_is_not_pushed(hub, owner, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HubError, match=r"model\.safetensors"):
        owner.push(tmp_path, "user/weightless")
    assert not hub.log
