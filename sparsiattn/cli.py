"""The command line: ``sparsiattn list``, ``inspect``, ``tune``, ``bench``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Sparse attention for any Vision Transformer.")


@app.callback()
def main() -> None:
    """Sparse attention for any Vision Transformer."""


@app.command("list")
def list_all(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Strategies, kernels, backbones and plug-ins: usable here, or why not.

    Example: sparsiattn list --json
    """
    listing = contents()
    if as_json:
        print(json.dumps(listing, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for kind, rows in listing.items():
        table = Table("name", "summary", "status", title=kind, title_justify="left")
        for row in rows:
            table.add_row(row["name"], row["summary"], row["status"])
        console.print(table)


def contents() -> dict[str, list[dict[str, Any]]]:
    """What `list` prints, as plain data."""
    from sparsiattn import registry

    kinds = {
        "strategies": registry.strategies(),
        "kernels": registry.kernels(),
        "backbones": registry.backbones(),
    }
    listing: dict[str, list[dict[str, Any]]] = {
        kind: [
            {**asdict(info), "status": "; ".join(info.reasons) or "usable"}
            for info in infos.values()
        ]
        for kind, infos in kinds.items()
    }
    listing["plugins"] = [
        {
            "name": plugin.name,
            "summary": f"{plugin.distribution}: {', '.join(plugin.provides) or 'nothing'}",
            "status": f"broken: {plugin.error}" if plugin.broken else "working",
        }
        for plugin in registry.plugins()
    ]
    return listing


@app.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help="A timm model, e.g. deit_small_patch16_224.")],
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels, square.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="A strategy to try, all if none; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Attention of a timm model: what can be patched, and what that could save. No weights needed.

    Example: sparsiattn inspect swin_tiny_patch4_window7_224 --strategy local
    """
    import torch
    from rich.console import Console

    from sparsiattn.inspection import inspect

    console = Console(stderr=as_json)
    with console.status(f"inspecting {model}"), _readable():
        with torch.device("meta"):
            host = _timm(model, image_size)
        shape = None if image_size is None else _image_shape(host, image_size)
        found = inspect(host, shape, strategies=strategy or None)
    if as_json:
        print(json.dumps({**found.to_dict(), "name": model}, indent=2))
        return
    for line in found.head():
        _say(console, line)
    if found.sites:
        _print_whole(console, _cells(found.table()))
    for line in found.tail():
        _say(console, line)


def _cells(rows: list[tuple[str, ...]]) -> Table:
    """The first row is the heading; all but the first column are figures."""
    from rich.table import Table

    heading, *body = rows
    table = Table(heading[0])
    for title in heading[1:]:
        table.add_column(title, justify="right")
    for row in body:
        table.add_row(*row)
    return table


def _print_whole(console: Any, table: Table) -> None:
    """With no cell cut short, also where the screen is small: `patch` takes a site's whole name."""
    from rich.console import Console
    from rich.measure import Measurement

    unlimited = console.options.update(width=10_000)
    needed = Measurement.get(console, unlimited, table).maximum
    Console(width=max(console.width, needed)).print(table)


