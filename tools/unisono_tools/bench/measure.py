"""Clocks and ceilings."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch

WARM_UP = 3
LOCK = f"{tempfile.gettempdir()}/unisono-bench-{os.getuid()}.lock"  # of a user: another could not open it


@contextlib.contextmanager
def held(lock: str, how: int) -> Iterator[None]:
    """fcntl.LOCK_EX: alone, to time; LOCK_SH: beside others that compile. Who waits to be alone goes before who comes later."""
    with pathlib.Path(f"{lock}.turn").open("w") as turn, pathlib.Path(lock).open("w") as file:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(file, how)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield


def median_ms(calls: Sequence[Callable[[], object]], device: str, repeats: int) -> float:
    """The median of `repeats` rounds over `calls`, each on its own input set, so that no input is still in a cache."""
    for _ in range(WARM_UP):
        for call in calls:
            call()
    if device == "cpu":
        times = []
        for index in range(repeats * len(calls)):
            begin = time.perf_counter()
            calls[index % len(calls)]()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)
    count = repeats * len(calls)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # tens of milliseconds in which the host runs ahead, so that no launch is waited for
    for index, (begin, end) in enumerate(marks):
        begin.record()
        calls[index % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def throughput_ms(calls: Sequence[Callable[[], object]], wait: Callable[[object], object], repeats: int) -> float:
    """For a framework without events: the median over rounds of a round's time a call, waited for once a round."""
    for _ in range(WARM_UP):
        wait([call() for call in calls])
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        wait([call() for call in calls])
        times.append(1e3 * (time.perf_counter() - begin) / len(calls))
    return statistics.median(times)


def kernels_ms(calls: Sequence[Callable[[], object]], wait: Callable[[object], object], repeats: int) -> float:
    """On a GPU, beside another framework: the median over `repeats` rounds of what a call's kernels take on the device, as CUPTI records
    them; neither the host's time nor gaps between kernels are part of it."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARM_UP):
        for call in calls:
            wait(call())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            for call in calls:
                wait(call())
        torch.cuda.synchronize()
    recorded = profiler.events() or ()
    events = sorted((e for e in recorded if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    return per_call([e.device_time for e in events], repeats * len(calls)) / 1e3


def per_call(times: Sequence[float], count: int) -> float:
    """The median sum of `count` calls that take equally many of `times`, in order."""
    each, rest = divmod(len(times), count)
    if rest or not each:
        raise RuntimeError(f"kernels: got {len(times)} of {count} calls; give calls that launch equally many, at least one")
    return statistics.median(sum(times[first : first + each]) for first in range(0, len(times), each))


def graphed(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The same calls as CUDA graphs: what a host takes to launch them is no part of their time."""
    found = []
    for call in calls:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        found.append(lambda graph=graph, kept=kept: graph.replay())
    return found


def ceilings(device: str) -> dict[str, float]:
    """What this device does at best: bytes a second of a large copy (read plus written), FLOP a second of a bf16 matmul."""
    size, side = (1 << 30, 8192) if device == "cuda" else (1 << 25, 512)
    sources = [torch.randint(0, 255, (size,), dtype=torch.uint8, device=device) for _ in range(3)]
    target = torch.empty_like(sources[0])
    copy = median_ms([lambda s=s: target.copy_(s) for s in sources], device, 7)
    matrices = [torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(3)]
    product = median_ms([lambda m=m: m @ matrices[0] for m in matrices], device, 5)
    return {"copy_bytes_per_s": 2 * size / copy * 1e3, "matmul_flop_per_s": 2 * side**3 / product * 1e3}


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Memory a call takes beyond what was held before it; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held
