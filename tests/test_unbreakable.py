"""The running page under 500 hostile inputs from seeds: it stays up, says a sentence each time, and reads no file.

Pictures, data: URLs and names go through the very functions that the endpoints call; calls of wrong types and requests
for files go over HTTP. An audit hook tells whether a file that nobody uploaded was opened.
"""

import base64
import io
import json
import random
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
import torch
from gradio.utils import get_upload_folder
from PIL import Image

import app
from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.models import build
from cvlab.page.host import sentence_of
from cvlab.page.models import Models, offered_models
from cvlab.page.upload import Sent, path_of

ROOT = Path(__file__).resolve().parents[1]
MODEL = "shapes-classifier"
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "PPM")
MUTATIONS = 28  # of each format
SHARES = {"mutations": 252, "bombs": 40, "urls": 30, "names": 60, "types": 60, "files": 50, "models": 10}

opened: list[str] = []  # paths that hold the word secret


def _watch(event: str, arguments: tuple) -> None:
    if event == "open" and "secret" in str(arguments[0]):
        opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page with models to delete, and a picture and a text beside it that nobody uploaded."""
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(0)
    doomed = [folder / f"doomed{i}" for i in range(5)]
    for each in doomed:
        checkpoint.save(build("convnet", ["cat", "dog"], 16, {"widths": [4, 8]}), each)
    shapes.scene(4022, 64).image.save(folder / "secret.png")
    (folder / "secret.txt").write_text("secret words of the server")
    sys.addaudithook(_watch)
    page = app.build_page(Models(offered_models(ROOT, [str(each) for each in doomed])))
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield SimpleNamespace(url=page.local_url, page=page, folder=folder, doomed=doomed, photo=scene("PNG"))
    page.close()


@pytest.fixture(autouse=True)
def still_up(server: SimpleNamespace) -> Iterator[None]:
    """Whatever a test did, the page then answers as before, and nothing was opened that was not uploaded."""
    opened.clear()
    yield
    assert opened == []
    answer = endpoint(server, "predict")(photo_of(server.photo), MODEL)
    assert answer["label"] == shapes.CLASS_NAMES[shapes.scene(4003).label]


def endpoint(server: SimpleNamespace, name: str) -> Callable:
    return next(each.fn for each in server.page.fns.values() if each.api_name == name)


def scene(form: str, seed: int = 4003) -> bytes:
    buffer = io.BytesIO()
    shapes.scene(seed, 64).image.save(buffer, form)
    return buffer.getvalue()


def photo_of(content: bytes) -> object:
    """What the page makes of a data: URL."""
    return path_of(Sent({"url": "data:image/png;base64," + base64.b64encode(content).decode()}))


def what_is_said(ask: Callable, *arguments: object) -> str:
    """Nothing if there was an answer, else the sentence. Any other exception is the page's fault."""
    try:
        ask(*arguments)
    except gr.Error as error:
        said = str(error.message)
    except (ValueError, OSError) as error:
        said = sentence_of(error)  # as Page says it to a visitor or a program
    else:
        return ""
    assert_sentence(said)
    return said


def assert_sentence(text: str) -> None:
    assert text.isprintable(), text
    assert text.endswith("."), text
    assert 10 < len(text) < 700, text
    assert "Traceback" not in text


# --- pictures ---------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Cut, flipped, overwritten, doubled, or with a header of another mind."""
    damaged = bytearray(content)
    at, length = rng.randrange(len(damaged)), rng.randrange(1, 64)
    match rng.randrange(7):
        case 0:
            return bytes(damaged[:at])
        case 1:
            for _ in range(rng.randrange(1, 9)):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        case 2:
            damaged[at : at + length] = rng.randbytes(length)
        case 3:
            damaged[at:at] = damaged[at : at + length]
        case 4:
            del damaged[at : at + length]
        case 5:
            for _ in range(3):
                damaged[rng.randrange(min(96, len(damaged)))] = rng.choice((0, 1, 127, 128, 255))
        case 6:
            damaged[:length] = scene(rng.choice(FORMATS))[:length]
    return bytes(damaged)


