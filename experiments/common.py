"""What the experiments share: run a script, time processes in turn, describe the machine, write JSON."""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # data.py, fid.py, tokenizer.py, diffusion.py, sample.py
MARK = "@seconds "


def make_parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_script(name: str, *args, folder=ROOT, log=None, processes: int = 1, **env) -> float:
    """Run FOLDER/NAME with this Python; returns seconds. A failure raises and names the log file."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(word) for word in (Path(folder) / name, *args)]

    begin = time.perf_counter()
    with open(log or os.devnull, "a") as output:
        streams = {"stdout": output, "stderr": output} if log else {}
        done = subprocess.run(command, check=False, env=os.environ | env, **streams)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}; see {log or 'above'}")
    return time.perf_counter() - begin


def in_turn(commands: dict[str, list], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of each command. Each is a process like `serve`; one step of each in turn."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = {name: subprocess.Popen([*map(str, command)], **pipes) for name, command in commands.items()}
    seconds = {name: [] for name in commands}
    try:
        for _ in range(warmup + rounds):
            for name, child in children.items():
                print(file=child.stdin, flush=True)
                answer = next((line for line in child.stdout if line.startswith(MARK)), None)
                if answer is None:
                    raise RuntimeError(f"{name} ended before its last step")
                seconds[name].append(float(answer[len(MARK):]))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return {name: values[warmup:] for name, values in seconds.items()}


def serve(step) -> None:
    """In a child of `in_turn`: one step per line of stdin."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        print(f"{MARK}{time.perf_counter() - begin}", flush=True)


def pyplot():
    """matplotlib.pyplot, to draw into files."""
    try:
        import matplotlib.pyplot as plot
    except ModuleNotFoundError:
        sys.exit("figures need matplotlib: pip install matplotlib")
    plot.switch_backend("agg")
    return plot


def commit(folder=ROOT) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def made_by(script: str) -> dict[str, str]:
    """The first fields of a result: script, commit, hardware."""
    info = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    processor = (names or [platform.processor()])[0]
    hardware = f"{os.cpu_count()} cores of {processor}, {gpu}, torch {torch.__version__}"
    return {"script": f"experiments/{script}", "commit": commit(), "hardware": hardware}


def read_json(path):
    return json.loads(Path(path).read_text())


def read_log(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_json(path, content: dict) -> None:
    """The file is whole or it is not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)
