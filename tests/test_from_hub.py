"""--data hf:user/dataset: `datasets` and the true client fetch it from the Hub of hub_server.py; what is laid out."""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as Picture
from hub_client import Client
from hub_server import Hub, serve
from PIL import Image

from cvlab.checkpoint import card
from cvlab.data import from_hub
from cvlab.data.parts import classification_parts, segmentation_parts

LABELLED = Features({"image": Picture(), "label": ClassLabel(names=["n/a", "tench, Tinca"]), "id": Value("int64")})
MASKED = Features({"annotation": Picture(), "image": Picture()})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Client:
    home = tmp_path_factory.mktemp("home")
    return Client(hub, home, CVLAB_DATA=str(home / "root"))


def photo(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def mask() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.eye(12, 16, dtype=np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


def table(features: Features, rows: list[dict]) -> bytes:
    """A parquet file as `datasets` writes it."""
    file = io.BytesIO()
    Dataset.from_list(rows, features).to_parquet(file)
    return file.getvalue()


def labelled(seeds: range, **changes: object) -> list[dict]:
    pictures = [{"bytes": photo(seed), "path": f"../{seed}.png"} for seed in seeds]
    return [{"image": each, "label": i % 2, "id": i} | changes for i, each in enumerate(pictures)]


def fetched(client: Client, name: str) -> Path:
    return client.call(laid_out, name)


def laid_out(name: str) -> Path:
    from cvlab.data.public import folder_of

    return folder_of(name)


def test_parquet_becomes_a_folder_with_parts_and_the_very_files(hub: Hub, client: Client) -> None:
    repo, unlabelled = hub.create("datasets", "user/pictures"), labelled(range(8, 10), label=-1)
    parts = {"train": labelled(range(8)) + unlabelled, "validation": labelled(range(20, 24)), "extra": labelled([30])}
    hub.add(repo, {f"data/{split}-00000-of-00001.parquet": table(LABELLED, rows) for split, rows in parts.items()})
    folder = fetched(client, "hf:user/pictures")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}
    expected = {
        f"{part}/{('n-a', 'tench, Tinca')[i % 2]}/{split}-{i:07d}.png": photo(first + i)
        for part, split, first, count in (("train", "train", 0, 8), ("val", "validation", 20, 4))
        for i in range(count)
    }
    assert files == expected
    found = classification_parts(folder)
    assert (found.name, found.class_names) == ("hf:user/pictures", ["n-a", "tench, Tinca"])
    assert len(found.samples["val"]) == 4
    hub.log.clear()
    assert fetched(client, "hf:user/pictures") == folder
    assert not hub.log  # laid out once
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_of_pictures_is_read_with_its_classes(hub: Hub, client: Client) -> None:
    files = {f"train/{name}/{i}.jpg": photo(9 * i + len(name), "JPEG") for name in ("a", "bb") for i in range(4)}
    hub.add(hub.create("datasets", "user/folders"), files)
    folder = fetched(client, "hf:user/folders")
    assert len(list(folder.glob("train/bb/*.jpg"))) == 4
    assert classification_parts(folder).class_names == ["a", "bb"]


def test_pictures_and_masks_are_for_segmenters(hub: Hub, client: Client) -> None:
    rows = [{"annotation": {"bytes": mask()}, "image": {"bytes": photo(i)}} for i in range(12)]
    hub.add(hub.create("datasets", "user/masks"), {"data/train-00000-of-00001.parquet": table(MASKED, rows)})
    found = segmentation_parts(fetched(client, "hf:user/masks"))
    assert sum(map(len, found.samples.values())) == 12
    assert found.open_sample(found.samples["val"][0])[1].sum() == 12


def test_a_configuration_is_chosen_by_its_name(hub: Hub, client: Client) -> None:
    configs = "---\nconfigs:\n" + "".join(f"- config_name: {c}\n  data_files: {c}/*.parquet\n" for c in "xy") + "---\n"
    files = {"README.md": configs.encode()} | {f"{c}/train.parquet": table(LABELLED, labelled([1, 2])) for c in "xy"}
    hub.add(hub.create("datasets", "user/two"), files)
    with pytest.raises(FileNotFoundError, match=r"x.*y"):
        fetched(client, "hf:user/two")
    assert from_hub.name_of(fetched(client, "hf:user/two:y")) == "hf:user/two:y"


def refused(client: Client, name: str, match: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        fetched(client, name)
    assert not (client.home / "root/folders" / re.sub("[:/]", "--", name)).exists()


def test_what_is_of_no_use_is_refused_with_its_name(hub: Hub, client: Client) -> None:
    def holding(name: str, files: dict[str, bytes]) -> str:
        hub.add(hub.create("datasets", f"user/{name}"), files)
        return f"hf:user/{name}"

    bad = Features({"image": Picture(), "label": ClassLabel(names=["a\x1b[2J", "b"])})
    rows = [{"image": {"bytes": photo(i)}, "label": i} for i in range(2)]
    unnamed = fetched(client, holding("classes", {"train.parquet": table(bad, rows)}))
    with pytest.raises(ValueError, match="control characters"):
        classification_parts(unnamed)
    refused(client, holding("plain", {"train.parquet": table(Features({"n": Value("int64")}), [{"n": 1}])}), r"\['n'\]")
    refused(client, holding("lines", {"train.csv": b"image,label\na,b\n"}), "csv")
    refused(client, holding("script", {"script.py": b"raise SystemExit"}), "could not be fetched")
    refused(client, "hf:user/nothing", "could not be fetched")
    for name in ("hf:nothing", "hf:user/../x", "hf:user/a--b", "hf:/etc", "hf:a/b:c:d"):
        refused(client, name, "user/dataset")


def test_the_library_is_named_where_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        from_hub.folder_of("hf:user/pictures", tmp_path)


def test_a_table_names_no_file_of_this_machine(hub: Hub, client: Client, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(photo(1))
    rows = labelled(range(4)) + [{"image": {"bytes": None, "path": str(tmp_path / "secret.png")}, "label": 1, "id": 1}]
    hub.add(hub.create("datasets", "user/paths"), {"train.parquet": table(LABELLED, rows)})
    assert len(list(fetched(client, "hf:user/paths").rglob("*.png"))) == 4


def test_a_classifier_learns_from_it_and_its_card_names_it(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.add(hub.create("datasets", "user/learn"), {"train.parquet": table(LABELLED, labelled(range(40)))})
    words = ["--image-size", "16", "--widths", "4", "--epochs", "1", "--precision", "fp32", "--out", tmp_path / "run"]
    printed = client.command("train/classifier.py", "--data", "hf:user/learn", *words)
    assert "MB to download" in printed
    assert json.loads((tmp_path / "run/config.json").read_text())["cvlab"]["data"]["name"] == "hf:user/learn"
    client.command("train/evaluate.py", tmp_path / "run", "--data", "hf:user/learn", "--part", "val")
    assert (tmp_path / "run/report/val/metrics.json").is_file()
    card.write(tmp_path / "run", "user/model")
    assert "datasets:\n- user/learn\n" in (tmp_path / "run/README.md").read_text()