@pytest.mark.parametrize("form", FORMATS)
def test_mutated_pictures(server: SimpleNamespace, form: str) -> None:
    predict, whole = endpoint(server, "predict"), scene(form)
    said = [
        what_is_said(predict, photo_of(mutated(random.Random(f"{form} {seed}"), whole)), MODEL)
        for seed in range(MUTATIONS)
    ]
    assert any(said)
    assert MUTATIONS * len(FORMATS) == SHARES["mutations"]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes = b"", extra: bytes = b"", depth: int = 1) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def patched(form: str, mark: bytes, skip: int, values: bytes) -> bytes:
    """A picture with bytes of its header overwritten, `skip` after a mark."""
    content = bytearray(scene(form))
    at = content.find(mark) + skip
    content[at : at + len(values)] = values
    return bytes(content)


def bombs() -> list[bytes]:
    """Headers that promise gigabytes, small files that unpack to much, loops, and what is no picture at all."""
    zeros = zlib.compress(bytes(50 * 2**20), 9)
    large, huge = struct.pack(">HH", 65535, 65535), struct.pack(">II", 2**31 - 1, 2**31 - 1)
    frames = [Image.new("P", (16, 16), i % 256) for i in range(2000)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    tiff = struct.pack("<2sHI", b"II", 42, 8)
    entry = lambda tag, kind, count, value: struct.pack("<HHII", tag, kind, count, value)  # noqa: E731
    sizes = entry(256, 4, 1, 2**31) + entry(257, 4, 1, 2**31)
    return [
        png(13000, 13000, bytes(13000 * 1626)),
        png(2**31 - 1, 2**31 - 1),
        png(0, 0),
        png(1, 10**7, bytes(2 * 10**7)),
        png(64, 64, bytes(10)),
        png(64, 64, bytes(64 * 9), chunk(b"zTXt", b"a\0\0" + zeros)),
        png(64, 64, bytes(64 * 9), chunk(b"iTXt", b"a\0\1\0\0\0" + zeros)),
        png(64, 64, bytes(64 * 9), chunk(b"iCCP", b"a\0\0" + zeros)),
        png(64, 64, bytes(64 * 9), chunk(b"eXIf", b"MM\0*" + bytes(100))),
        png(64, 64, bytes(64 * 9), b"".join(chunk(b"tEXt", b"k%d\0x" % i) for i in range(5000))),
        png(64, 64, bytes(64 * 9), struct.pack(">I", 2**31 - 1) + b"evil"),
        b"\x89PNG\r\n\x1a\n",
        patched("JPEG", b"\xff\xc0", 5, large),
        patched("JPEG", b"\xff\xc0", 5, b"\0\0\0\0"),
        patched("JPEG", b"\xff\xc0", 9, b"\xff"),
        b"\xff\xd8" + b"\xff\xfe\xff\xff" * 1000,
        patched("GIF", b"GIF", 6, large),
        animation.getvalue(),
        animation.getvalue()[:-3000],
        patched("WEBP", b"VP8 ", 14, b"\xff\x3f\xff\x3f"),
        patched("AVIF", b"ispe", 8, huge),
        patched("AVIF", b"iloc", 4, b"\xff" * 12),
        patched("HEIF", b"ispe", 8, huge),
        patched("HEIF", b"iloc", 4, b"\xff" * 12),
        patched("JPEG2000", b"\xff\x51", 6, huge),
        patched("JPEG2000", b"\xff\x51", 22, struct.pack(">II", 1, 1)),
        tiff + struct.pack("<H", 2) + sizes + struct.pack("<I", 0),
        tiff + struct.pack("<H", 2) + sizes + struct.pack("<I", 8),  # the next directory is this one
        tiff + struct.pack("<H", 65535) + sizes,
        struct.pack("<2sHI", b"II", 42, 2**31),
        patched("BMP", b"BM", 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
        patched("BMP", b"BM", 18, struct.pack("<ii", -5, -(2**31))),
        patched("BMP", b"BM", 28, b"\x20\x00\x03"),
        b"P6 99999 99999 255\n",
        b"P6 64 64 0\n" + bytes(64 * 64 * 3),
        b"P" + b"6" * 10**6,
        b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file",
        b"",
        bytes(10**7),
    ]


def test_bombs(server: SimpleNamespace) -> None:
    inputs, predict = bombs(), endpoint(server, "predict")
    assert len(inputs) == SHARES["bombs"]
    said = [what_is_said(predict, photo_of(each), MODEL) for each in inputs]
    assert sum(map(bool, said)) > 30  # some are only odd, and can be shown


# --- data: URLs and names ---------------------------------------------------------------------------------------------


def test_data_urls(server: SimpleNamespace) -> None:
    whole = base64.b64encode(server.photo).decode()
    good = "data:image/png;base64," + whole
    urls: list[object] = [
        "data:", "data:,", "data:;base64,", "data:image/png;base64,!", "data:image/png;base64,a", "data:text/html,<b>",
        "data:image/png," + whole[:-1], "DATA:image/png;base64," + whole, "data:image/png;base64" + whole,
        good[:-5] + "\0", good.replace("A", "\u0410"), good + "\ud800", "data:image/png;base64,data:image/png,x",
        "data:image/svg+xml;base64,PHN2Zy8+", "data:" + "x" * 10**6, "data:image/png;base64," + "A" * (60 * 2**20),
        "data:image/png;base64," + "!" * (60 * 2**20), "data:" + "," * 10**6, 7, None, [], {}, "", ["data:,"],
        "file:///etc/passwd", "http://127.0.0.1:1/a.png", "javascript:alert(1)", "blob:x", "\\\\evil\\a", "//a",
    ]  # fmt: skip
    assert len(urls) == SHARES["urls"]
    predict = endpoint(server, "predict")
    for url in urls:
        assert what_is_said(lambda url=url: predict(path_of(Sent({"url": url})), MODEL)), str(url)[:50]
    assert not what_is_said(lambda: predict(path_of(Sent({"url": good})), MODEL))


def names() -> list[str]:
    given = [
        "", " ", ".", "..", "/", "../tests", "../../etc/passwd", "/etc/passwd", str(ROOT), str(ROOT / "checkpoints"),
        str(ROOT / "checkpoints" / MODEL), "checkpoints/../checkpoints/" + MODEL, "runs/../tests", "~", "~x", "$X",
        "C:\\", "\\\\evil\\share", "file:///etc/passwd", "http://127.0.0.1/evil", "hf-hub:evil/evil", "a" * 10**5,
        "<script>alert(1)</script>", "'; DROP TABLE models; --", "{{7*7}}", "${7*7}", "%s%s%n", "\0", MODEL + "\0",
        "a\nError: b", "\x1b[2J", "\u202egnp", "\ud800", "\uffff", "con", "nul.txt", "-rf", "--help", "a/b/c", "@x",
    ]  # fmt: skip
    rng = random.Random(0)
    return given + [
        "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) for _ in range(9)) for _ in range(20)
    ]


def test_names_of_models(server: SimpleNamespace) -> None:
    assert len(names()) == SHARES["names"]
    for name in names():
        assert what_is_said(endpoint(server, "predict"), photo_of(server.photo), name), name[:50]


# --- over HTTP --------------------------------------------------------------------------------------------------------


def junk(rng: random.Random) -> object:
    """Any JSON."""
    deep: object = []
    for _ in range(rng.randrange(1, 200)):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    kinds = [
        None,
        True,
        -1,
        1e308,
        2**63,
        "",
        "x" * 10**5,
        [],
        {},
        [None],
        {"path": None},
        {"url": 1},
        file,
        [file],
        deep,
    ]
    return rng.choice([*kinds, "\0\ud7ff", {"__class__": "x"}, {"value": {"path": "x"}}, {"orig_name": ["x"]}])


def completed(server: SimpleNamespace, calls: list[tuple[int, list]]) -> list[dict]:
    """What the queue answers to calls of any function by its number, as a browser would send them."""
    session = "s" + str(random.random())
    for number, values in calls:
        sent = {"fn_index": number, "data": values, "session_hash": session}
        joined = httpx.post(f"{server.url}gradio_api/queue/join", json=sent)
        assert joined.status_code == 200, joined.text[:200]
    found: list[dict] = []
    with httpx.stream(
        "GET", f"{server.url}gradio_api/queue/data", params={"session_hash": session}, timeout=60
    ) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                found.append(message)
                if len(found) == len(calls):
                    break
    return found


def test_calls_of_wrong_types(server: SimpleNamespace) -> None:
    """Every function of the page and its API, also those that only the page's own script calls."""
    rng = random.Random(1)
    functions = [(number, len(each.inputs)) for number, each in server.page.fns.items() if each.inputs]
    calls = [(functions[i % len(functions)]) for i in range(SHARES["types"])]
    calls = [(number, [junk(rng) for _ in range(count + rng.choice((0, 0, 0, -1, 1)))]) for number, count in calls]
    answers = completed(server, calls)
    assert len(answers) == SHARES["types"]
    for answer in answers:
        text = str(answer["output"].get("error", ""))
        assert answer["success"] or text
        assert "Traceback" not in json.dumps(answer)
        assert "site-packages" not in text
        assert "object has no attribute" not in text


def test_no_file_of_the_server_can_be_read(server: SimpleNamespace) -> None:
    picture, words = server.folder / "secret.png", server.folder / "secret.txt"
    inputs = 0
    ways = [
        "gradio_api/file={}",
        "gradio_api/file/{}",
        "file={}",
        "file/{}",
        "static/{}",
        "assets/{}",
        "gradio_api/stream/{}",
    ]
    ways += ["gradio_api/proxy={}", "gradio_api/file=..%2f..{}", "gradio_api/file=file:///{}"]
    for way, path in product(ways, [words, ROOT / "app.py", "/etc/passwd"]):
        given = httpx.get(server.url + way.format(path), follow_redirects=True)
        assert given.status_code != 200 or "html" in given.headers["content-type"], way
        assert not any(text in given.text for text in ("secret words", "import gradio", "root:"))
        inputs += 1
    mark = {"meta": {"_type": "gradio.FileData"}}
    inside = Path(get_upload_folder())
    paths = [str(picture), f"{inside}/../{picture}", f"{inside}/../../../..{picture}", f"file://{picture}", str(words)]
    sent = [{"path": path} | more for path in paths for more in ({}, mark, {"url": f"/gradio_api/file={path}"})]
    sent += [str(picture), [{"path": str(picture)}], {"value": {"path": str(picture)} | mark}, {"url": str(picture)}]
    sent += [{"path": str(picture), "url": "data:"}]
    predict = next(number for number, each in server.page.fns.items() if each.api_name == "predict")
    for answer in completed(server, [(predict, [each, MODEL]) for each in sent]):
        assert not answer["success"]
        assert answer["output"]["error"]
        inputs += 1
    assert inputs == SHARES["files"]


# --- models that vanish -----------------------------------------------------------------------------------------------


def test_models_deleted_underneath(server: SimpleNamespace) -> None:
    """Before and after they were first used, whole and by halves, and under several visitors at once."""
    loaded, gone, cut, garbled, link = server.doomed
    predict, photo = endpoint(server, "predict"), photo_of
    assert not what_is_said(predict, photo(server.photo), str(loaded))
    for folder in (loaded, gone):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:999])
    (garbled / "config.json").write_bytes(b"\xff{")
    (link / "config.json").unlink()
    (link / "config.json").symlink_to(server.folder / "secret.txt")
    said = [what_is_said(predict, photo(server.photo), str(folder)) for folder in server.doomed]
    assert all(said[1:])
    assert len(set(said[1:])) == 4  # each says what is wrong
    crowd = [
        threading.Thread(target=lambda: said.append(what_is_said(predict, photo(server.photo), str(gone))))
        for _ in range(4)
    ]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert said[5:] == [said[1]] * 4
    assert len(said) + 1 == SHARES["models"]


def test_there_are_five_hundred() -> None:
    assert sum(SHARES.values()) >= 500
