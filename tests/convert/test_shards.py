"""safetensors reading: right files come out exactly, broken ones are refused, nothing leaks."""

import json
import os
import random
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from audit import watched
from corpus import BROKEN, Broken, good, sharded, tensors, with_header
from safetensors import SafetensorError, safe_open
from safetensors.torch import deserialize, save, save_file

from purelm.convert.atomic import entry, entry_bytes, write_safetensors
from purelm.convert.json_file import read_json
from purelm.convert.safetensors_file import DTYPES, parse_header, read_header
from purelm.convert.shards import open_checkpoint, read, read_into
from purelm.errors import CheckpointError, LoadError, SaveError


def every_dtype() -> dict[str, torch.Tensor]:
    """One tensor of each dtype that the format has, of odd sizes and with an empty and a scalar."""
    generator = torch.Generator().manual_seed(0)
    made = {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "é\n": torch.ones(1, 1, 2)}
    for dtype in DTYPES.values():
        high = 2 if dtype == torch.bool else 256
        raw = torch.randint(0, high, (3 * 5 * dtype.itemsize,), generator=generator).to(torch.uint8)
        made[str(dtype)] = raw.view(dtype).reshape(3, 5)
    return made


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    wanted = every_dtype()
    save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.metadata == {"format": "pt"}
    assert set(checkpoint.tensors) == set(wanted)
    buffer = torch.empty(max(t.nbytes for t in wanted.values()), dtype=torch.uint8)
    offsets = []
    for info in checkpoint.in_file_order():
        offsets.append(info.offset)
        assert same_bytes(read(info), wanted[info.name])
        view = read_into(info, buffer)
        assert same_bytes(view, wanted[info.name])
        assert info.nbytes == 0 or view.data_ptr() == buffer.data_ptr()
    assert offsets == sorted(offsets)


