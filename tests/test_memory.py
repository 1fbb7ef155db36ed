"""Pages of 2 MB for the weights, and how much memory there is to compute with."""

import ctypes
import mmap
import re
import sys
import threading
import types

import pytest
from conftest import serve_one, until
from test_backends import QUESTION, ask, text

import libraries
import machine
import memory
import model_init
import openai_api_endpoint as endpoint
from backends import missing_library
from engine import EngineSpec

SIZE = 64 << 20


@pytest.fixture
def moves(monkeypatch):
    """Only where this system moves memory at once."""
    monkeypatch.setattr(memory, "SOON_S", 0.0)
    block = bytearray(b"x") * SIZE
    at = ctypes.addressof(ctypes.c_char.from_buffer(block))
    if not memory.has_huge_pages() or not memory.move_to_huge_pages([(at, at + SIZE)]):
        pytest.skip("this system has no transparent huge pages, or is older than Linux 6.1")


def smaps(pid="self"):
    """(begin, end, kB that are there, and of these in huge pages) for each mapping of a process."""
    with open(f"/proc/{pid}/smaps") as f:
        found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (?s:.*?)^Rss: +(\d+)(?s:.*?)^AnonHugePages: +(\d+)", f.read(), re.M)
    return [(int(begin, 16), int(end, 16), int(rss), int(huge)) for begin, end, rss, huge in found]


def in_huge_pages(pid="self"):
    return sum(huge for *_, huge in smaps(pid)) << 10


