"""--push-state: a training goes on upon another machine, from what the first one left on the Hub of hub_server.py."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from hub_client import TOKEN, Client
from hub_server import Hub, serve
from runs import here, kept, last, same, without_time

from cvlab import checkpoint

WORDS = ["--image-size", 32, "--precision", "fp32", "--widths", 8, 8, "--batch-size", 8, "--schedule", "constant"]
WORDS += ["--ema", 0.9, "--dropout", 0.2, "--epochs", 4]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(tmp_path_factory.mktemp("hub"), token=TOKEN) as hub:
        yield hub


@pytest.fixture(autouse=True)
def quiet(hub: Hub) -> None:
    hub.faults.clear()
    hub.log.clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.colours(tmp_path_factory.mktemp("data") / "colours", 17)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    here("classifier", "--data", data, *WORDS, "--out", out)
    return out


def test_a_killed_training_goes_on_upon_another_machine(hub: Hub, data: Path, whole: Path, tmp_path: Path) -> None:
    """The first machine is killed while it sends the state of its third epoch: that of the second is there."""
    name, first, other = "user/moved", Client(hub, tmp_path / "a"), Client(hub, tmp_path / "b")
    words = ["train/classifier.py", "--data", data, *WORDS, "--push", name, "--push-state", "--resume", "--out"]
    first.send(run_until_commit, [*map(str, [*words, tmp_path / "a/run"])], 3)
    while not (tmp_path / "a/run/killed").exists():
        assert not first.connection.poll(0.02), "it ended before it was killed"
    first.process.kill()
    repo = hub.repos["models", name]
    left = hub.files(repo, "state")
    steps = {path.split("/")[1] for path in left if path.startswith("state/")}
    assert len(steps) == 1
    assert {path for path in left if not path.startswith("state/")} == {"config.json", "model.safetensors"}
    assert not hub.files(repo, "main")
    shutil.rmtree(tmp_path / "a/run")
    other.command(*words, tmp_path / "b/run")
    assert same(last(tmp_path / "b/run"), last(whole))
    assert same(kept(tmp_path / "b/run"), kept(whole))
    assert without_time(tmp_path / "b/run") == without_time(whole)
    assert not list((tmp_path / "b/run").glob(".*"))
    assert not [path for path in hub.files(repo, "main") if path.startswith("state/")]
    assert checkpoint.load(other.pull(name)).class_names == ["blue", "red"]


def run_until_commit(words: list[str], number: int) -> None:
    """Runs a script that waits for ever when it sends a state for the so many-th time."""
    from hub_client import run_script

    from cvlab.checkpoint import hub

    pushes, push_state = iter(range(1, 100)), hub.push_state

    def counted(folder: Path, state: Path, model_id: str) -> None:
        if next(pushes) == number:
            (folder / "killed").touch()
            time.sleep(100)
        push_state(folder, state, model_id)

    hub.push_state = counted
    run_script(words)


def test_a_hub_that_is_away_stops_no_training(hub: Hub, data: Path, tmp_path: Path) -> None:
    client = Client(hub, tmp_path)
    hub.faults["/commit/state"] = 500
    words = ["--data", data, *WORDS, "--epochs", 1, "--push", "user/away", "--push-state", "--out", tmp_path / "run"]
    assert "This state is not on the Hub" in client.command("train/classifier.py", *words)
    assert "config.json" in hub.files(hub.repos["models", "user/away"], "main")


class Runs:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def test_a_state_that_would_run_code_is_not_opened(hub: Hub, data: Path, tmp_path: Path) -> None:
    repo = hub.create("models", "user/strange")
    torch.save({"state": Runs()}, tmp_path / "pickle")
    files = {f"state/step-1/{name}": b"{}" for name in ("progress.json", "sha256.json")}
    hub.add(repo, files | {"state/step-1/custom_checkpoint_0.pkl": (tmp_path / "pickle").read_bytes()})
    repo["branches"]["state"] = repo["branches"]["main"]
    words = ["--data", data, *WORDS, "--push", "user/strange", "--push-state", "--resume", "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match=r"custom_checkpoint_0.pkl of user/strange@state is not opened"):
        Client(hub, tmp_path).command("train/classifier.py", *words)
    assert not Path("ran").exists()
    assert not list((tmp_path / "run/state").glob("step-*"))


def test_there_has_to_be_a_name_to_push_to(data: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        here("classifier", "--data", data, "--push-state")
    assert "--push USER/NAME" in capsys.readouterr().err