def test_writes_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    wanted = every_dtype()
    entries = [entry(name, tensor) for name, tensor in wanted.items()]
    write_safetensors(tmp_path / "a.safetensors", entries, {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == save(wanted, metadata={"format": "pt"})
    assert entry_bytes(entries) == sum(t.nbytes for t in wanted.values())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert same_bytes(file.get_tensor("scalar"), wanted["scalar"])


def test_writing_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    a = torch.ones(2)
    with pytest.raises(SaveError, match="twice"):
        write_safetensors(path, [entry("a", a), entry("a", a)])
    with pytest.raises(SaveError, match="no dtype"):
        write_safetensors(path, [entry("a", torch.ones(2, dtype=torch.complex128))])
    with pytest.raises(SaveError, match=r"expected torch.float32 \[3\], found torch.float32 \[2\]"):
        write_safetensors(path, [("a", torch.float32, (3,), lambda: a)])
    with pytest.raises(SaveError, match="twice"):
        write_safetensors(path, [entry("__metadata__", a)])


def test_non_contiguous_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    a = torch.arange(12.0).reshape(3, 4).T
    write_safetensors(tmp_path / "model.safetensors", [entry("a", a)])
    assert torch.equal(read(open_checkpoint(tmp_path).tensors["a"]), a)


def test_shards(tmp_path: Path) -> None:
    good(tmp_path)
    weight_map = sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == sorted(set(weight_map.values()))
    for name, tensor in tensors().items():
        assert checkpoint.tensors[name].file.name == weight_map[name]
        assert torch.equal(read(checkpoint.tensors[name]), tensor)
    assert [t.file for t in checkpoint.in_file_order()] == sorted(
        t.file for t in checkpoint.tensors.values()
    )


def test_adapter_stem(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert list(open_checkpoint(tmp_path, stem="adapter_model").tensors) == ["a"]
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        open_checkpoint(tmp_path)


def test_the_cache_of_the_hub_may_link_to_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    snapshot = good(repo / "snapshots" / ("0" * 40))
    (repo / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(repo / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert len(open_checkpoint(snapshot).tensors) == len(tensors())
    (repo / "blobs" / "abc").rename(tmp_path / "abc")
    (repo / "blobs" / "abc").symlink_to(tmp_path / "abc")
    with pytest.raises(CheckpointError, match="link out of its folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("change", ["cut", "longer", "replaced", "gone"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, change: str) -> None:
    path = good(tmp_path) / "model.safetensors"
    info = open_checkpoint(tmp_path).tensors["model.norm.weight"]
    content = path.read_bytes()
    match change:
        case "cut":
            os.truncate(path, len(content) - 4)
        case "longer":
            path.write_bytes(content + b"\0")
        case "replaced":
            path.write_bytes(content)
            os.utime(path, ns=(0, 0))
        case "gone":
            path.unlink()
    with pytest.raises(CheckpointError) as caught:
        read(info)
    assert caught.value.file == str(path)


def test_read_checks_its_target(tmp_path: Path) -> None:
    info = open_checkpoint(good(tmp_path)).tensors["model.norm.weight"]
    for out in (torch.empty(15), torch.empty(16).double(), torch.empty(32)[::2]):
        with pytest.raises(CheckpointError, match="out must be"):
            read(info, out=out)
    for buffer in (torch.empty(63, dtype=torch.uint8), torch.empty(64)):
        with pytest.raises(CheckpointError, match="buffer must be"):
            read_into(info, buffer)
    out = torch.empty(16)
    assert read(info, out=out) is out
    assert torch.equal(out, tensors()["model.norm.weight"])


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from purelm.convert import safetensors_file

    class Slow:
        def __init__(self, file: object) -> None:
            self.file = file

        def readinto(self, view: memoryview) -> int:
            return self.file.readinto(view[:7])  # type: ignore[attr-defined, no-any-return]

    fill = safetensors_file._fill
    monkeypatch.setattr(safetensors_file, "_fill", lambda v, f, p: fill(v, Slow(f), p))
    checkpoint = open_checkpoint(good(tmp_path))
    for name, tensor in tensors().items():
        assert torch.equal(read(checkpoint.tensors[name]), tensor)


def _open_and_read(folder: Path) -> None:
    read_json(folder / "config.json")
    for info in open_checkpoint(folder).in_file_order():
        read(info)


@pytest.mark.parametrize("case", [c for c in BROKEN if c.stage != "load"], ids=lambda c: c.name)
def test_broken_checkpoints_are_refused(case: Broken, tmp_path: Path) -> None:
    _open_and_read(good(tmp_path / "good"))
    folder = case.build(tmp_path / "broken")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with watched() as events, pytest.raises(LoadError) as caught:
        _open_and_read(folder)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert type(caught.value) is case.error
    assert str(tmp_path) in str(caught.value), "the message names no file"
    assert len(str(caught.value)) < 4000
    # Nothing ran, and nothing outside the folder was opened.
    inside = os.path.realpath(folder) + os.sep
    assert [e for e in events if e[0] != "open" or not e[1].startswith(inside)] == []
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("case", [c for c in BROKEN if c.stage == "load"], ids=lambda c: c.name)
def test_what_only_a_model_can_refuse_opens(case: Broken, tmp_path: Path) -> None:
    _open_and_read(case.build(tmp_path / "broken"))


def test_messages_say_what_to_do(tmp_path: Path) -> None:
    cases = {case.name: case for case in BROKEN}
    for name, words in {
        "git_lfs_pointer": "git lfs pull",
        "pickle_only": r"pytorch_model\.bin.*never loaded.*convert",
        "pickle_named_safetensors": "pickle",
        "cut_in_the_data": "cut short.*again",
        "weights_link_out": "link out",
        "index_leaves_a_tensor_out": r"model\.layers\.1\.mlp\.down_proj\.weight",
        "index_names_a_missing_tensor": "missing: ghost",
    }.items():
        folder = cases[name].build(tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(folder)


def _mutated(content: bytes, rng: random.Random) -> bytes:
    """`content` with bytes, digits or tokens of its header changed, now and then its length."""
    size = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + size]), content[8 + size :]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(header))
        match rng.randrange(8):
            case 0:
                header[at] = rng.randrange(256)
            case 1:
                header[at] ^= 1 << rng.randrange(8)
            case 2:
                del header[at : at + rng.choice((1, 1, 4, 20))]
            case 3:
                header[at:at] = header[at : at + rng.choice((1, 5, 60))]
            case 4:
                token = rng.choice(_TOKENS)
                header[at : at + rng.choice((0, 1, len(token)))] = token
            case _:
                digits = [i for i, b in enumerate(header) if chr(b).isdigit()]
                if digits:
                    at = rng.choice(digits)
                    header[at : at + 1] = rng.choice(_NUMBERS)
    if rng.random() < 0.7:
        header += b" " * (-len(header) % 8)
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    length = len(header) if rng.random() < 0.95 else rng.choice((0, 1, size + 8, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + bytes(header) + data


_TOKENS = (
    b'"dtype":"F32",',
    b'"a":',
    b"null",
    b"[]",
    b"{}",
    b"\\ud800",
    b"\\u0061",
    b"\xc3\xa9",
    b"\xef\xbb\xbf",
    b'"F16"',
    b'"BF16"',
    b'"F4"',
    b'"__metadata__":{},',
    b"//",
    b",",
    b"\t",
    b"\x00",
)
_NUMBERS = (
    b"0",
    b"1",
    b"-0",
    b"-1",
    b"8",
    b"16",
    b"00",
    b"1e1",
    b"1.0",
    b"NaN",
    b"18446744073709551615",
)
_NUMBERS += (b"9223372036854775808", b"4294967296,4294967296", b"true", b'"4"', b"0x4", b"")


def _fuzz(count: int, seconds: float, seed: int) -> int:
    """Try `count` mutations on our parser and on safetensors'; returns how many were tried."""
    rng = random.Random(seed)
    seeds = [
        save({"a": torch.ones(4), "b": torch.ones(2, 3).half()}, metadata={"format": "pt"}),
        save({"x": torch.empty(0, 3), "y": torch.tensor(1, dtype=torch.int64)}),
        with_header(b'{"a":{"shape":[2],"data_offsets":[0,2],"dtype":"U8"}}  ', bytes(2)),
    ]
    accepted = stricter = 0
    start = time.perf_counter()
    for tried in range(1, count + 1):
        content = _mutated(rng.choice(seeds), rng)
        size = int.from_bytes(content[:8], "little")
        try:
            if size > len(content) - 8:
                raise CheckpointError("the header is longer than the file")
            ours, _ = parse_header(content[8 : 8 + size], len(content) - 8 - size)
        except CheckpointError:
            ours = None
        try:
            theirs = dict(deserialize(content))
        except SafetensorError:
            theirs = None
        if ours is not None:
            assert theirs is not None, f"laxer than safetensors: {content!r}"
            # data_ptr and bytes differ by version; shapes and names are what can be compared.
            assert {n: list(t["shape"]) for n, t in theirs.items()} == {
                n: list(t[1]) for n, t in ours.items()
            }
            accepted += 1
        elif theirs is not None:
            stricter += 1
        if tried % 256 == 0 and time.perf_counter() - start > seconds:
            break
    assert accepted > tried / 200, "the mutations never leave a valid file"
    assert stricter < tried / 20, "more is refused than the rules say"
    return tried


def test_the_parser_is_never_laxer_than_safetensors() -> None:
    assert _fuzz(20_000, 20, seed=1) > 1000


@pytest.mark.full
def test_the_parser_is_never_laxer_than_safetensors_full() -> None:
    assert _fuzz(200_000, 200, seed=2) == 200_000


def test_header_cap_can_be_raised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(b"{" + b" " * 2000 + b"}"))
    with pytest.raises(CheckpointError, match="more than the 1000 allowed"):
        read_header(path, max_header_bytes=1000)
    assert read_header(path) == ({}, {})


def test_reading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    entries = [(f"t{i}", torch.float32, (1 << 18,), lambda: torch.ones(1 << 18)) for i in range(64)]
    write_safetensors(tmp_path / "model.safetensors", entries)
    checkpoint = open_checkpoint(tmp_path)
    buffer = torch.empty(1 << 20, dtype=torch.uint8)
    read_into(next(checkpoint.in_file_order()), buffer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for info in checkpoint.in_file_order():
        assert read_into(info, buffer)[0] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 1024  # 64 MiB read


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"a": [1, -0, 2.5, {"b": None}], "é": "\U0001f600", "c": "[{" * 100, "d": '\\"['}
    path.write_text(json.dumps(value))
    assert read_json(path) == value
    path.write_text('{"a": ' + "[" * 63 + "]" * 63 + "}")
    assert read_json(path)
    path.write_text('{"a": ' + "[" * 64 + "]" * 64 + "}")
    with pytest.raises(LoadError, match="65 deep"):
        read_json(path)
    path.write_text('{"a": [["\\udc00"]]}')
    with pytest.raises(CheckpointError, match="surrogate"):
        read_json(path, error=CheckpointError)
    with pytest.raises(LoadError, match="more than the 5 allowed"):
        read_json(path, max_bytes=5)
