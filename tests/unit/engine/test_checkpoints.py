"""Checkpoints: what is read is what was written, to the byte; what is not is never used, and the one before is."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import re
import resource
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.engine.checkpoint import checkpoints
from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.engine.checkpoint.safetensors import DTYPES, Tensor
from paceline.errors import ConfigError, HostError

SHAPES = [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)]


def stored(tensor: torch.Tensor) -> Tensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return Tensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), memoryview(data))


def write(store: Checkpoints, step: int, name: str = "") -> Path:
    """A small checkpoint whose tensors and document tell it from others."""
    weight = torch.full((3,), float(step))
    return store.write(
        step, {"model": {"weight": stored(weight)}}, {"state": {"step": step, "name": name or f"step {step}"}}
    )


def held(store: Checkpoints) -> list[str]:
    """All that is in the folder."""
    return sorted(os.listdir(store.directory))


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


@pytest.fixture
def two(store: Checkpoints) -> Checkpoints:
    """Steps 1 and 2, both good."""
    write(store, 1)
    write(store, 2)
    return store


def seal(folder: Path, files: list[str], /, **changed: Any) -> None:
    """Write the manifest anew over files as they are: of a checkpoint by somebody who wants it to be believed."""
    entries = {
        name: {
            "size_bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in files
    }
    manifest = {"format": 1, "step": 2, "time": "2026-01-01T00:00:00+00:00", "files": entries} | changed
    (folder / "manifest.json").write_text(sealed(json.dumps(manifest)[:-1]))


def sealed(body: str) -> str:
    """A manifest of all this but the end, which is its own sum."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body},\n  "sha256": "{digest}"\n}}\n'


# --- what is written ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back_and_safetensors_reads_the_same(store: Checkpoints, dtype: str) -> None:
    torch.manual_seed(0)
    tensors = {}
    for shape in SHAPES:
        size_bytes = math.prod(shape) * getattr(torch, dtype).itemsize
        values = torch.randint(0, 2 if dtype == "bool" else 256, (size_bytes,), dtype=torch.uint8)
        tensors[f"of shape {shape}"] = values.view(getattr(torch, dtype)).reshape(shape)
    path = store.write(7, {"model": {name: stored(tensor) for name, tensor in tensors.items()}}, {})

    loaded = store.load().tensors["model"]
    theirs = safetensors.torch.load_file(path / "model.safetensors")
    assert loaded.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = stored(tensor)
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tuple(tensor.shape))
        assert bytes(loaded[name].data) == bytes(expected.data)
        assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(stored(theirs[name]).data) == bytes(expected.data)


def test_what_safetensors_writes_is_read(two: Checkpoints) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int8), "c": torch.tensor(True)}
    tensors |= {"d": torch.zeros(0, 9, dtype=torch.bfloat16)}
    folder = two.paths()[-1]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"from": "elsewhere"})
    seal(folder, ["model.safetensors"])
    loaded = two.load()
    assert loaded.step == 2
    assert {name: (t.dtype, t.shape, bytes(t.data)) for name, t in loaded.tensors["model"].items()} == {
        name: (s.dtype, s.shape, bytes(s.data)) for name, s in ((name, stored(t)) for name, t in tensors.items())
    }


