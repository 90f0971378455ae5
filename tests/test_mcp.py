"""The endpoints as tools of an assistant, asked by the true client of MCP, and llms.txt."""

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from mcp.types import CallToolResult
from PIL import Image

import app
from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import predict
from cvlab.models import probabilities
from cvlab.page.models import Models, offered_models
from cvlab.transforms import open_image, view

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    page = app.build_page(Models(offered_models(ROOT, [])))
    app.launch(page, prevent_thread_lock=True, quiet=True, mcp_server=True)
    yield page.local_url
    page.close()


def photo() -> bytes:
    buffer = io.BytesIO()
    shapes.scene(4019, 96).image.save(buffer, "PNG")
    return buffer.getvalue()


def called(url: str, *calls: tuple[str, dict]) -> list[CallToolResult]:
    """What the tools answer, one after the other."""
    image = "data:image/png;base64," + base64.b64encode(photo()).decode()

    async def ignore(*progress: object) -> None:
        """Gradio takes answers apart into pictures and numbers for those who want to be told the progress."""

    async def call() -> list[CallToolResult]:
        async with (
            streamablehttp_client(f"{url}gradio_api/mcp/") as (reading, writing, _),
            ClientSession(reading, writing) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            assert set(tools) == {"predict", "grad_cam", "stages", "judge"}
            for tool in tools.values():
                described = tool.inputSchema["properties"]
                assert all(each["description"] for each in described.values())
                assert {"image", "model"} <= set(described)
            return [
                await session.call_tool(name, {"image": image} | given, progress_callback=ignore)
                for name, given in calls
            ]

    return asyncio.run(call())


def test_tools_give_the_answers_of_the_library_as_pictures_and_numbers(url: str) -> None:
    predicted, mapped, judged, staged, refused = called(
        url,
        ("predict", {"model": "shapes-classifier"}),
        ("grad_cam", {"model": "shapes-classifier", "class_name": "star", "stage": "stage3"}),
        ("judge", {"model": "shapes-classifier"}),
        ("stages", {"model": "shapes-segmenter"}),
        ("predict", {"model": "no such model"}),
    )
    model = checkpoint.load(ROOT / "checkpoints/shapes-classifier")
    probs = probabilities(model, predict(model, view(open_image(io.BytesIO(photo())), model)))[0]
    told = predicted.content[0].text
    assert f"'label': '{model.class_names[probs.argmax()]}'" in told
    pictures = [Image.open(io.BytesIO(base64.b64decode(c.data))) for c in mapped.content if c.type == "image"]
    assert len(pictures) == 3
    assert len({picture.size for picture in pictures}) == 1
    assert float(mapped.content[-1].text) > 0
    assert judged.content[0].text in ("believable", "doubtful", "not believable")
    assert any(content.type == "image" for content in staged.content)
    assert refused.isError
    assert "no such model" in refused.content[0].text


def test_what_assistants_read_names_every_endpoint(url: str) -> None:
    text = httpx.get(f"{url}llms.txt").text
    described = httpx.get(f"{url}gradio_api/info").json()["named_endpoints"]
    for name, endpoint in described.items():
        parameters = ", ".join(each["parameter_name"] for each in endpoint["parameters"])
        assert f"`{name}({parameters})`" in text
