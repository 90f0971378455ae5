"""model.onnx: onnxruntime, here and in a browser, gives what torch gives; and it never outlives its weights."""

import hashlib
import io
import os
import shutil
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
from playwright.sync_api import sync_playwright
from runs import here, last_words

from cvlab import checkpoint
from cvlab.checkpoint import onnx
from cvlab.data import shapes
from cvlab.explain import class_score, explain, predict
from cvlab.models import build
from cvlab.models.convnet import ConvNet
from cvlab.models.model import Normalize
from cvlab.transforms import view

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from conformance import as_trained

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WEB = "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.22.0.tgz"
SHA256 = "e293551f9d36d003e293d0f2937fee7b3dfdcef76d71d1449b55e2d4157c7aea"
SIDE = 64
NETWORKS = {  # network: its arguments, and whether its logits are a linear layer on the mean of a map
    "convnet": ({"widths": [4, 8], "dropout": 0.5}, True),
    "unet": ({"width": 4, "depth": 2}, False),
    "test_efficientnet": ({}, True),  # the map is not that of a stage
    "test_vit": ({}, False),  # its stages are tokens
}


def made(network, arguments):
    torch.manual_seed(0)
    of_timm = network.startswith("test_")
    arguments = {"architecture": network} if of_timm else arguments
    return as_trained(
        build("timm" if of_timm else network, ["cat", "dog", "fox"], SIDE, arguments, mean=(0.4, 0.5, 0.6))
    )


def outputs(path, images):
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()})), strict=True))


def activations(model, images):
    """By hand: what the modules of the stages return, as maps."""
    seen, handles = {}, []
    for name, stage in model.stages.items():
        keep = partial(lambda name, to_map, m, i, output: seen.update({name: to_map(output)}), name, stage.to_map)
        handles.append(stage.module.register_forward_hook(keep))
    predict(model, images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(scope="module", params=NETWORKS)
def written(request, tmp_path_factory):
    """The network's name, the model, and its model.onnx."""
    model = made(request.param, NETWORKS[request.param][0])
    return request.param, model, onnx.write(model, tmp_path_factory.mktemp("onnx"))


@pytest.mark.parametrize("count", [1, 3])
def test_onnxruntime_gives_what_torch_gives(written, count):
    network, model, path = written
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))
    found, expected = outputs(path, images), {"logits": predict(model, images), **activations(model, images)}
    assert list(found) == [*expected, *(["class_map"] if NETWORKS[network][1] else [])]
    for name, ours in expected.items():
        assert found[name].shape == ours.shape
        assert (found[name] - ours).abs().max() < 1e-4 * max(1, ours.abs().max()), name
    assert (found["logits"] - expected["logits"]).abs().max() < 1e-4


def test_the_means_of_the_class_map_and_the_bias_are_the_logits(written):
    network, model, path = written
    found = outputs(path, torch.rand(3, 3, SIDE, SIDE))
    if NETWORKS[network][1]:
        bias = [module.bias for module in model.modules() if isinstance(module, torch.nn.Linear)][-1].detach()
        assert (found["class_map"].mean((2, 3)) + bias - found["logits"]).abs().max() < 1e-4


def test_the_class_map_is_hires_cam_without_a_gradient():
    model, images = made("convnet", {"widths": [4, 8]}), torch.rand(2, 3, SIDE, SIDE)
    maps = explain(model, images, class_score(1), ["stage2"], ["hires_cam"]).maps["hires_cam"]["stage2"]
    with torch.no_grad():
        class_map = onnx.WithMaps(model)(images)["class_map"]
    assert class_map.shape == (2, 3, 16, 16)
    assert torch.allclose(class_map[:, 1:2], 256 * maps, atol=1e-5)


def test_writing_leaves_the_model_as_it_was(written):
    network, model, path = written
    assert not any(module._forward_hooks for module in model.modules())
    images = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(predict(model, images), predict(made(network, NETWORKS[network][0]), images))
    assert [each.name for each in path.parent.iterdir()] == ["model.onnx"]


class Noisy(ConvNet):
    def forward(self, images):
        return super().forward(images + torch.rand_like(images))


class Undecided(ConvNet):
    def forward(self, images):
        logits = super().forward(images)
        return logits if logits.sum() > 0 else -logits


@pytest.mark.parametrize(("network", "reason"), [(Noisy, "is not that of torch"), (Undecided, "cannot be exported")])
def test_an_export_that_fails_leaves_no_file(network, reason, tmp_path):
    model = network(3, widths=[4]).eval()
    model.normalize, model.image_size = Normalize((0.5,) * 3, (0.25,) * 3), 16
    with pytest.raises(ValueError, match=reason):
        onnx.write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_too_large_is_said(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "MAX_WEIGHTS_BYTES", 1000)
    with pytest.raises(ValueError, match="1,000"):
        onnx.write(classifier, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="onnxscript is missing: pip install"):
        onnx.write(classifier, tmp_path)
    assert not list(tmp_path.iterdir())


def test_new_weights_take_the_old_model_onnx_away(classifier, tmp_path):
    (tmp_path / "model.onnx").write_text("of other weights")
    assert "model.onnx" in last_words("classifier", "--out", tmp_path, "--epochs", 1)  # a training does not begin
    checkpoint.save(classifier, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


# --- a shipped model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The small classifier with its model.onnx, by the command."""
    folder = tmp_path_factory.mktemp("shipped") / "shapes-classifier"
    shutil.copytree(ROOT / "checkpoints" / "shapes-classifier", folder)
    here("publish", folder, "--onnx")
    return folder


@pytest.fixture
def scenes(shipped):
    model = checkpoint.load(shipped)
    return torch.cat([view(shapes.scene(seed, 256).image, model) for seed in (4003, 4004)])


def test_the_command_writes_it_and_sends_nothing(shipped, scenes):
    found = outputs(shipped / "model.onnx", scenes)
    assert (found["logits"] - predict(checkpoint.load(shipped), scenes)).abs().max() < 1e-4
    assert found["class_map"].shape == (2, 5, 4, 4)
    assert last_words("publish", shipped) == "2"  # neither a name nor --onnx


def test_a_browser_gives_the_same_logits(shipped, scenes, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it (apt-get install chromium)")
    try:
        package = httpx.get(WEB, timeout=10).raise_for_status().content
    except httpx.HTTPError as error:
        pytest.skip(f"onnxruntime-web cannot be had from the npm registry: {error!r}")
    assert hashlib.sha256(package).hexdigest() == SHA256
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
            (tmp_path / name).write_bytes(archive.extractfile(f"package/dist/{name}").read())
    (tmp_path / "index.html").write_text("<script src=ort.wasm.min.js></script>")
    shutil.copy(shipped / "model.onnx", tmp_path)
    script = """async ([shape, numbers]) => {
        ort.env.wasm.numThreads = 1
        const session = await ort.InferenceSession.create("model.onnx")
        const found = await session.run({images: new ort.Tensor("float32", Float32Array.from(numbers), shape)})
        return Object.fromEntries(Object.entries(found).map(([name, each]) => [name, [...each.data]]))
    }"""
    os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", "0")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        found = page.evaluate(script, [list(scenes.shape), scenes.flatten().tolist()])
        browser.close()
        server.shutdown()
    expected = outputs(shipped / "model.onnx", scenes)
    assert found.keys() == expected.keys()
    for name, ours in expected.items():
        assert np.abs(np.array(found[name]) - ours.flatten().numpy()).max() < 1e-4, name
    logits = predict(checkpoint.load(shipped), scenes)
    assert np.abs(np.array(found["logits"]) - logits.flatten().numpy()).max() < 1e-4
