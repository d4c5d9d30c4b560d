"""Serve a patched timm model over HTTP, with micro-batches and limits on all resources.

    pip install "sparsiattn[serve]"
    python examples/serve.py --model deit_small_patch16_224 --pretrained --keep 0.7
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

``POST /predict`` takes the bytes of an image and returns its five best classes; ``GET /health``
returns whether requests are accepted; ``GET /metrics`` is for Prometheus. Requests that arrive
together are computed in one batch. Batches have a fixed size, so that one compiled graph is enough.
Errors: 413 for too many bytes or pixels, 400 for data that is not an image, 503 if the queue is
full, 504 for requests that waited too long. After SIGTERM, new requests are refused and accepted
ones are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from torch import Tensor, nn

import sparsiattn


@dataclass(frozen=True)
class Limits:
    """Limits of the service.

    Attributes:
        batch: Number of images in a batch.
        wait: Seconds that a request waits for others to fill a batch.
        queue: Largest number of waiting requests.
        bytes: Largest size of an image in bytes.
        pixels: Largest number of pixels of an image.
        seconds: Largest time from the arrival of a request to its answer.
    """

    batch: int = 8
    wait: float = 0.004
    queue: int = 64
    bytes: int = 8 << 20
    pixels: int = 32_000_000
    seconds: float = 10.0


@dataclass
class Metrics:
    """Counters since the start.

    Attributes:
        answers: Number of responses by status code.
        batches: Number of batches.
        images: Number of images.
        seconds: Total time of the model.
    """

    answers: Counter[int] = field(default_factory=Counter)
    batches: int = 0
    images: int = 0
    seconds: float = 0.0

    def text(self, waiting: int) -> str:
        """The metrics in Prometheus' text format."""
        lines = ["# TYPE serve_requests_total counter"]
        lines += [
            f'serve_requests_total{{status="{code}"}} {count}'
            for code, count in sorted(self.answers.items())
        ]
        for name, kind, value in (
            ("batches_total", "counter", self.batches), ("images_total", "counter", self.images),
            ("model_seconds_total", "counter", round(self.seconds, 6)),
            ("waiting", "gauge", waiting),
        ):  # fmt: skip
            lines += [f"# TYPE serve_{name} {kind}", f"serve_{name} {value}"]
        return "\n".join(lines) + "\n"


Job = tuple[Tensor, "asyncio.Future[Tensor]"]


