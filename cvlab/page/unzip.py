"""Pictures in uploaded files and zips, opened one at a time and never unpacked to disk.

A zip may be hostile. The sizes that it states are checked before anything is decompressed, and again while it is read.
No name in it becomes a path: a file in it is read into memory, and its name is only a label with safe characters.
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image

from cvlab.transforms import ImageError, open_image

MOST_PICTURES = 1000
MAX_MEMBER_BYTES = 40 * 2**20  # of one picture file
MAX_ZIP_BYTES = 2 * 2**30  # of all files in a zip together, unpacked
MAX_NAME = 100  # characters of a label
ZIPS = (b"PK\x03\x04", b"PK\x05\x06")  # first bytes of a zip, and of an empty one
ENTRY = b"PK\x01\x02"  # first bytes of an entry in a zip's directory
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods cannot be stopped at a limit


@dataclass(frozen=True)
class Picture:
    """A picture that can be opened, or a sentence that says why not.

    Attributes:
        label: shown to people, and never used as a path.
        source: a file, or a zip and the entry in it.
    """

    label: str
    source: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo] | None = None
    sentence: str = ""

    def open(self) -> Image.Image:
        """The picture, as `open_image` gives it.

        Raises:
            ImageError: the picture cannot be opened.
        """
        if self.source is None:
            raise ImageError(self.sentence)
        try:
            with self.source.open("rb") if isinstance(self.source, Path) else _member(*self.source) as file:
                return open_image(file)
        except ImageError:
            raise
        except FileNotFoundError as error:
            raise ImageError("The picture cannot be read: it was deleted after an hour. Choose it again.") from error
        except Exception as error:  # damaged zips raise BadZipFile, zlib.error, EOFError, struct.error, ...
            raise ImageError("The picture is damaged and cannot be read.") from error


def list_pictures(paths: Sequence[str | Path]) -> list[Picture]:
    """The pictures in files and zips, in order, without hidden files of a zip and those that macOS adds.

    Never raises: a file that cannot be opened, a bad zip, and all pictures after the first MOST_PICTURES become a
    picture with a sentence.
    """
    found = [picture for path in paths for picture in _found(Path(path))]
    if len(found) > MOST_PICTURES:
        rest = f"Only the first {MOST_PICTURES} of {len(found)} pictures are taken."
        found = [*found[:MOST_PICTURES], Picture("the rest", sentence=rest)]
    return found


def clean(name: str) -> str:
    """A file name as a label: invisible characters become ?, and long names lose their middle."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}...{name[3 - MAX_NAME // 2 :]}"


def _found(path: Path) -> Iterator[Picture]:
    if _is_zip(path):
        try:
            yield from _in_zip(path)
        except ImageError as error:
            yield Picture(clean(path.name), sentence=str(error))
        except Exception:  # BadZipFile, struct.error, UnicodeDecodeError, OSError, ...
            yield Picture(clean(path.name), sentence="The zip is damaged and cannot be read.")
    else:
        yield Picture(clean(path.name), path)


def _is_zip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return path.suffix.lower() == ".zip" or file.read(len(ZIPS[0])) in ZIPS
    except (OSError, ValueError):
        return False  # it becomes a picture that says so


def _in_zip(path: Path) -> Iterator[Picture]:
    if _entries(path) > 4 * MOST_PICTURES:
        raise ImageError(f"The zip holds over {4 * MOST_PICTURES} files: send up to {MOST_PICTURES} pictures at once.")
    archive = zipfile.ZipFile(path)  # closed when its last picture is gone
    members = [member for member in archive.infolist() if not member.is_dir() and not _hidden(member.filename)]
    total = sum(member.file_size for member in members)
    if total > MAX_ZIP_BYTES:
        raise ImageError(f"The zip unpacks to {total / 2**20:,.0f} MB; up to {MAX_ZIP_BYTES // 2**20:,} MB are read.")
    if not members:
        raise ImageError("The zip holds no file.")
    for member in members:
        yield Picture(clean(member.filename), (archive, member))


def _entries(path: Path) -> int:
    """An upper bound of the number of files in a zip, counted without creating an object for each."""
    count, tail = 0, b""
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            count += (tail + piece).count(ENTRY)
            tail = piece[-len(ENTRY) + 1 :]
    return count


def _hidden(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith(".") or path.name == "Thumbs.db" or path.parts[:1] == ("__MACOSX",)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> BytesIO:
    if member.flag_bits & 1:
        raise ImageError("The picture is locked with a password: zip it without one.")
    if member.compress_type not in METHODS:
        raise ImageError("The picture is packed by a method that is not read here: use the usual one (deflate).")
    if member.file_size > MAX_MEMBER_BYTES:
        size, most = member.file_size / 2**20, MAX_MEMBER_BYTES // 2**20
        raise ImageError(f"The file unpacks to {size:,.0f} MB; up to {most} MB are read.")
    with archive.open(member) as file:
        content = file.read(MAX_MEMBER_BYTES)  # the stated size may be false
    if content.startswith(ZIPS):
        raise ImageError("A zip within a zip is not opened: send its pictures instead.")
    return BytesIO(content)
