"""`examples/serve.py`: right answers, refusals, bounds, a graceful stop."""

from __future__ import annotations

import importlib.util
import io
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import sparsiattn
from tests.support import ROOT

pytest.importorskip("fastapi", reason="needs sparsiattn[serve]")
httpx = pytest.importorskip("httpx")

SCRIPT = ROOT / "examples" / "serve.py"
SPEC = importlib.util.spec_from_file_location("serve", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
serve = importlib.util.module_from_spec(SPEC)
sys.modules["serve"] = serve
SPEC.loader.exec_module(serve)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the test client


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def model() -> Iterator[nn.Module]:
    made = timm.create_model("test_vit", num_classes=11).eval()
    with sparsiattn.patch(made, "token_drop", keep=0.5):
        yield made


def client(model: nn.Module, run: Any = None, **limits: Any) -> Any:
    from fastapi.testclient import TestClient

    app = serve.make_app(model, serve.Limits(**limits), run or model)
    return TestClient(app, raise_server_exceptions=False)


def expected(model: nn.Module, data: bytes) -> tuple[list[int], list[float]]:
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    image = transform(Image.open(io.BytesIO(data)).convert("RGB"))
    with torch.inference_mode():
        best = model(image[None])[0].softmax(-1).topk(5)
    return best.indices.tolist(), best.values.tolist()


def test_every_caller_gets_the_answer_to_its_own_image(model: nn.Module) -> None:
    pictures = [picture(seed) for seed in range(12)]
    with client(model, batch=4, wait=0.05) as service, ThreadPoolExecutor(6) as callers:
        answers = list(
            callers.map(lambda data: service.post("/predict", content=data).json(), pictures)
        )
        metrics = service.get("/metrics").text
    for data, answer in zip(pictures, answers, strict=True):
        classes, shares = expected(model, data)
        assert [one["class"] for one in answer["classes"]] == classes
        assert [one["p"] for one in answer["classes"]] == pytest.approx(shares, rel=1e-4)
    assert 'serve_requests_total{status="200"} 12' in metrics
    assert "serve_images_total 12" in metrics


@pytest.mark.parametrize(
    ("content", "limits", "status"),
    [
        (b"not an image", {}, 400),
        (b"", {}, 400),
        (picture(0)[:200], {}, 400),
        (picture(0), {"bytes": 100}, 413),
        (picture(0, (200, 100)), {"pixels": 10_000}, 413),
    ],
)
def test_what_does_not_fit_is_refused(
    model: nn.Module, content: bytes, limits: dict[str, int], status: int
) -> None:
    with client(model, **limits) as service:
        answer = service.post("/predict", content=content)
        assert answer.status_code == status
        assert answer.json()["detail"]
        assert service.post("/predict", content=picture(1, (8, 8))).status_code in (200, 413)


def test_a_full_queue_and_a_slow_model_are_said(model: nn.Module) -> None:
    going, free = threading.Event(), threading.Event()

    def slow(images: Tensor) -> Tensor:
        going.set()
        free.wait(20)
        out: Tensor = model(images)
        return out

    def post(_: int) -> int:
        status: int = service.post("/predict", content=picture(0)).status_code
        return status

    with client(model, slow, batch=1, queue=1, seconds=1.5) as service:
        with ThreadPoolExecutor(6) as callers:
            first = callers.submit(post, 0)
            assert going.wait(20)
            codes = list(callers.map(post, range(4)))
            assert 503 in codes  # one waits, the others are turned away
            assert 504 in [*codes, first.result()]
            free.set()
        again = iter(lambda: post(0), 200)  # those that gave up still stand in the queue
        assert sum(1 for _ in zip(range(100), again, strict=False)) < 100
        assert service.get("/health").json()["patch"]["name"] == "token_drop"


def test_a_model_that_raises_answers_500_and_goes_on(model: nn.Module) -> None:
    fails = [True]

    def run(images: Tensor) -> Tensor:
        if fails.pop() if fails else False:
            raise RuntimeError("on purpose")
        out: Tensor = model(images)
        return out

    with client(model, run) as service:
        assert service.post("/predict", content=picture(0)).status_code == 500
        assert service.post("/predict", content=picture(0)).status_code == 200


@pytest.mark.slow
def test_the_program_serves_and_stops_when_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "--model", "test_vit", "--keep", "0.5"]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL) as program:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        with ThreadPoolExecutor(8) as callers:
            running = [
                callers.submit(httpx.post, f"{address}/predict", content=picture(i), timeout=30)
                for i in range(24)
            ]
            assert running[0].result().status_code == 200
            program.send_signal(signal.SIGTERM)
            codes = []
            for one in running:
                try:
                    codes.append(one.result().status_code)
                except httpx.TransportError:
                    codes.append(0)  # came after the door was closed
        assert program.wait(40) in (0, -signal.SIGTERM)
    assert set(codes) <= {0, 200, 503}
