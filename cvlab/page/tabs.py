"""What stands in each tab of the page, by a photo, a model and a question: HTML, or a sentence why there is none."""

import html
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

from cvlab.explain import METHODS, default_stage
from cvlab.explain.many import compared_stages
from cvlab.files import write_bytes
from cvlab.page import panels
from cvlab.page.desk import Desk, Photo, as_usual
from cvlab.page.figures import code_block, paragraph
from cvlab.page.many import Explained, explain_many, to_csv, write_zip
from cvlab.page.question import COLORMAPS, Question, picked, to_query
from cvlab.page.record import record_panel
from cvlab.page.snippet import as_python
from cvlab.page.unzip import list_pictures

ROWS = {"no.": 60, "file": 180, "prediction": 130, "share": 90, "peak": 90, "what to know": 260}  # pixels wide
METHOD_CHOICES = [(name + (" (slow)" if key not in METHODS else ""), key) for key, name in panels.METHOD_NAMES.items()]
REGION_CHOICES = [
    ("the whole mask", "mask"),
    ("the part of the mask that I click", "part"),
    ("the pixel that I click", "pixel"),
    ("a box", "box"),
    ("a brush stroke", "stroke"),
    ("what was wrongly found (needs the true mask)", "false positives"),
    ("what was missed (needs the true mask)", "false negatives"),
]
COLORMAP_CHOICES = [(f"{name} (as in older reports)" if name == "jet" else name, name) for name in COLORMAPS]
CHOOSE_TWO = "Choose a second model, a second picture, or both."
REDRAWN = ("grad_cam", "picker", "stages", "ways", "errors", "link", "code", "believe")
Progress = Callable[[float], None]


def explained(
    desk: Desk,
    photo: Photo | None,
    name: str,
    mask: Photo | None,
    question: Question,
    progress: Progress | None = None,
) -> dict[str, str]:
    """The answer to a question by the names of REDRAWN; nothing of the check by hiding, which is asked for apart.

    Args:
        photo, mask: as they were uploaded; the mask is the true one.
        name: of the model.
        progress: told the share that is done, of a slow method.
    """
    shown = dict.fromkeys(REDRAWN, "")
    try:
        model, seen = desk.seen(photo, name)
        question = as_usual(question, model)
        href = html.escape(to_query(name, question))
        shown["link"] = f'<a href="{href}">Link to this model and these settings</a> (without the photo)'
        if model.task == "segmentation" and mask is not None:
            true = desk.true_mask(photo, name, question, mask)
            answer = partial(desk.evidence, photo, name, mask=mask)
            shown["errors"] = panels.errors_panel(seen, model, question, true, answer)
        shown["code"] = code_block(as_python(desk.models.public_name(name), file_name(photo), model, question))
        evidence = desk.evidence(photo, name, question, mask, progress)
        usual = Question(stage=question.stage) if model.task == "classification" else None
        held = desk.evidence(photo, name, usual) if question.common_scale and usual else None
        shown["grad_cam"] = panels.why_panel(seen, model, evidence, question, held)
        if model.task == "segmentation":
            shown["picker"] = panels.region_picker(seen, model, question, evidence.region)
    except (ValueError, OSError) as error:
        shown["grad_cam"] = paragraph(sentence_of(error))
        shown["picker"] = unpicked(desk, photo, name, question)
    return shown | stages(desk, photo, name, mask, question)


def unpicked(desk: Desk, photo: Photo | None, name: str, question: Question) -> str:
    """The picture in which another region can be chosen, where that of the question cannot be explained."""
    try:
        model, seen = desk.seen(photo, name)
        return panels.region_picker(seen, model, question, None) if model.task == "segmentation" else ""
    except (ValueError, OSError):
        return ""


def stages(desk: Desk, photo: Photo | None, name: str, mask: Photo | None, question: Question) -> dict[str, str]:
    """The stages of a segmenter and, once they are worked out, how they depend on the region and what they added."""
    try:
        model, seen = desk.seen(photo, name)
        if model.task == "classification":
            return {"stages": paragraph(panels.CLASSIFIER), "ways": ""}
        question = as_usual(question, model)
        evidence = desk.evidence(photo, name, question, mask)
        known = desk.known_ways(evidence)
        drawn = panels.stages_panel(seen, model, evidence, question, known)
        return {"stages": drawn, "ways": panels.ways_panel(evidence, known) if known else ""}
    except (ValueError, OSError) as error:
        return {"stages": paragraph(sentence_of(error)), "ways": ""}


