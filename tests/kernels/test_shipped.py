"""Which library of the package is taken, and that a broken one never does harm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import sparsiattn
from sparsiattn.errors import InvalidOption
from sparsiattn.kernels import cost
from sparsiattn.kernels.native import build, entries, shipped, threads, toolchain
from sparsiattn.testing import tiny_images, tiny_vit
from sparsiattn.testing.diagnosis import native_code
from tests.support.native_calls import KERNEL, call, same

pytestmark = pytest.mark.skipif(toolchain.machine() != "x86", reason="levels are those of x86-64")


@pytest.fixture(scope="module")
def any_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that runs on every x86-64 processor, compiled in a second."""
    target = tmp_path_factory.mktemp("shipped") / "library.so"
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    made_of = f'-DFINGERPRINT="{toolchain.fingerprint()}"'
    flags = [flag for flag in toolchain.FLAGS if flag != "-O3"]
    source = str(toolchain.HERE / toolchain.MAIN)
    subprocess.run(["cc", *flags, made_of, source, "-o", str(target), "-lm"], check=True)
    return target


@pytest.fixture
def package(
    any_level: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Path]]:
    """Makes a folder of libraries for a processor of that level; nothing else can be found."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.delenv(shipped.VARIABLE)

    def make(level: int) -> Path:
        code = f"int sparsiattn_level(void) {{ return {level}; }}"
        command = ["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(tmp_path / "level.so")]
        subprocess.run(command, input=code, text=True, check=True)
        for name in toolchain.X86:
            shutil.copy(any_level, tmp_path / toolchain.file_name(name))
        build.forget()
        return tmp_path

    yield make
    build.forget()
    cost.reload()


LEVELS = [(1, ""), (2, "v2"), (3, "v3"), (4, "v4")]


@pytest.mark.parametrize(("level", "expected"), LEVELS)
def test_the_best_that_the_processor_has(
    package: Callable[[int], Path], level: int, expected: str
) -> None:
    package(level)
    assert shipped.find()[1:] == (expected, ())
    assert build.is_ready() == bool(expected)
    assert build.source().endswith(expected)


def test_it_is_taken_without_a_warmup(package: Callable[[int], Path]) -> None:
    package(3)
    inputs, pattern = call((8, 8), (4, 4), (2, 2))
    assert KERNEL.not_ready(inputs, pattern) == []
    same(inputs, pattern)
    build.forget()
    vit, images = tiny_vit().eval(), tiny_images(2)
    with torch.no_grad(), sparsiattn.patch(vit, "connectivity", k=0.1, tile=(4, 4)) as patch:
        assert build._state.code is not None  # before anything could be traced
        vit(images)
        assert {site.kernel for site in patch.report().sites} == {"native"}


@pytest.mark.parametrize(
    ("value", "level", "reason"),
    [
        ("off", "", "is disabled by SPARSIATTN_NATIVE=off"),
        ("v2", "v2", ""),
        ("v4", "", "SPARSIATTN_NATIVE=v4 does not run on this processor"),
        ("neon", "", "SPARSIATTN_NATIVE=neon does not run on this processor"),
        ("local", "", "no-compiler-in-these-tests"),
    ],
)
def test_one_can_be_asked_for(
    package: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, value: str, level: str,
    reason: str,
) -> None:  # fmt: skip
    package(3)
    monkeypatch.setenv(shipped.VARIABLE, value)
    assert shipped.find().level == level
    assert reason in "; ".join(KERNEL.why_unavailable())
    assert bool(KERNEL.why_unavailable()) == bool(reason)


def test_another_value_is_an_error(
    package: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package(3)
    monkeypatch.setenv(shipped.VARIABLE, "avx")
    expected = "SPARSIATTN_NATIVE must be one of off, v2, v3, v4, neon, local or unset, got 'avx'"
    vit = tiny_vit()
    with pytest.raises(InvalidOption, match=expected):
        sparsiattn.patch(vit, "connectivity", k=0.1)
    assert not vit._forward_hooks
    assert KERNEL.why_unavailable() == [expected]
    assert expected in [finding.detail for finding in native_code()]


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def for_arm(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[18:20] = (183).to_bytes(2, "little")
    path.write_bytes(content)


def of_other_sources(path: Path) -> None:
    content = path.read_bytes()
    made_of = toolchain.fingerprint().encode()
    assert made_of in content
    path.write_bytes(content.replace(made_of, made_of[::-1]))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "no library": (lambda path: path.write_bytes(b"text"), "cannot be loaded"),
    "40 bytes": (lambda path: cut(path, 40 / path.stat().st_size), "the file is cut short"),
    "half": (lambda path: cut(path, 0.5), "the file is cut short"),
    "nine tenths": (lambda path: cut(path, 0.9), "v3.so"),
    "another processor": (for_arm, "cannot be loaded"),
    "other sources": (of_other_sources, "was compiled from other sources"),
    "another library": (lambda path: shutil.copy(path.with_name("level.so"), path), "symbol"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_library_gives_way_to_the_next(
    package: Callable[[int], Path], damage: str
) -> None:
    spoil, reason = DAMAGE[damage]
    if damage == "nine tenths":  # what is missing then may be symbols for debuggers alone
        spoil(package(3) / "v3.so")
        assert shipped.find().level in ("v2", "v3")
        return
    spoil(package(3) / "v3.so")
    build.forget()
    assert "for v2" in (build.is_ready() and build.source())
    (fault,) = build.faults()
    assert "the shipped library v3.so" in fault
    assert reason in fault
    same(*call((8, 8), (4, 4), (2, 2)))
    vit = tiny_vit().eval()
    with torch.no_grad(), sparsiattn.patch(vit, "connectivity", k=0.1, tile=(4, 4)) as patch:
        vit(tiny_images(1))
        assert str(patch.report()).count(fault) == 1
        assert [x.detail for x in native_code() if x.status == "broken"] == [fault]


def test_without_a_level_none_is_loaded(package: Callable[[int], Path]) -> None:
    cut(package(3) / "level.so", 0.5)
    assert not build.is_ready()
    assert "the processor's level could not be determined" in build.faults()[0]


def test_a_folder_from_which_nothing_may_run(
    package: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(3)
    locked = folder / "locked"
    locked.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "noexec", "none", str(locked)]
    if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a folder")
    try:
        for file in folder.glob("*.so"):
            shutil.copy(file, locked)
        monkeypatch.setattr(shipped, "FOLDER", locked)
        assert not build.is_ready()
        assert "the processor's level could not be determined" in build.faults()[0]
    finally:
        subprocess.run(["umount", "--lazy", str(locked)], check=True)


class Attended(torch.utils.data.Dataset[torch.Tensor]):
    """Attention by the kernel, in the process that asks."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return KERNEL(*call((8, 8), (4, 4), (2, 2), seed=index))


def test_threads_are_those_of_torch(package: Callable[[int], Path]) -> None:
    package(3)
    inputs, pattern = call((16, 16), (8, 8), (4, 4))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(KERNEL(inputs, pattern))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found)
    assert build.code().parallel not in (0, threads._openmp())


@pytest.mark.skipif(not hasattr(torch.multiprocessing, "get_context"), reason="no processes")
def test_workers_that_are_forked(package: Callable[[int], Path]) -> None:
    package(3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = torch.stack([Attended()[i] for i in range(4)])
        loader = DataLoader(
            Attended(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        assert torch.equal(torch.cat(list(loader)), here)
    finally:
        torch.set_num_threads(before)


def test_a_library_is_opened_by_its_table(any_level: Path) -> None:
    code = entries.open_library(any_level)
    assert isinstance(code, entries.Code)
    assert set(vars(code)) == {"parallel", *entries.ENTRIES}
