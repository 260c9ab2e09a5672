"""What the experiments share: scripts, clocks, figures, JSON files."""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # data.py, fid.py, tokenizer.py, diffusion.py
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def make_parser(doc: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw)

def run_script(name: str, *args, folder=ROOT, log=None, processes: int = 1, limit: float = 0,
               **env) -> float:
    """Run FOLDER/NAME with this Python; returns seconds. A failure raises and names the log file.

    After `limit` seconds it is killed, with its processes.
    """
    command = ["timeout", "-s", "KILL", str(limit)] * (limit > 0) + [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(word) for word in (Path(folder) / name, *args)]

    begin = time.perf_counter()
    with open(log or os.devnull, "a") as output:
        streams = {"stdout": output, "stderr": output} if log else {}
        done = subprocess.run(command, check=False, env=os.environ | env, **streams)
    seconds, how = time.perf_counter() - begin, f"ended with status {done.returncode}"
    if done.returncode:
        how = f"took more than {limit:.0f} s" if 0 < limit < seconds else how
        raise RuntimeError(f"{name} {how}; see {log or 'above'}")
    return seconds

def clock() -> float:
    """Seconds, when the device has done its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

def in_turn(works: dict, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each function; one call of each in turn."""
    seconds = {name: [] for name in works}
    for _ in range(warmup + rounds):
        for name, work in works.items():
            begin = clock()
            work()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(of[warmup:]) for name, of in seconds.items()}

def seconds(work: Callable, rounds: int = 5, warmup: int = 2) -> float:
    return in_turn({"": work}, rounds, warmup)[""]

def matmul_tflops(size: int, dtype=torch.bfloat16, rounds: int = 5) -> float:
    """What a large matrix product reaches: the ceiling. Size 0: by device."""
    size = size or (8192 if DEVICE.type == "cuda" else 2048)
    a = torch.randn(size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a, rounds) / 1e12

def figure(path, panels: dict, x: str, y: str, style: str = "o-", scale="linear") -> None:
    """In each panel a curve (x values, y values) per name; more than three panels: in two rows."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        sys.exit("figures need matplotlib: pip install matplotlib")
    plt.switch_backend("agg")
    rows, colors = 1 + (len(panels) > 3), plt.cm.tab20.colors
    columns = -(-len(panels) // rows)
    plot, axes = plt.subplots(rows, columns, figsize=(3 + 4 * columns, 4 * rows),
                              sharey="row", squeeze=False, layout="constrained")
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        ax.set_prop_cycle(color=colors[::2] + colors[1::2])  # the pale ones last
        for name, points in curves.items():
            ax.plot(*points, style, label=name)
        ax.set(title=title, xlabel=x, ylabel=y)
        if scale != "linear":  # setting that would lose names on the axis
            ax.set_xscale(scale)
    plot.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    plot.savefig(path, dpi=110)

def commit(folder=ROOT) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip()

def made_by(script: str) -> dict[str, str]:
    """The first fields of a result: script, commit, hardware."""
    info = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    processor = (names or [platform.processor()])[0]
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    hardware = f"{os.cpu_count()} cores of {processor}, {gpu}, torch {torch.__version__}"
    return {"script": f"experiments/{script}", "commit": commit(), "hardware": hardware}

def read_json(path):
    return json.loads(Path(path).read_text())

def read_log(path) -> list[dict]:
    """Its lines; of a step that came again after a kill the last one."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]
    return list({(line["stage"], line["step"]): line for line in lines}.values())

def write_json(path, content: dict) -> None:
    """The file is whole or it is not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)