def test_data_of_mixed_widths_are_aligned_in_the_file(store: Checkpoints) -> None:
    """A reader may map the file and use the values where they lie."""
    widths = {"int8": 3, "float64": 1, "bfloat16": 3, "float32": 5, "bool": 1, "complex64": 1, "int16": 2}
    group = {name: stored(torch.ones(count, dtype=getattr(torch, name))) for name, count in widths.items()}
    content = (store.write(1, {"model": group}, {}) / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % getattr(torch, name).itemsize == 0


BUFFERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"\1\2\3\4\5\6\7\x08",
    "bytearray": lambda: bytearray(b"\1\2\3\4\5\6\7\x08"),
    "array of shorts": lambda: np.frombuffer(b"\1\2\3\4\5\6\7\x08", dtype=np.int16).reshape(2, 2),
    "read-only view": lambda: memoryview(b"\0\1\2\3\4\5\6\7\x08")[1:],
    "array of C": lambda: (ctypes.c_uint32 * 2)(0x04030201, 0x08070605),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_any_contiguous_buffer_is_written(store: Checkpoints, kind: str) -> None:
    store.write(1, {"model": {"weight": Tensor("float32", (2,), BUFFERS[kind]())}}, {})
    assert bytes(store.load().tensors["model"]["weight"].data) == b"\1\2\3\4\5\6\7\x08"


def test_shared_memory_is_written_where_it_lies_however_large(store: Checkpoints) -> None:
    """Not copied: what is allocated has nothing to do with what is written."""
    with mmap.mmap(-1, 20 << 20) as memory:
        memory[-3:] = b"end"
        tensor = Tensor("uint8", (len(memory),), memory)
        tracemalloc.start()
        path = store.write(1, {"model": {"weight": tensor}}, {})
        loaded = store.load()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (path / "model.safetensors").read_bytes()[-len(memory) :] == memory[:]
        data = loaded.tensors["model"]["weight"].data
        assert (len(data), bytes(data[-3:])) == (len(memory), b"end")
        del tensor
    assert peak_bytes < 2 << 20


def test_data_that_are_no_contiguous_buffer_of_their_shape_are_not_written(store: Checkpoints) -> None:
    with pytest.raises(AssertionError):
        store.write(1, {"model": {"weight": Tensor("float32", (3,), bytes(8))}}, {})
    with pytest.raises(TypeError):
        store.write(1, {"model": {"weight": Tensor("uint8", (4,), memoryview(bytes(8))[::2])}}, {})
    assert not store.directory.exists()


def test_what_was_loaded_can_be_read_after_it_is_removed_but_not_changed(two: Checkpoints) -> None:
    data = two.load().tensors["model"]["weight"].data
    shutil.rmtree(two.directory)
    assert bytes(data) == bytes(stored(torch.full((3,), 2.0)).data)
    with pytest.raises(TypeError):
        data[0] = 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(document=JSON)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_come_back_as_they_were(store: Checkpoints, document: Any) -> None:
    store.write(1, {}, {"state": document, "text": json.dumps(document).encode()})
    assert store.load().documents == {"state": document, "text": document}


def test_groups_and_documents_have_the_files_of_their_names(store: Checkpoints) -> None:
    group = {"weight": stored(torch.ones(2))}
    path = store.write(812, {"model": group, "inner-0": group, "empty": {}}, {"state": 1, "data.epoch": {"a": [2]}})
    assert path == store.directory / "step-00000812"
    expected = ["data.epoch.json", "empty.safetensors", "inner-0.safetensors", "manifest.json"]
    assert sorted(os.listdir(path)) == [*expected, "model.safetensors", "state.json"]
    loaded = store.load()
    assert (loaded.path, loaded.step, loaded.warnings) == (path, 812, [])
    assert {stem: list(tensors) for stem, tensors in loaded.tensors.items()} == {
        "model": ["weight"],
        "inner-0": ["weight"],
        "empty": [],
    }
    assert loaded.documents == {"state": 1, "data.epoch": {"a": [2]}}


def test_the_manifest_says_what_others_would_say_of_the_files(store: Checkpoints) -> None:
    path = write(store, 5)
    text = (path / "manifest.json").read_bytes()
    manifest = json.loads(text)
    assert (manifest["format"], manifest["step"]) == (1, 5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", manifest["time"])
    assert manifest["time"] == store.load().time
    assert manifest["files"] == {
        name: {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in ((name, (path / name).read_bytes()) for name in ("model.safetensors", "state.json"))
    }
    own = manifest["sha256"].encode()
    assert hashlib.sha256(text[: text.index(b',\n  "sha256": "' + own)]).hexdigest().encode() == own


# --- names ---


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "a/b", "../a", "/a", "a b", "ä", "a\n", "a\0", "a" * 124])
def test_names_of_files_are_refused_before_anything_is_written(store: Checkpoints, name: str) -> None:
    contents: list[tuple[dict[str, Any], dict[str, Any]]] = [({name: {}}, {}), ({}, {name: 1})]
    for tensors, documents in contents:
        with pytest.raises(ConfigError, match=r"^a checkpoint cannot have a file named '"):
            store.write(1, tensors, documents)
    assert not store.directory.exists()


def test_a_name_of_128_characters_is_the_longest(store: Checkpoints) -> None:
    store.write(1, {"a" * 116: {}}, {"a" * 123: 1})
    assert list(store.load().documents) == ["a" * 123]


def test_no_document_is_called_manifest(store: Checkpoints) -> None:
    with pytest.raises(ConfigError, match=r"^a checkpoint cannot have a file named 'manifest.json'"):
        store.write(1, {}, {"manifest": 1})


@pytest.mark.parametrize("name", ["", "__metadata__", "a\n", "a\0", "\ud800", "a" * 513])
def test_names_of_tensors_are_refused_before_anything_is_written(store: Checkpoints, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model.safetensors cannot hold a tensor named '"):
        store.write(1, {"model": {name: stored(torch.ones(1))}}, {})
    assert not store.directory.exists()


@pytest.mark.parametrize("name", ["0", "net.blocks/1.weight", "a b", "../../etc/passwd", "模型.权重", "a" * 512])
def test_tensors_may_be_named_as_modules_name_them(store: Checkpoints, name: str) -> None:
    path = store.write(1, {"model": {name: stored(torch.ones(1))}}, {})
    assert list(store.load().tensors["model"]) == [name]
    assert list(safetensors.torch.load_file(path / "model.safetensors")) == [name]


def test_a_dtype_that_the_format_lacks_is_refused_with_those_that_it_has(store: Checkpoints) -> None:
    with pytest.raises(ConfigError) as caught:
        store.write(1, {"model": {"weight": stored(torch.ones(1, dtype=torch.complex128))}}, {})
    assert caught.value.what == "model.safetensors cannot hold weight, which is complex128"
    assert "float64, float32" in caught.value.why
    assert not store.directory.exists()


@pytest.mark.parametrize("document", [object(), b"{", b"\xff", b"NaN", "\ud800", b"[" * 10_000])
def test_a_document_that_is_not_json_is_refused_before_anything_is_written(store: Checkpoints, document: Any) -> None:
    with pytest.raises(ConfigError, match=r"^state\.json cannot be written as JSON: "):
        store.write(1, {}, {"state": document})
    assert not store.directory.exists()


# --- what is damaged ---


def assert_skipped(store: Checkpoints, file: str) -> str:
    """Step 2 is not used, with a sentence that names it and the file; step 1 is."""
    loaded = store.load()
    assert loaded.step == 1
    assert loaded.documents["state"] == {"step": 1, "name": "step 1"}
    (warning,) = loaded.warnings
    assert warning.startswith(f"step-00000002 cannot be used: {file} ")
    return warning


FILES = ["model.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
def test_any_byte_changed_is_found(two: Checkpoints, file: str) -> None:
    path = two.paths()[-1] / file
    content = path.read_bytes()
    assert len(content) > 20
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert_skipped(two, file)
    path.write_bytes(content)
    assert two.load().step == 2


@pytest.mark.parametrize("file", FILES)
def test_any_length_but_the_right_one_is_found(two: Checkpoints, file: str) -> None:
    path = two.paths()[-1] / file
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert_skipped(two, file)
    path.write_bytes(content + b"\n")
    assert_skipped(two, file)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found(two: Checkpoints, file: str) -> None:
    (two.paths()[-1] / file).unlink()
    assert assert_skipped(two, file).endswith(f"{file} is missing")


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_checkpoint_is_found(two: Checkpoints, file: str) -> None:
    older, newer = two.paths()
    shutil.copy(older / file, newer / file)
    warning = assert_skipped(two, file)
    if file == "manifest.json":
        assert warning.endswith("manifest.json is that of step 1")


def test_a_checkpoint_of_a_later_format_is_not_guessed_at(two: Checkpoints) -> None:
    seal(two.paths()[-1], ["model.safetensors", "state.json"], format=2, shards=[1, 2], step="2")
    assert assert_skipped(two, "manifest.json").endswith("of format 2, and this version of paceline reads 1")


def test_the_one_before_the_one_before_is_used_and_both_are_named(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        write(store, step)
    (store.directory / "step-00000003" / "state.json").unlink()
    cut = store.directory / "step-00000002" / "model.safetensors"
    size_bytes = cut.stat().st_size
    cut.write_bytes(b"")
    loaded = store.load()
    assert loaded.step == 1
    assert loaded.warnings == [
        "step-00000003 cannot be used: state.json is missing",
        f"step-00000002 cannot be used: model.safetensors has 0 bytes, and {size_bytes} were written",
    ]


def test_none_good_is_an_error_that_names_each(two: Checkpoints) -> None:
    for path in two.paths():
        (path / "state.json").unlink()
    with pytest.raises(ConfigError) as caught:
        two.load()
    assert caught.value.what == f"there is no good checkpoint in {two.directory}"
    assert caught.value.why == (
        "step-00000002 cannot be used: state.json is missing; step-00000001 cannot be used: state.json is missing"
    )
    assert caught.value.fix


def test_none_at_all_is_an_error_that_says_where_none_is(store: Checkpoints) -> None:
    assert store.paths() == []
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            store.load()
        assert caught.value.what == f"there is no checkpoint in {store.directory}"
        assert caught.value.fix
        store.directory.mkdir(exist_ok=True)


def test_one_that_is_named_is_used_or_refused_but_not_another(two: Checkpoints, tmp_path: Path) -> None:
    older, newer = two.paths()
    assert two.load(older).step == 1
    best = tmp_path / "best"  # a copy may have any name
    shutil.copytree(older, best)
    assert two.load(best).documents["state"]["step"] == 1
    (newer / "state.json").write_bytes(b"{}")
    with pytest.raises(ConfigError) as caught:
        two.load(newer)
    assert caught.value.what == (f"the checkpoint {newer} cannot be used: state.json has 2 bytes, and 26 were written")
    assert caught.value.fix
    with pytest.raises(ConfigError, match="cannot be used: nowhere is missing"):
        two.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"cannot be used: state\.json is not a folder"):
        two.load(older / "state.json")


# --- links, pipes, folders ---


def link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("file", FILES)
def test_no_link_to_a_file_is_followed(two: Checkpoints, tmp_path: Path, file: str) -> None:
    link(two.paths()[-1] / file, tmp_path / "elsewhere")
    assert assert_skipped(two, file).endswith(f"{file} is a symbolic link")


def test_no_link_to_a_checkpoint_is_followed(two: Checkpoints, tmp_path: Path) -> None:
    newest = two.paths()[-1]
    link(newest, tmp_path / "elsewhere")
    assert two.load().warnings == ["step-00000002 cannot be used: step-00000002 is a symbolic link"]
    with pytest.raises(ConfigError, match="step-00000002 is a symbolic link"):
        two.load(newest)


def test_what_a_link_points_to_outlives_the_link(two: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"mine")
    (two.directory / "step-00000000").symlink_to(tmp_path / "kept")
    (two.directory / ".old-step-00000000").symlink_to(tmp_path / "kept")
    (two.directory / ".new-step-00000003").symlink_to(tmp_path / "kept")
    write(two, 3)
    assert held(two) == ["step-00000002", "step-00000003"]
    assert (tmp_path / "kept" / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_is_not_waited_for_and_a_folder_is_no_file(two: Checkpoints, file: str) -> None:
    path = two.paths()[-1] / file
    path.unlink()
    os.mkfifo(path)
    assert assert_skipped(two, file).endswith(f"{file} is not a file")
    path.unlink()
    path.mkdir()
    assert assert_skipped(two, file).endswith(f"{file} is not a file")


# --- files that lie, with all sums in order ---


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "empty file": b"",
    "no whole length": bytes(7),
    "a length beyond the file": header({}, length=3),
    "a length beyond all memory": header({}, length=2**64 - 1),
    "no JSON": header(b"\xff\xff"),
    "text that is not UTF-8": header(b'{"\xff": 1}'),
    "endless nesting": header(b'{"a":' + b"[" * 50_000),
    "nesting inside of what is skipped": header(b'{"__metadata__":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "a list": header([]),
    "an entry that is no object": header({"a": 1}),
    "an entry without a shape": header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "an unknown dtype": header({"a": entry("F3")}, bytes(8)),
    "a shape that is too large": header({"a": entry(shape=[3])}, bytes(8)),
    "a shape beyond all memory": header({"a": entry(shape=[2**62, 2**62])}, bytes(8)),
    "a shape beyond all numbers": header({"a": entry(shape=[2**70])}, bytes(8)),
    "more dimensions than there are": header({"a": entry(shape=[2**62] * 100_000)}, bytes(8)),
    "a negative shape": header({"a": entry(shape=[-1, -2])}, bytes(8)),
    "a shape of fractions": header({"a": entry(shape=[2.5])}, bytes(8)),
    "data beyond the file": header({"a": entry()}, bytes(7)),
    "data before the file": header({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "data from the end to the start": header({"a": entry(offsets=[8, 0])}, bytes(8)),
    "data in common": header({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "data with a hole": header({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "data of nobody": header({"a": entry()}, bytes(9)),
    "three offsets": header({"a": entry(offsets=[0, 8, 8])}, bytes(8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_file_that_lies_is_skipped_and_costs_no_memory(two: Checkpoints, lie: str) -> None:
    folder = two.paths()[-1]
    (folder / "model.safetensors").write_bytes(LIES[lie])
    seal(folder, ["model.safetensors", "state.json"])
    tracemalloc.start()
    assert_skipped(two, "model.safetensors")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 << 20


def test_the_tests_own_seal_is_believed(two: Checkpoints) -> None:
    """Otherwise the tests above would find nothing but a bad seal."""
    folder = two.paths()[-1]
    (folder / "model.safetensors").write_bytes(header({"a": entry()}, b"12345678"))
    seal(folder, ["model.safetensors", "state.json"])
    assert two.load().tensors == {"model": {"a": Tensor("float32", (2,), memoryview(b"12345678"))}}


@given(place=st.integers(0, 91), value=st.integers(0, 255))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_changed_under_a_new_seal_is_refused_or_gives_whole_tensors(
    tmp_path: Path, place: int, value: int
) -> None:
    store = Checkpoints(tmp_path)
    folder = store.directory / "step-00000002"
    folder.mkdir(parents=True, exist_ok=True)
    content = bytearray(header({"weight": entry(shape=[3], offsets=[0, 12])}, bytes(range(12))))
    content[place % len(content)] = value
    (folder / "model.safetensors").write_bytes(content)
    seal(folder, ["model.safetensors"])
    try:
        tensors = store.load().tensors["model"]
    except ConfigError:
        return
    data = b"".join(bytes(tensor.data) for tensor in tensors.values())
    assert content.endswith(data)
    assert all(len(bytes(t.data)) == math.prod(t.shape) * getattr(torch, t.dtype).itemsize for t in tensors.values())


@pytest.mark.parametrize(
    "changed",
    [
        {"files": []},
        {"files": {"../../secret.json": {"size_bytes": 2, "sha256": "0" * 64}}},
        {"files": {"/etc/secret.json": {"size_bytes": 2, "sha256": "0" * 64}}},
        {"files": {"script.py": {"size_bytes": 2, "sha256": "0" * 64}}},
        {"files": {".json": {"size_bytes": 2, "sha256": "0" * 64}}},
        {"files": {"json": {"size_bytes": 2, "sha256": "0" * 64}}},
        {"files": {"a" * 130 + ".json": {"size_bytes": 2, "sha256": "0" * 64}}},
        {"files": {"a.json": {"size_bytes": -1, "sha256": "0" * 64}}},
        {"files": {"a.json": "0" * 64}},
        {"step": -1},
        {"step": 3},
        {"step": "2"},
        {"format": None},
        {"time": 7},
    ],
)
def test_a_manifest_that_lies_is_skipped(two: Checkpoints, changed: dict[str, Any]) -> None:
    (two.directory / "secret.json").write_bytes(b"{}")
    seal(two.paths()[-1], ["model.safetensors", "state.json"], **changed)
    assert_skipped(two, "manifest.json")


@pytest.mark.parametrize("body", ["", "[1", '{"format": 1, "files": ' + "[" * 50_000, '{"format": 1'])
def test_a_manifest_that_is_none_is_skipped(two: Checkpoints, body: str) -> None:
    (two.paths()[-1] / "manifest.json").write_text(sealed(body))
    assert_skipped(two, "manifest.json")


def test_an_endless_manifest_is_not_read(two: Checkpoints) -> None:
    path = two.paths()[-1] / "manifest.json"
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    assert assert_skipped(two, "manifest.json").endswith(f"has {1 << 40} bytes")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


# --- what stays and what goes ---


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(tmp_path: Path, keep: int) -> None:
    store = Checkpoints(tmp_path, keep=keep)
    for step in range(1, 6):
        write(store, step)
        expected = [f"step-{number:08d}" for number in range(max(1, step - keep + 1), step + 1)]
        assert held(store) == expected == [path.name for path in store.paths()]
        assert store.load().step == step


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for step in (0, 99_999_999, 100_000_000):
        write(store, step)
    assert [path.name for path in store.paths()] == ["step-00000000", "step-99999999", "step-100000000"]
    assert store.load().step == 100_000_000


def test_a_step_that_is_written_again_replaces_itself(two: Checkpoints) -> None:
    for name in ("again", "and again"):
        path = write(two, 2, name)
        loaded = two.load()
        assert (loaded.path, loaded.step, loaded.documents["state"]["name"]) == (path, 2, name)
        assert [Checkpoints(two.directory.parent).load(path).step for path in two.paths()] == [1, 2]


def test_a_run_that_goes_on_from_an_earlier_step_leaves_the_later_ones_behind(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3, 4):
        write(store, step)
    write(store, 3, "from step 2")
    assert [store.load(path).step for path in store.paths()] == [2, 3]
    loaded = store.load()
    assert (loaded.step, loaded.documents["state"]["name"]) == (3, "from step 2")


def test_leftovers_are_not_read_and_go_with_the_next_write(two: Checkpoints) -> None:
    newest = two.paths()[-1]
    shutil.copytree(newest, two.directory / ".new-step-00000003")
    shutil.copytree(newest, two.directory / ".old-step-00000000")
    (two.directory / ".new-step-00000004").write_bytes(b"")
    (two.directory / "notes.txt").write_bytes(b"a person's")
    loaded = two.load()
    assert (loaded.step, loaded.warnings, len(two.paths())) == (2, [], 2)
    write(two, 3)
    assert held(two) == ["notes.txt", "step-00000002", "step-00000003"]


# --- when the machine fails ---

CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "listdir", "statvfs")


class Calls:
    """Stands between the store and ``os``: notes each call, and raises ``error`` where ``fails`` (its number) says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fails: Callable[[int], bool] = lambda number: False
        self.error: BaseException = OSError(5, os.strerror(5))
        self.log: list[tuple[str, str, str]] = []
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            on = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
            self.log.append((name, on, str(args[1]) if name == "rename" else ""))
            if self.fails(len(self.log)):
                raise self.error
            if name != "fsync":  # what it does shows only when the power fails
                return real(*args, **kwargs)

        return call


@pytest.fixture
def interposed() -> Iterator[Callable[[], Calls]]:
    with pytest.MonkeyPatch.context() as patch:
        yield lambda: Calls(patch)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"])
@pytest.mark.parametrize("step", [3, 2])
def test_any_call_may_fail_and_leaves_the_old_or_the_new(two: Checkpoints, step: int, error: BaseException) -> None:
    base = two.directory.parent
    outcomes = []
    for failing in range(1, 200):
        store = Checkpoints(base.parent / f"{base.name}-{failing}")
        shutil.copytree(base, store.directory.parent)
        raised: BaseException | None = None
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch)
            calls.fails, calls.error = failing.__eq__, error
            try:
                write(store, step, "new")
            except (HostError, KeyboardInterrupt) as caught:
                raised = caught
        assert not [name for name in held(store) if name.startswith(".new-")]
        loaded = store.load()
        new = loaded.documents["state"]["name"] == "new"
        assert (loaded.step, loaded.warnings) == (step if new else 2, [])
        if not new:
            assert held(store) == held(two)
        if isinstance(raised, HostError) and "what it replaces could not be removed" in raised.what:
            assert new
        outcomes.append((raised is not None, new))
        write(store, 4)
        assert held(store) == [loaded.path.name, "step-00000004"]
        shutil.rmtree(store.directory.parent)
        if len(calls.log) < failing:
            break
    else:
        pytest.fail("it never came to an end")
    assert {(True, False), (True, True)} <= set(outcomes)
    assert outcomes[-1] == (False, True)


def test_a_name_is_given_when_all_is_on_disk_and_taken_before_anything_is_removed(
    two: Checkpoints, interposed: Callable[[], Calls]
) -> None:
    calls = interposed()
    path = write(two, 3)
    log = calls.log
    temporary, new = f"{two.directory}/.new-step-00000003", f"{two.directory}/step-00000003"
    named = log.index(("rename", temporary, new))
    for file in FILES:
        on = f"{temporary}/{file}"
        writes = [place for place, (call, where, _) in enumerate(log) if (call, where) == ("write", on)]
        assert max(writes) < log.index(("fsync", on, "")) < log.index(("fsync", temporary, "")) < named
    order = [
        place for place, (call, where, _) in enumerate(log) if call == "open" and where.startswith(temporary + "/")
    ]
    assert log[order[-1]][1].endswith("/manifest.json")
    kept = [place for place, entry in enumerate(log) if entry == ("fsync", str(two.directory), "") and place > named]
    taken = log.index(("rename", f"{two.directory}/step-00000001", f"{two.directory}/.old-step-00000001"))
    removed = [place for place, (call, _, _) in enumerate(log) if call in {"unlink", "rmdir"} and place > named]
    assert kept[0] < taken < kept[1] < min(removed)
    assert path == Path(new)


def test_the_folder_itself_is_on_disk_too(store: Checkpoints, interposed: Callable[[], Calls]) -> None:
    calls = interposed()
    write(store, 1)
    made = calls.log.index(("mkdir", str(store.directory), ""))
    assert ("fsync", str(store.directory.parent), "") in calls.log[made:]


def test_a_file_system_that_cannot_sync_folders_is_put_up_with() -> None:
    folder = Path("/proc/self")
    descriptor = os.open(folder, os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(descriptor)
    os.close(descriptor)
    checkpoints._sync(folder)


def test_what_cannot_be_removed_is_said_with_the_new_one_in_place(
    two: Checkpoints, interposed: Callable[[], Calls]
) -> None:
    calls = interposed()
    calls.fails = lambda number: "/.old-" in calls.log[-1][2]
    with pytest.raises(HostError) as caught:
        write(two, 3)
    new = two.directory / "step-00000003"
    assert caught.value.what == f"{new} is written, but what it replaces could not be removed: Input/output error"
    assert two.load().path == new
    calls.fails = lambda number: False
    write(two, 4)
    assert held(two) == ["step-00000003", "step-00000004"]


def limited(size_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def limit() -> Iterator[None]:
    yield from limited(5000)


def test_what_a_limit_forbids_is_an_error_in_words_and_leaks_nothing(tmp_path: Path, limit: None) -> None:
    store = Checkpoints(tmp_path)
    write(store, 1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError) as caught:
        store.write(2, {"model": {"weight": stored(torch.zeros(1_000_000))}}, {})
    words = f"the checkpoint of step 2 could not be written to {store.directory}: File too large; it needs 4.0 MB, and "
    assert caught.value.what.startswith(words)
    assert caught.value.what.endswith(" MB are free")
    assert "--checkpoint-every" in caught.value.fix
    assert "--run-dir" in caught.value.fix
    assert held(store) == ["step-00000001"]
    assert store.load().step == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_larger_than_the_disk_is_refused_before_a_byte_of_it_is_written(two: Checkpoints) -> None:
    disk = os.statvfs(two.directory)
    size_bytes = disk.f_bavail * disk.f_frsize + (1 << 34)
    if size_bytes > 1 << 46:
        pytest.skip("more is free on this disk than a process can address")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, size_bytes, flags=flags, prot=mmap.PROT_READ) as memory:
        with pytest.raises(
            HostError, match=r"^the checkpoint of step 3 could not be written to .* No space left"
        ) as caught:
            two.write(3, {"model": {"weight": Tensor("uint8", (size_bytes,), memory)}}, {})
        assert f"it needs {size_bytes / 1e6:,.1f} MB, and " in caught.value.what
        del caught
    assert held(two) == ["step-00000001", "step-00000002"]


def test_no_run_directory_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        write(Checkpoints(tmp_path / "nowhere"), 1)
    where = tmp_path / "nowhere" / "checkpoints"
    assert caught.value.what == (f"the checkpoint of step 1 could not be written to {where}: No such file or directory")
    assert caught.value.fix == "choose another --run-dir"
    (tmp_path / "checkpoints").write_bytes(b"")
    with pytest.raises(HostError, match="Not a directory"):
        write(Checkpoints(tmp_path), 1)
    with pytest.raises(HostError, match=r"^cannot read .*: Not a directory"):
        Checkpoints(tmp_path).load()