class Batcher:
    """Collects images into batches and runs the model on them in a separate thread."""

    def __init__(self, model: Callable[[Tensor], Tensor], limits: Limits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self.queue: asyncio.Queue[Job] = asyncio.Queue(limits.queue)
        self.thread = ThreadPoolExecutor(1, "model")
        self.open = True

    async def submit(self, image: Tensor) -> Tensor:
        """Compute the logits ``[classes]`` of one image ``[C, H, W]``.

        Raises:
            asyncio.QueueFull: Too many requests are waiting.
        """
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((image, answer))
        return await answer

    async def run(self) -> None:
        """Process batches until cancelled."""
        while True:
            jobs = [await self.queue.get()]
            deadline = time.monotonic() + self.limits.wait
            while len(jobs) < self.limits.batch:
                left = deadline - time.monotonic()
                with suppress(asyncio.QueueEmpty):
                    jobs.append(self.queue.get_nowait())
                    continue
                if left <= 0:
                    break
                with suppress(asyncio.TimeoutError):
                    jobs.append(await asyncio.wait_for(self.queue.get(), left))
            await self._answer([job for job in jobs if not job[1].done()])
            for _ in jobs:
                self.queue.task_done()

    async def _answer(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        images = torch.stack([image for image, _ in jobs])
        start = time.perf_counter()
        try:
            loop = asyncio.get_running_loop()
            logits = await loop.run_in_executor(self.thread, self._compute, images)
        except Exception as error:
            for _, answer in jobs:
                if not answer.done():
                    answer.set_exception(error)
            return
        self.metrics.batches += 1
        self.metrics.images += len(jobs)
        self.metrics.seconds += time.perf_counter() - start
        for (_, answer), row in zip(jobs, logits, strict=True):
            if not answer.done():
                answer.set_result(row)

    def _compute(self, images: Tensor) -> Tensor:
        """Pad images to a full batch, so that every call has the compiled shape, and run them."""
        count = len(images)
        padded = images.new_zeros(self.limits.batch, *images.shape[1:])
        padded[:count] = images
        with torch.inference_mode():
            return self.model(padded)[:count].clone()

    async def close(self) -> None:
        """Refuse new requests, and answer the waiting ones."""
        self.open = False
        await self.queue.join()
        self.thread.shutdown()


def make_app(model: nn.Module, limits: Limits, run: Callable[[Tensor], Tensor]) -> FastAPI:
    """Create the service.

    Args:
        model: The model.
        limits: The limits of the service.
        run: Computes a batch: the model itself, or its compiled version.
    """
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    metrics = Metrics()
    batcher = Batcher(run, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        try:
            yield
        finally:
            await batcher.close()
            worker.cancel()

    app = FastAPI(title="sparsiattn", lifespan=lifespan)

    @app.middleware("http")
    async def count(request: Request, following: Any) -> Any:
        response = await following(request)
        metrics.answers[response.status_code] += 1
        return response

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not batcher.open:
            raise HTTPException(503, "stopping")
        patch = sparsiattn.patch_of(model)
        return {"status": "ok", "patch": None if patch is None else patch.strategy.to_dict()}

    @app.get("/metrics")
    async def report() -> Response:
        return Response(metrics.text(batcher.queue.qsize()), media_type="text/plain")

    async def logits_of(request: Request) -> Tensor:
        data = await _body(request, limits.bytes)
        image = await asyncio.to_thread(_decode, data, transform, limits)
        return await batcher.submit(image)

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        if not batcher.open:
            raise HTTPException(503, "stopping")
        try:
            logits = await asyncio.wait_for(logits_of(request), limits.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no answer within {limits.seconds:g} s") from None
        except asyncio.QueueFull:
            raise HTTPException(
                503, f"{limits.queue} requests are waiting already", {"Retry-After": "1"}
            ) from None
        best = logits.softmax(-1).topk(min(5, len(logits)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return {"classes": [{"class": index, "p": share} for index, share in pairs]}

    return app


async def _body(request: Request, most: int) -> bytes:
    """Read the body of a request, up to a number of bytes."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise HTTPException(413, f"an image must have at most {most} bytes")
    return bytes(data)


def _decode(data: bytes, transform: Any, limits: Limits) -> Tensor:
    try:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > limits.pixels:
            raise HTTPException(
                413, f"an image must have at most {limits.pixels} pixels, got {width}x{height}"
            )
        pixels: Tensor = transform(image.convert("RGB"))
    except HTTPException:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"the data cannot be read as an image: {error}") from error
    return pixels


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--strategy", default="token_drop", help="'none' serves the dense model")
    parser.add_argument("--keep", type=float)
    parser.add_argument("--k", type=float)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=Limits.batch)
    parser.add_argument("--queue", type=int, default=Limits.queue)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    limits = Limits(batch=args.batch, queue=args.queue)
    options = {name: getattr(args, name) for name in ("k", "keep") if getattr(args, name)}
    if args.strategy != "none":
        print(sparsiattn.patch(model, args.strategy, **options).report())
    run: Callable[[Tensor], Tensor] = torch.compile(model) if args.compile else model
    side = timm.data.resolve_data_config({}, model=model)["input_size"]
    with torch.inference_mode():
        # compile and fill caches before the first request
        run(torch.zeros(limits.batch, *side))
    uvicorn.run(
        make_app(model, limits, run), host=args.host, port=args.port,
        timeout_graceful_shutdown=30, log_level="warning",
    )  # fmt: skip


if __name__ == "__main__":
    main()