def work_out(desk: Desk, photo: Photo | None, name: str, mask: Photo | None, question: Question) -> None:
    """What `stages` shows besides the maps and takes more passes; why there is none is said beside the maps."""
    try:
        model, seen = desk.seen(photo, name)
        if model.task == "segmentation" and question.method in METHODS:
            question = as_usual(question, model)
            desk.ways(desk.evidence(photo, name, question, mask), seen, model, question.against)
    except (ValueError, OSError):
        pass


def chosen(desk: Desk, photo: Photo | None, name: str, question: Question, points: list) -> Question:
    """The question after a click or a drag in the picture; the same one where nothing can be asked."""
    try:
        model, seen = desk.seen(photo, name)
        return picked(question, model, seen.logits, points)
    except (ValueError, OSError):
        return question


def believe(desk: Desk, photo: Photo | None, name: str, mask: Photo | None, question: Question) -> str:
    """The check by hiding the hottest tenth."""
    try:
        model, seen = desk.seen(photo, name)
        return panels.believe_panel(seen, model, desk.evidence(photo, name, question, mask), question)
    except (ValueError, OSError) as error:
        return paragraph(sentence_of(error))


def compared(
    desk: Desk, photo: Photo | None, name: str, question: Question, other: str, other_photo: Photo | None
) -> str:
    """Two models on one picture, two pictures under one model, or both."""
    if not other and other_photo is None:
        return paragraph(CHOOSE_TWO)
    method = question.method if question.method in METHODS else "grad_cam"
    question = replace(question, method=method, region="mask", points="", rather_than="", threshold=0.0)
    try:
        first, seen = desk.seen(photo, name)
        second, other_seen = desk.seen(other_photo or photo, other or name)
        if first.task != second.task:
            raise ValueError("A classifier and a segmenter are asked different questions: compare like with like.")
        evidence = desk.evidence(photo, name, question)
        stage = compared_stages(first, second, [question.stage or default_stage(first)])[1]
        asked = replace(question, stage=stage)
        if first is second:  # the same class, so that the peaks can be compared
            asked = replace(asked, class_name=first.class_names[evidence.class_idx])
        elif asked.class_name not in second.class_names:
            asked = replace(asked, class_name="")
        theirs = desk.evidence(other_photo or photo, other or name, asked)
        titles = (name, other) if other and other != name else ("First picture", "Second picture")
        return panels.compare_panel(
            [(titles[0], seen, first, evidence, question), (titles[1], other_seen, second, theirs, asked)]
        )
    except (ValueError, OSError) as error:
        return paragraph(sentence_of(error))


def many(
    desk: Desk,
    files: list[str] | None,
    name: str,
    stage: str,
    method: str,
    progress: Callable[[tuple[int, int]], object],
    folder: Path,
) -> tuple[str, list[list] | None, str | None, str | None]:
    """Gallery and table of many pictures, and the paths of a CSV and a zip of maps, which are written to a folder."""
    try:
        if not files:
            raise ValueError("Choose pictures, or a zip of pictures.")
        model = desk.models[name]
        stage = stage if stage in model.stages else default_stage(model)
        method = method if method in METHODS else "grad_cam"
        shown: list[Explained] = []

        def noted(explained: Iterator[Explained]) -> Iterator[Explained]:
            for each in explained:
                if each.attribution is not None and len(shown) < panels.MOST_SHOWN:
                    shown.append(each)
                yield each

        pictures = list_pictures(files)
        explained = explain_many(model, pictures, stage, method, lambda done, of: progress((done, of)))
        folder.mkdir(parents=True)
        rows = write_zip(folder / "maps.zip", model, noted(explained), stage, method, desk.models.public_name(name))
        write_bytes(folder / "table.csv", to_csv(rows).encode("utf-8-sig"))
    except (ValueError, OSError) as error:
        return paragraph(sentence_of(error)), None, None, None
    cells = [[round(cell, 4) if isinstance(cell, float) else cell for cell in astuple(row)] for row in rows]
    return panels.many_panel(shown, len(rows)), cells, str(folder / "table.csv"), str(folder / "maps.zip")


def record(desk: Desk, name: str) -> str:
    """What the folder of a model tells of it."""
    try:
        desk.models[name]  # opened, so that what stands in its folder was checked
        return record_panel(desk.models.folder(name))
    except (ValueError, OSError) as error:
        return paragraph(sentence_of(error))


def file_name(photo: Photo | None) -> str:
    """Of a photo, for the code."""
    return Path(photo).name if isinstance(photo, str) else "photo.png"


def sentence_of(error: Exception) -> str:
    """An error of the library as a sentence of the page."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