def _say(console: Any, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


@app.command("tune")
def tune_here(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A small grid of shapes, or a larger one.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure attention on this machine, so that kernel="auto" knows what is fast here.

    Writes tuning.json in $SPARSIATTN_CACHE or the user's cache folder. Example: sparsiattn tune
    """
    from rich.console import Console

    from sparsiattn.tuning import tune

    console = Console(stderr=as_json)
    dtypes = None if not dtype else [_dtype(name) for name in dtype]
    with console.status("measuring") as status, _readable():

        def show(done: int, total: int) -> None:
            status.update(f"measured {done} of {total} shapes")

        found = tune(device, dtypes, quick, on_case=show)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    console.print(_tuned(found))
    console.print(f"wrote {found.path}" if found.path else "nothing written: see the warning above")


def _tuned(found: Any) -> Table:
    from rich.table import Table

    table = Table(
        "tokens", "k", "tile", "heads x dim", "batch", "dtype", "kernel", "ms", "measured",
        "expected", title=f"speed relative to dense attention, {found.device}",
        title_justify="left",
    )  # fmt: skip
    for row in found.rows:
        case = row.case
        tile = case.tile if isinstance(case.tile, int) else "x".join(map(str, case.tile))
        table.add_row(
            str(case.tokens), "ragged" if case.k is None else str(case.k), str(tile),
            f"{case.heads} x {case.dim}", str(case.batch), row.dtype, row.kernel,
            f"{1e3 * row.seconds:.2f}", f"{row.ratio:.2f}x",
            "-" if row.expected is None else f"{row.expected:.2f}x",
        )  # fmt: skip
    return table


@app.command("bench")
def bench_model(
    model: Annotated[str, typer.Argument(help="A timm model, e.g. deit_small_patch16_224.")],
    strategy: Annotated[str, typer.Option(help="As sparsiattn.patch takes it.")] = "connectivity",
    k: Annotated[str | None, typer.Option(help="0.1 is a share of the keys, 20 a count.")] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of tokens token strategies keep.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="auto, or a kernel's name.")] = "auto",
    only_if_faster: Annotated[
        bool | None, typer.Option(help="Leave sites dense where sparse attention should lose.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels, square.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Paired runs.")] = 10,
    pretrained: Annotated[bool, typer.Option(help="Download weights (they cost no time).")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Time a timm model dense and patched, in paired runs, and its attention site by site.

    Example: sparsiattn bench vit_small_patch16_384 --k 0.25 --image-size 1024
    """
    from rich.console import Console

    from sparsiattn.benchmark import bench

    options: dict[str, Any] = {"k": _budget(k), "keep": keep, "only_if_faster": only_if_faster}
    given = {name: value for name, value in options.items() if value is not None}
    with _readable():
        host, images = _host(model, image_size, batch_size, device, _dtype(dtype), pretrained)
        found = bench(host, images, strategy=strategy, rounds=rounds, kernel=kernel, **given)
    console = Console()
    console.print(_benched(model, found))
    for line in str(found.report).splitlines():
        _say(console, line)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {**found.to_dict(), "name": model}
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {out}", soft_wrap=True)


def _benched(name: str, found: Any) -> Table:
    from rich.table import Table

    shape = "x".join(map(str, found.input_shape))
    title = f"{name}, {found.strategy}, input {shape}, {found.dtype} on {found.device}"
    table = Table("", "median", "quartiles", title=title, title_justify="left")
    for side, middle, (low, high) in (
        ("dense", found.dense_ms, found.dense_quartiles),
        ("patched", found.sparse_ms, found.sparse_quartiles),
    ):
        table.add_row(side, f"{middle:.2f} ms", f"{low:.2f} to {high:.2f} ms")
    low, high = found.ratio_quartiles
    table.add_row("dense / patched", f"{found.ratio:.2f}x", f"{low:.2f} to {high:.2f}x")
    return table


def _host(
    name: str, size: int | None, batch: int, device: str, dtype: Any, pretrained: bool
) -> tuple[Any, Any]:
    """The timm model and a batch of noise of the size it takes."""
    import torch

    model = _timm(name, size, pretrained).eval().to(device, dtype)
    torch.manual_seed(0)
    return model, torch.randn(batch, *_image_shape(model, size)[1:]).to(device, dtype)


def _timm(name: str, size: int | None, pretrained: bool = False) -> Any:
    import timm

    from sparsiattn.errors import InvalidOption

    extra = {} if size is None else {"img_size": size}
    try:
        return timm.create_model(name, pretrained=pretrained, **extra)
    except (RuntimeError, TypeError) as error:
        raise InvalidOption(
            f"timm cannot make {name!r}{f' with {extra}' if extra else ''}: {error}"
        ) from error


def _image_shape(model: Any, size: int | None) -> tuple[int, ...]:
    """Of one image: the pixels asked for, else those the model was trained on."""
    channels, rows, columns = model.pretrained_cfg["input_size"]
    return 1, channels, size or rows, size or columns


def _budget(k: str | None) -> int | float | None:
    """``"20"`` is a count, ``"0.1"`` a share."""
    if k is None:
        return None
    try:
        return int(k) if k.lstrip("+-").isdigit() else float(k)
    except ValueError:
        raise typer.BadParameter(f"k must be a number, got {k!r}", param_hint="--k") from None


def _dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"no floating dtype of torch: {name!r}", param_hint="--dtype")
    return found


class _readable:
    """Errors of this library as one line and exit code 1, without a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from sparsiattn.errors import SparsiattnError

        if isinstance(error, SparsiattnError):
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error