def test_what_is_allocated_moves_while_it_is_read_and_written(moves):
    before, others = in_huge_pages(), threading.enumerate()
    with memory.in_huge_pages():
        block = bytearray(b"0123456789abcdef") * (SIZE // 16)
    mover = next(thread for thread in threading.enumerate() if thread.name == "huge-pages" and thread not in others)
    written = 0
    while mover.is_alive():
        block[written % SIZE] = 0x58
        written += 4099
    assert in_huge_pages() - before > SIZE // 2
    fresh = bytearray(b"0123456789abcdef") * (SIZE // 16)
    for at in range(0, written, 4099):
        fresh[at % SIZE] = 0x58
    assert block == fresh


def test_a_vast_block_is_taken_from_its_end(monkeypatch):
    monkeypatch.setattr(memory, "VAST", 2 * SIZE)
    if not sys.platform.startswith("linux") or not memory.madvise(0, 0, memory.MADV_POPULATE_WRITE):
        pytest.skip("this system takes no memory in advance: Linux 5.14 does")
    with memory.taken_from_both_ends():
        block = mmap.mmap(-1, 4 * SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # no page of it is taken
        at = ctypes.addressof(ctypes.c_char.from_buffer(block))

        def taken():
            return max((rss << 10 for begin, end, rss, _ in smaps() if begin <= at < end), default=0)

        until(lambda: taken() > 3 * SIZE, 20)
        block[:SIZE] = b"x" * SIZE
    assert not any(block[at] for at in range(SIZE, 4 * SIZE, 4096)) and block[:SIZE].count(b"x") == SIZE
    with memory.taken_from_both_ends():
        pass  # nothing came: it does not wait for it


def test_what_is_no_memory_any_more_comes_to_no_harm(moves):
    gone = (1 << 46) + memory.HUGE
    assert memory.move_to_huge_pages([(gone, gone + 4 * memory.HUGE)]) == 0
    assert ctypes.string_at(b"still here") == b"still here"


def test_the_weights_are_read_into_them_unless_they_are_to_be_mapped(moves, demo):
    if lack := missing_library("llamacpp"):
        pytest.skip(lack)
    for flags, mapped in (((), False), ((("mmap", "on"),), True)):
        with serve_one(demo, EngineSpec("llamacpp", str(demo.path), 2, 0, 1024, flags=flags)) as served:
            engine = served.models.engine
            first = text(ask(served, QUESTION, temperature=0))
            with open(f"/proc/{engine.process.pid}/maps") as f:
                assert (str(demo.path.resolve()) in f.read()) == mapped
            if not mapped:
                until(lambda: in_huge_pages(engine.process.pid) > 64 << 20)  # noqa: B023
                assert text(ask(served, QUESTION, temperature=0)) == first


@pytest.mark.parametrize("words, given", [
    ("", ()), ("--mmap", (("mmap", "on"),)), ("--no-mmap --mlock", (("mmap", "off"), ("mlock", True))), ("--mmap --no-mmap", (("mmap", "off"),)),
])  # fmt: skip
def test_how_the_weights_are_loaded_is_said(words, given, demo):
    if lack := missing_library("llamacpp"):
        pytest.skip(lack)
    args = endpoint.parse_args(["--backend", "llamacpp", *words.split()])
    assert model_init.init(args).make_spec(demo).flags == given


def test_which_files_are_read(demo, monkeypatch, tmp_path):
    """What fits, on a CPU: else they are mapped, as llama.cpp does by itself, and where that is asked for."""
    if lack := missing_library("llamacpp"):
        pytest.skip(lack)
    import llama_cpp

    monkeypatch.setattr(memory, "has_huge_pages", lambda: True)
    for i in (1, 2):
        with open(tmp_path / f"m-0000{i}-of-00002.gguf", "wb") as f:
            f.truncate(i << 29)  # bytes, none of them written
    one, both = str(demo.path), str(tmp_path / "m-00001-of-00002.gguf")
    modes = {
        "read": llama_cpp.LLAMA_LOAD_MODE_NONE,
        "locked": llama_cpp.LLAMA_LOAD_MODE_MLOCK,
        "left": -7,  # as llama.cpp chose
        "mapped": llama_cpp.LLAMA_LOAD_MODE_MMAP,
        "kept": llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK,
    }
    for path, flags, room, has_gpu, told in (
        (one, {}, 8 << 30, False, "read"),
        (one, {}, 8 << 20, False, "left"),
        (both, {}, 8 << 30, False, "left"),  # together more than 1 GiB
        (one, {}, 8 << 30, True, "left"),
        (one, {"gpu_layers": 0}, 8 << 30, True, "read"),
        (one, {"mlock": True}, 8 << 30, False, "locked"),
        (both, {"mlock": True}, 8 << 30, False, "kept"),
        (one, {"mmap": "on"}, 8 << 30, False, "mapped"),
        (both, {"mmap": "off"}, 8 << 30, False, "read"),
    ):
        monkeypatch.setattr(libraries, "free_memory", lambda room=room: room)
        model = libraries.LlamaModel.__new__(libraries.LlamaModel)
        model.lib, model.flags, model.keep = llama_cpp, flags, []
        monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda has=has_gpu: has)
        params = types.SimpleNamespace(n_gpu_layers=-1, main_gpu=0, load_mode=-7)
        assert model.place(params, path).load_mode == modes[told], (path, flags, room)


@pytest.mark.parametrize("own, files, found", [
    ("0::/a/b\n", {"memory.max": "max", "a/memory.max": "3000", "a/memory.current": "1000", "a/memory.stat": "anon 1\ninactive_file 400\n",
                   "a/b/memory.max": "2000", "a/b/memory.current": "500"}, [(3000, 600), (2000, 500)]),
    ("0::/\n4:memory:/docker/x\n1:cpu:/\n", {"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "100",
                                             "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 40\n"}, [(5000, 60)]),
    ("", {}, []),
])  # fmt: skip
def test_a_container_has_the_memory_that_it_may_use(own, files, found, tmp_path, monkeypatch):
    for name, said in {"own": own, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(said)
    assert machine.groups(str(tmp_path), str(tmp_path / "own")) == found
    if machine.free_memory():
        assert machine.free_memory() <= machine.machine_memory()
        monkeypatch.setattr(machine, "groups", lambda: [(1 << 20, 1000), (1 << 19, 300)])
        assert (machine.free_memory(), machine.machine_memory()) == ((1 << 19) - 300, 1 << 19)
