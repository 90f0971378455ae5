"""Pictures in uploaded files and zips, opened one at a time and never unpacked to disk.

A zip may be hostile. The sizes that it states are checked before anything is decompressed, and not a byte more is. No
name in it becomes a path: a file in it is read into memory, and its name is only a label with safe characters.
"""

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from cvlab.transforms import ImageError, open_image

MOST_PICTURES = 1000
MAX_MEMBER_BYTES = 40 * 2**20  # of one picture file
MAX_ZIP_BYTES = 2 * 2**30  # of all files in a zip together, unpacked
MAX_NAME = 100  # characters of a label
ZIPS = (b"PK\x03\x04", b"PK\x05\x06")  # first bytes of a zip, and of an empty one
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods cannot be stopped at a limit
HIDDEN = re.compile(r"__MACOSX/|(.*/)?(\.[^/]*|Thumbs\.db|)\Z", re.S)  # folders too


@dataclass(frozen=True)
class Picture:
    """A picture that can be opened, or a sentence that says why not."""

    label: str  # shown to people, and never used as a path
    source: Path | tuple[zipfile.ZipFile, zipfile.ZipInfo] | None = None  # a file, or a zip and the entry in it
    sentence: str = ""

    def open(self) -> Image.Image:
        """The picture, as `open_image` gives it; raises an ImageError where it cannot be opened."""
        if self.sentence:
            raise ImageError(self.sentence)
        try:
            content = self.source.read_bytes() if isinstance(self.source, Path) else _unpacked(*self.source)
        except Exception as error:  # damaged zips raise BadZipFile, zlib.error, EOFError, struct.error, ...
            raise ImageError("The picture is damaged and cannot be read.") from error
        if content.startswith(ZIPS):
            raise ImageError("A zip within a zip is not opened: send its pictures instead.")
        return open_image(BytesIO(content))


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


def _found(path: Path) -> list[Picture]:
    try:
        with open(path, "rb") as file:
            is_zip = path.suffix.lower() == ".zip" or file.read(len(ZIPS[0])) in ZIPS
        return _in_zip(path) if is_zip else [Picture(clean(path.name), path)]
    except ImageError as error:
        sentence = str(error)
    except FileNotFoundError:
        sentence = "The picture cannot be read: it was deleted after an hour. Choose it again."
    except Exception:  # BadZipFile, struct.error, UnicodeDecodeError, OSError, ...
        sentence = "The file is damaged and cannot be read."
    return [Picture(clean(path.name), sentence=sentence)]


def _in_zip(path: Path) -> list[Picture]:
    if path.read_bytes().count(b"PK\x01\x02") > 4 * MOST_PICTURES:  # entries: no object is created for each of them
        raise ImageError(f"The zip holds over {4 * MOST_PICTURES} files: send up to {MOST_PICTURES} pictures at once.")
    archive = zipfile.ZipFile(path)  # closed when its last picture is gone
    members = [member for member in archive.infolist() if not HIDDEN.match(member.filename)]
    if (total := sum(member.file_size for member in members)) > MAX_ZIP_BYTES:
        raise ImageError(f"The zip unpacks to {total / 2**20:,.0f} MB; up to {MAX_ZIP_BYTES // 2**20:,} MB are read.")
    if not members:
        raise ImageError("The zip holds no file.")
    return [Picture(clean(member.filename), (archive, member), _refused(member)) for member in members]


def _refused(member: zipfile.ZipInfo) -> str:
    """Why a file in a zip is not read; empty where it is."""
    if member.flag_bits & 1:
        return "The picture is locked with a password: zip it without one."
    if member.compress_type not in METHODS:
        return "The picture is packed by a method that is not read here: use the usual one (deflate)."
    size, most = member.file_size / 2**20, MAX_MEMBER_BYTES / 2**20
    return f"The file unpacks to {size:,.0f} MB; up to {most:.0f} MB are read." if size > most else ""


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as file:
        return file.read(member.file_size)  # as many bytes as it states, compared with their checksum
