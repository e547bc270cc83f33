"""Tensors on their way from files onto a GPU."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from purelm.convert import staging
from purelm.convert.shards import open_checkpoint
from purelm.convert.staging import Stager
from purelm.errors import CheckpointError

# Around the edges of chunks and of a round of them, and nothing at all.
ROUND = staging.THREADS * staging.CHUNK
SIZES = (0, 1, 7, staging.CHUNK, staging.CHUNK + 1, ROUND - 1, ROUND + 5, 2 * ROUND + 3)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 1, 1 << 40])
def test_what_is_read_ahead_is_what_stands_in_the_file(
    tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "AHEAD", ahead)
    g = torch.Generator().manual_seed(0)
    want = {
        f"t{i}": torch.randint(256, (n,), dtype=torch.uint8, generator=g)
        for i, n in enumerate(SIZES)
    }
    save_file(want, tmp_path / "model.safetensors")
    infos = open_checkpoint(tmp_path).tensors
    names = list(want)
    with Stager(torch.device("cuda", 0)) as stager:
        # The second time none is planned any more, and out of order.
        for i, name in enumerate([*names, *names[::-1]]):
            if i == 0:
                stager.plan(infos[name] for name in names)
            got = stager.read(infos[name])
            # Memory that is used again at once must wait for its last reader.
            busy = torch.empty(1 << 24, device="cuda").fill_(float(i))
            assert torch.equal(got.cpu(), want[name])
            del got, busy


@pytest.mark.gpu
def test_a_file_that_ends_early_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(ROUND), "b": torch.ones(ROUND)}, path)
    infos = open_checkpoint(tmp_path).tensors
    before = torch.cuda.memory_allocated()
    with (
        pytest.raises(CheckpointError, match="changed|ended"),
        Stager(torch.device("cuda", 0)) as stager,
    ):
        stager.plan([infos["a"]])
        stager.read(infos["a"])
        with path.open("r+b") as file:
            file.truncate(1000)
        stager.plan([infos["b"]])
        stager.read(infos["b"])
    assert torch.cuda.memory_allocated() == before


def test_on_a_cpu_nothing_is_read_ahead(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, tmp_path / "model.safetensors")
    info = open_checkpoint(tmp_path).tensors["a"]
    with Stager(torch.device("cpu")) as stager:
        stager.plan([info])
        assert torch.equal(stager.read(info), torch.arange(5.0))


class _Fake:
    """A stream or an event, on which everything is done at once."""

    def __init__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_every_byte_takes_its_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lanes, chunks and plan of a GPU's reader, with memory and streams of the CPU."""
    cuda = SimpleNamespace(
        Stream=_Fake,
        Event=_Fake,
        stream=lambda _: nullcontext(),
        current_stream=_Fake,
        synchronize=lambda _: None,
    )
    made: list[int] = []

    def empty(*shape: Any, dtype: torch.dtype, **_: object) -> torch.Tensor:
        out = torch.empty(*shape, dtype=dtype)
        made.append(out.nbytes)
        return out

    fake = SimpleNamespace(empty=empty, cuda=cuda, uint8=torch.uint8)
    monkeypatch.setattr(staging, "torch", fake)
    monkeypatch.setattr(staging, "CHUNK", 8)
    monkeypatch.setattr(staging, "THREADS", 3)
    monkeypatch.setattr(staging, "AHEAD", 40)
    sizes = [0, 1, 7, 8, 9, 23, 24, 25, 100, 5, 5, 5]
    want = {f"t{i}": torch.arange(n, dtype=torch.uint8) + i for i, n in enumerate(sizes)}
    save_file(want, tmp_path / "model.safetensors")
    infos = open_checkpoint(tmp_path).tensors
    device: Any = SimpleNamespace(type="cuda")
    with Stager(device) as stager:
        stager.plan(infos[name] for name in want)
        # The buffers, and as many tensors as make 40 bytes with the last of them.
        assert made == [24, 0, 1, 7, 8, 9, 23]
        for name in [*want, "t8", "t1"]:
            assert torch.equal(stager.read(infos[name]), want[name])
        # One that is asked for before its turn is read once.
        stager.plan(infos[name] for name in ("t8", "t6", "t7"))
        before = len(made)
        for name in ("t7", "t8", "t6"):
            assert torch.equal(stager.read(infos[name]), want[name])
        assert len(made) - before == 2
