"""Changes of a part of a photo, and what becomes of the answer; in a browser they are tried in test_app.py."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.explain import peak
from cvlab.models import Model
from cvlab.page.breaking import change, heat_in, history, inside
from cvlab.page.changes import changed, chosen
from cvlab.page.live import answer_to_frame, look_live
from cvlab.page.question import Question
from cvlab.page.visit import Visits
from cvlab.transforms import WHOLE, open_image

PART = "250,500 500,750"  # a quarter of both sides


def noise(seed: int = 0, size: tuple[int, int] = (60, 80)) -> Image.Image:
    """A photo of random pixels, (height, width)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("tool", ["Erase", "Darken", "Blur", "Turn", "Recolour", "Cut", "Paste"])
def test_a_change_leaves_everything_but_its_part(tool: str) -> None:
    photo = noise()
    before, after = np.array(photo), np.array(changed(photo, tool, PART, noise(1)))
    rows, columns = slice(30, 45), slice(20, 40)
    differs = (before != after).any(2)
    assert differs[rows, columns].mean() > 0.9
    differs[rows, columns] = False
    assert not differs.any()
    assert np.array_equal(np.array(photo), before)  # the photo itself stays for Undo


def test_what_the_tools_do_has_known_answers() -> None:
    photo = noise()
    before = np.array(photo)[30:45, 20:40]
    turned, recoloured, pasted = (
        np.array(changed(photo, tool, PART, Image.new("RGB", (3, 3), (1, 2, 3))))[30:45, 20:40]
        for tool in ("Turn", "Recolour", "Paste")
    )
    assert np.array_equal(turned, before[::-1, ::-1])
    assert np.array_equal(recoloured, before[..., [1, 2, 0]])
    assert (pasted == (1, 2, 3)).all()
    plain = Image.new("RGB", (80, 60), (10, 200, 30))
    plain.paste((255, 0, 0), (20, 30, 40, 45))
    # Of the colours around only one is there.
    assert np.abs(np.array(changed(plain, "Erase", PART)).astype(int) - (10, 200, 30)).max() <= 1


def test_a_drag_is_a_part_and_a_click_a_square_inside_the_photo() -> None:
    assert chosen([[700, 800], [100, 200]], 25) == "700,800 100,200"
    assert chosen([[500, 500], [501, 500]], 20) == "401,400 601,600"
    assert chosen([[0, 999]], 20) == "0,800 200,1000"


def test_the_heat_in_a_part_is_its_share_of_the_evidence() -> None:
    class Seen:
        attribution = torch.ones(1, 1, 4, 4)
        read_at, box = None, (0.5, 0.0, 0.5, 1.0)  # the model saw the right half of the photo

    seen = Seen()
    assert heat_in(seen, "0,0 500,1000") == 0
    assert heat_in(seen, "750,0 1000,1000") == pytest.approx(0.5)
    seen.attribution = -seen.attribution  # evidence against it is none for it
    assert heat_in(seen, "750,0 1000,1000") == 0
    assert inside("0,0 500,500", WHOLE).float().mean() == pytest.approx(0.25)
    assert inside("700,300 900,300", WHOLE).any()  # a line is a part too


@pytest.fixture
def visits(classifier: Model) -> Visits:
    return Visits({"tiny": classifier})


def test_the_history_tells_each_change_and_what_came_of_it(visits: Visits, tmp_path: Path) -> None:
    def save(picture: Image.Image) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        picture.save(path)
        return str(path)

    photo, trail = save(noise()), []
    for tool in ("Erase", "Darken"):
        found = change(tool, PART, None, trail, photo, save)
        photo, trail = found["photo"], found["trail"]
    answer = visits.ask(photo, "tiny", Question())
    told = re.sub("<.*?>", " ", history(answer, trail))
    shares = [visits.ask(step["photo"], "tiny", Question()).prediction.shares for step in trail]
    name = max(shares[0], key=shares[0].get)
    first, second, third = (f"{each[name]:.0%}" for each in shares)
    assert re.search(f"Darkened .* {second} to {third}", told)
    assert re.search(f"Erased .* {first} to {second}", told)
    assert re.search(f"{name} *{first} *{third}", told)
    undone = change("Undo", "", None, trail, photo, save)
    assert (undone["photo"], undone["trail"]) == (trail[1]["photo"], trail[:2])
    assert change("Start again", "", None, trail, photo, save)["photo"] == trail[0]["photo"]
    elsewhere = save(noise(2))  # the history of one photo is not that of another
    assert len(change("Erase", PART, None, trail, elsewhere, save)["trail"]) == 2


def test_cut_and_paste_move_a_part_also_to_another_photo(tmp_path: Path) -> None:
    def save(picture: Image.Image) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        picture.save(path)
        return str(path)

    photo, other = save(noise()), save(Image.new("RGB", (80, 60)))
    clipboard = change("Cut", PART, None, [], photo, save)["clipboard"]
    found = change("Paste", "0,0 250,250", clipboard, [], other, save)
    part = np.array(open_image(photo))[30:45, 20:40]
    assert np.array_equal(np.array(open_image(found["photo"]))[:15, :20], part)


@pytest.mark.parametrize(
    ("tool", "part", "photo", "reason"),
    [
        ("Erase", "", "photo", "Choose a part"),
        ("Paste", PART, "photo", "Copy or cut a part"),
        ("Undo", PART, "photo", "Nothing was changed"),
        ("Erase", PART, None, "Drop a photo"),
    ],
)
def test_what_cannot_be_done_says_what_to_do(
    tool: str, part: str, photo: str | None, reason: str, tmp_path: Path
) -> None:
    noise().save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=reason):
        change(tool, part, None, [], photo and str(tmp_path / "photo.png"), str)


def test_the_maps_of_a_camera_have_one_scale(visits: Visits) -> None:
    """The strongest frame so far has the full colours; one with half its peak has half of them."""

    def frame(image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    def top_level(drawn: str) -> int:
        content = re.search('class="heat" src="data:image/png;base64,([^"]*)', drawn)[1]
        return int(np.array(Image.open(io.BytesIO(base64.b64decode(content)))).max())

    answer = answer_to_frame(visits, "tiny", frame(noise()))
    own = peak(answer.attribution).item()
    assert own > 0
    first = look_live(answer, "")
    scale = re.search('data-scale="([^"]*)"', first)[1]
    assert float(scale.split()[0]) == pytest.approx(own, rel=1e-4)
    assert top_level(first) == top_level(look_live(answer, "1e9 of another")) == 255
    assert top_level(look_live(answer, f"{2 * own} of tiny")) == 128
    with pytest.raises(ValueError, match="too large"):
        answer_to_frame(visits, "tiny", "data:," + "A" * 3 * 2**20)
