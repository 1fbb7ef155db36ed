"""Windows and macOS lack some of what Linux has: the scripted server runs with those names taken away."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from machine import openvino_device, with_a_cache

POSIX_ONLY = {
    "os": ["sched_getaffinity", "sysconf", "getuid", "fork"],
    "select": ["poll", "epoll", "kqueue"],
    "signal": ["SIGHUP", "strsignal"],
    "socket": ["MSG_DONTWAIT"],
}
TAKE_AWAY = """
import {module}
for name in {names}:
    if hasattr({module}, name):
        delattr({module}, name)
"""
RUN = """
import sys, json
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import serve_scripted
import os, select
if __name__ == "__main__":
    with serve_scripted({folder!r}) as served:
        plain = served.chat("echo hello")[1]["choices"][0]["message"]["content"]
        stream = "".join(c["choices"][0]["delta"].get("content", "") for c in served.stream("echo hello"))
        died = served.chat("die")[0]
        served.wait_ready()
        again = served.chat("echo back")[1]["choices"][0]["message"]["content"]
    print(json.dumps([plain, stream, died, again, hasattr(select, "poll"), hasattr(os, "sysconf")]))
"""


@pytest.mark.parametrize("gone", [["select"], list(POSIX_ONLY)], ids=["selectors alone", "all"])
def test_without_what_posix_alone_has(tmp_path, gone):
    """sitecustomize runs in every process that is started, so in the engine's too."""
    (tmp_path / "sitecustomize.py").write_text(
        "".join(TAKE_AWAY.format(module=module, names=POSIX_ONLY[module]) for module in gone)
    )
    script = tmp_path / "run.py"
    script.write_text(RUN.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path)))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    plain, stream, died, again, poll, sysconf = json.loads(done.stdout.splitlines()[-1])
    assert (plain, stream, died, again) == ("hello", "hello", 500, "back")
    assert not poll and sysconf == ("os" not in gone)


def test_openvino_devices():
    there = ["CPU", "GPU.0", "GPU.1"]
    assert openvino_device("auto", there) == "CPU"
    for name in ("CPU", "GPU", "GPU.1", "AUTO", "AUTO:GPU,CPU", "HETERO:GPU.1,CPU"):
        assert openvino_device(name, there) == name
    for name, says in (
        ("GPU.2", "no GPU.2 here; there are: CPU, GPU.0, GPU.1"),
        ("NPU", "no NPU"),
        ("HETERO:TPU,CPU", "no TPU"),
    ):
        with pytest.raises(ValueError, match=says):
            openvino_device(name, there)
    assert [with_a_cache(name, there) for name in ("GPU.1", "AUTO", "MULTI:GPU.1,CPU", "CPU")] == [
        "GPU.1",
        "GPU.0",
        "GPU.1",
        "CPU",
    ]
    assert with_a_cache("AUTO", ["CPU"]) == "CPU"
    with pytest.raises(ValueError, match="lies on one device"):
        with_a_cache("HETERO:GPU,CPU", there)
    with pytest.raises(ValueError, match="no continuous batching on an NPU"):
        openvino_device("NPU", [*there, "NPU"])
