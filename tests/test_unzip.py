"""cvlab.page.unzip: pictures of strangers' zips, and that no zip can write, escape, lie or overflow."""

import io
import struct
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from cvlab.page import unzip
from cvlab.page.unzip import clean, list_pictures
from cvlab.transforms import ImageError


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def sentence_of(path: Path) -> str:
    """Of the only picture in a zip, which cannot be opened."""
    (picture,) = list_pictures([path])
    with pytest.raises(ImageError) as error:
        picture.open()
    return str(error.value)


def changed_headers(path: Path, at_local: int, at_entry: int, value: int, form: str = "<I") -> Path:
    """Writes a value into the first member's local header and into its entry of the directory."""
    content = bytearray(path.read_bytes())
    for offset in (content.find(b"PK\3\4") + at_local, content.find(b"PK\1\2") + at_entry):
        struct.pack_into(form, content, offset, value)
    path.write_bytes(content)
    return path


def test_files_and_zips_in_order(tmp_path: Path) -> None:
    (tmp_path / "alone.png").write_bytes(png("lime"))
    (tmp_path / "last.png").write_bytes(png("blue"))
    names = {"z/x.png": png(), "y.png": png(), "__MACOSX/y.png": b"", ".DS_Store": b"", "empty/": b""}
    archive = zipped(tmp_path / "many.zip", names)
    found = list_pictures([tmp_path / "alone.png", archive, tmp_path / "last.png"])
    assert [picture.label for picture in found] == ["alone.png", "z/x.png", "y.png", "last.png"]
    colors = [picture.open().getpixel((0, 0)) for picture in found]
    assert colors == [(0, 255, 0), (255, 0, 0), (255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    "name", ["../../escaped.png", "/tmp/escaped.png", "C:\\escaped.png", "a/../../escaped.png", "x\n\x1b[2J\u202egnp"]
)
def test_a_hostile_name_is_a_label_and_never_a_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    before = sorted(tmp_path.rglob("*"))
    archive = zipped(tmp_path / "in" / "many.zip", {name: png()})
    (picture,) = list_pictures([archive])
    assert picture.open().size == (8, 6)
    assert picture.label.isprintable()
    assert sorted(tmp_path.rglob("*")) == sorted([*before, archive])


def test_labels_can_be_seen_and_are_short() -> None:
    assert clean("caf\u00e9.png") == "caf\u00e9.png"
    assert clean("a\x00b\ud800\u202e") == "a?b??"
    assert len(clean("x" * 10_000 + ".png")) == unzip.MAX_NAME
    assert clean("x" * 10_000 + ".png").endswith("x.png")


def test_a_bomb_is_refused_by_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unzip, "MAX_MEMBER_BYTES", 2**20)
    bomb = zipped(tmp_path / "bomb.zip", {"bomb.png": bytes(2**20 + 1)})
    assert "unpacks to" in sentence_of(bomb)
    monkeypatch.setattr(unzip, "MAX_ZIP_BYTES", 2**20)
    assert "unpacks to" in list_pictures([bomb])[0].sentence


def test_a_bomb_that_lies_is_stopped_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says 100 bytes and holds 64 MB: neither believed nor decompressed."""
    monkeypatch.setattr(unzip, "MAX_MEMBER_BYTES", 2**20)
    bomb = zipped(tmp_path / "bomb.zip", {"bomb.png": bytes(2**26)})
    changed_headers(bomb, 22, 24, 100)
    tracemalloc.start()
    try:
        assert "damaged" in sentence_of(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_too_many_members_are_counted_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unzip, "MOST_PICTURES", 3)
    found = list_pictures([zipped(tmp_path / "five.zip", {f"{i}.png": png() for i in range(5)})])
    assert [picture.label for picture in found] == ["0.png", "1.png", "2.png", "the rest"]
    assert "first 3 of 5" in found[-1].sentence
    (refused,) = list_pictures([zipped(tmp_path / "many.zip", {f"{i}.png": b"" for i in range(13)})])
    assert "over 12" in refused.sentence


def test_nested_locked_and_oddly_packed_members(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"a.png": png()}).read_bytes()
    sentences = [
        sentence_of(zipped(tmp_path / "outer.zip", {"inner.zip": inner})),
        sentence_of(changed_headers(zipped(tmp_path / "locked.zip", {"a.png": png()}), 6, 8, 1, "<H")),
        sentence_of(zipped(tmp_path / "bzip2.zip", {"a.png": png()}, zipfile.ZIP_BZIP2)),
        sentence_of(zipped(tmp_path / "lzma.zip", {"a.png": png()}, zipfile.ZIP_LZMA)),
        sentence_of(zipped(tmp_path / "empty.zip", {})),
        sentence_of(zipped(tmp_path / "text.zip", {"a.png": b"no picture"})),
    ]
    words = ["zip within a zip", "password", "deflate", "deflate", "no file", "not a picture"]
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))


def test_damage_anywhere_is_a_sentence(tmp_path: Path) -> None:
    """A byte changed or the end cut off at any place: opened, or one sentence, never another error."""
    whole = zipped(tmp_path / "whole.zip", {"a.png": png(), "b.png": png()}, zipfile.ZIP_STORED).read_bytes()
    damaged = tmp_path / "damaged.zip"
    for i in range(0, len(whole), 2):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :]):
            damaged.write_bytes(content)
            for picture in list_pictures([damaged]):
                with suppress(ImageError):
                    picture.open()


def test_what_is_gone_is_a_sentence(tmp_path: Path) -> None:
    assert "cannot be read" in sentence_of(tmp_path / "gone.png")
    assert "cannot be read" in sentence_of(tmp_path / "gone.zip")
    assert "cannot be read" in sentence_of(tmp_path)  # a folder
