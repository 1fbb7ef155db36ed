"""What there is to compute with: cores, memory, devices, and how a library's name for a device is read. Imports no library."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from typing import Any


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: a second thread on a core slows a batch down."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        cores.add(contents(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu))
    return len(cores)


LONG = 32_768  # tokens that one request may use unless the command line says otherwise


def machine_memory() -> int:
    """Bytes, of a container those that it may use; 0 where the system does not say."""
    if not hasattr(os, "sysconf"):
        return 0
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(limit for limit, _ in groups())])


def free_memory() -> int:
    """Bytes that can be taken without anything being swapped out; 0 where the system does not say."""
    free = re.search(r"^MemAvailable: +(\d+) kB", contents("/proc/meminfo"), re.M)
    return max(0, min([int(free[1]) << 10, *(limit - used for limit, used in groups())])) if free else 0


GROUPS = {  # kernel.org: cgroup-v2.rst, cgroup-v1/memory.rst
    2: ("", "memory.max", "memory.current", r"^inactive_file (\d+)"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_inactive_file (\d+)"),
}


def groups(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> list[tuple[int, int]]:
    """(bytes that it may take, bytes taken that are not files nobody reads) of each control group around us that bounds memory."""
    found = []
    for number, controllers, path in (line.split(":", 2) for line in contents(own).splitlines()):
        if number != "0" and "memory" not in controllers.split(","):
            continue
        folder, most, taken, files = GROUPS[2 if number == "0" else 1]
        folder = os.path.join(root, folder)
        for part in ["", *path.strip("/").split("/")]:
            folder = os.path.join(folder, part)
            limit, used = contents(os.path.join(folder, most)).strip(), contents(os.path.join(folder, taken)).strip()
            idle = re.search(files, contents(os.path.join(folder, "memory.stat")), re.M)
            if limit.isdecimal() and used.isdecimal():  # or the word max
                found.append((int(limit), int(used) - int(idle[1] if idle else 0)))
    return found


def contents(path: str) -> str:
    """Of a file of the system's; "" where it has none such."""
    try:
        with open(path, errors="replace") as f:
            return f.read()
    except OSError:
        return ""


def default_cache_tokens(slots: int, context: int, kv_bytes_per_token: int, memory: int | None = None) -> int:
    """KV cache tokens over all slots: up to 4,096 for each, or one long request, within a quarter of `memory` (None: the machine's)."""
    wanted = max(slots * min(context, 4096), min(context, LONG))
    memory = machine_memory() if memory is None else memory
    if kv_bytes_per_token and memory:
        wanted = min(wanted, max(slots * 256, memory // 4 // kv_bytes_per_token))
    return wanted


def openvino_device(asked: str, there: list[str]) -> str:
    """OpenVINO's name for a device, or for several (AUTO:GPU,CPU). Raises ValueError for one that is not there."""
    asked = "CPU" if asked == "auto" else asked
    kind, _, rest = asked.partition(":")
    kinds = {device.partition(".")[0] for device in there}
    missing = [name for name in (rest.split(",") if rest else [] if kind == "AUTO" else [kind]) if name not in {*there, *kinds}]
    if missing or (rest and kind not in ("AUTO", "HETERO", "MULTI")):
        raise ValueError(
            f"--device {asked}: OpenVINO finds no {' and no '.join(missing or [kind])} here; there are: {', '.join(there)}"
        )
    if "NPU" in (kind, *rest.split(",")):
        raise ValueError(f"--device {asked}: OpenVINO has no continuous batching on an NPU; there are: {', '.join(there)}")
    return asked


def with_a_cache(name: str, there: list[str]) -> str:
    """The one device that a model's KV cache lies on. Raises ValueError for a model that would be spread over several."""
    kind, _, rest = name.partition(":")
    if kind not in ("AUTO", "MULTI", "HETERO"):
        return name
    if kind == "HETERO":
        raise ValueError(
            f"--device {name}: the KV cache of a model that generates lies on one device; there are: {', '.join(there)}"
        )
    return rest.split(",")[0] or next((device for device in there if device.startswith("GPU")), "CPU")


def torch_device(torch: Any, asked: str) -> Any:
    """auto: the first GPU that torch sees, else CPU. Raises ValueError for one that is not there."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=asked).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked}: {str(error).splitlines()[0]}") from None


def torch_dtype(torch: Any, asked: str, config: dict[str, Any], device: Any) -> Any:
    """auto: what the weights are stored in; on a CPU without instructions for 16 bits float32, which is far faster there."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if asked == "auto":
        asked = stored if stored in ("float32", "bfloat16", "float16") else "float32"
        if device.type == "cpu" and asked != "float32":
            asked = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    return getattr(torch, asked)


def lacks_cuda(torch: Any) -> str | None:
    """Why exllamav3 cannot run here, in one line. Asked before it is imported, which would begin to compile, or break oddly."""
    if not (torch.version.cuda or torch.version.hip):
        return (
            f"exllamav3 needs a torch that is built for CUDA, and torch {torch.__version__} is for CPU alone: see pytorch.org"
        )
    if not torch.cuda.is_available():
        return "exllamav3 needs a CUDA GPU, and torch sees none"
    if importlib.util.find_spec("exllamav3_ext"):
        return None
    if not shutil.which("ninja"):
        return "exllamav3 compiles its CUDA code when it first runs, which needs ninja on the PATH: pip install ninja"
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")  # where torch looks for nvcc
    if torch.version.cuda and not cuda and not os.path.exists("/usr/local/cuda"):
        return (
            "exllamav3 compiles its CUDA code when it first runs, which needs nvcc: install the CUDA toolkit and set CUDA_HOME"
        )
    return None
