"""Time the default run of one or more checkouts of this repository, side by side.

    python experiments/default_speed.py old=../old new=. --whole --seeds 0 1
    python experiments/default_speed.py old=../old new=. --steps "tokenizer.py --stage2-steps 0"
    python experiments/default_speed.py new=. --whole --json results/quick_cpu.json

--whole runs the four commands of the README in each checkout in turn, with an empty cache. The JSON file is
written after every run; a run that is in it, with its commit, is skipped. With one checkout it also holds all
metrics and log lines.
--steps times the steps of a training command: a process per checkout, one step of each in turn. For stage 2
say "tokenizer.py --steps 1", for the generator "diffusion.py --tokenizer CKPT".
"""
import json
import os
import runpy
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from common import MARK, commit, in_turn, made_by, make_parser, read_json, read_log, run_script, write_json
from torch.optim.optimizer import register_optimizer_step_post_hook

SCRIPTS = ("tokenizer.py", "diffusion.py", "sample.py", "fid.py")


def chain(folder: Path, at: Path, seed: int, more: dict) -> dict:
    """Run the four commands of a checkout into the empty folder `at`: their seconds and the main metrics."""
    tokenizer, model = at / "tokenizer/ckpt.pt", at / "diffusion/ckpt.pt"
    args = {
        "tokenizer.py": ["--seed", seed, "--out", tokenizer.parent],
        "diffusion.py": ["--seed", seed, "--tokenizer", tokenizer, "--out", model.parent],
        "sample.py": ["--seed", seed, "--model", model, "--out", at / "samples"],
        "fid.py": ["--samples", at / "samples/samples.npz"],
    }
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True)
    seconds = {}
    for name in SCRIPTS:
        files = {"folder": folder, "log": at / f"{name}.log", "MAETOK_CACHE": str(at / "cache")}
        seconds[name] = round(run_script(name, *args[name], *more.get(name, []), **files), 1)
        print(f"  {name} {seconds[name]} s", flush=True)
    seconds["all"] = round(sum(seconds.values()), 1)

    metrics = read_json(at / "tokenizer/metrics.json")
    scores = read_json(at / "samples/metrics.json")["samples"]
    main = {name: scores[name] for name in ("fd_classifier", "class_accuracy")}
    return {"seconds": seconds, "psnr after stage 1": metrics["stage1"]["psnr"],
            "psnr": metrics["stage2"]["psnr"], "linear_probe": metrics["linear_probe"], **main}


def whole(cfg, result: dict) -> None:
    """The default chain of each checkout in turn, for each seed."""
    runs = result.setdefault("runs", [])
    for seed in cfg.seeds:
        for name, folder in cfg.checkouts.items():
            key = {"checkout": name, "commit": commit(folder), "seed": seed}
            if any(key.items() <= run.items() for run in runs):
                continue
            print(*key.values(), flush=True)
            at = cfg.out / f"{name}-{seed}"
            run = key | chain(folder, at, seed, cfg.args)
            if len(cfg.checkouts) == 1:
                parts = ("tokenizer", "diffusion", "samples")
                run |= {part: read_json(at / part / "metrics.json") for part in parts}
                run["log"] = read_log(at / "tokenizer/log.jsonl") + read_log(at / "diffusion/log.jsonl")
            runs.append(run)

            seconds = {}
            for run in runs:
                seconds.setdefault(run["checkout"], []).append(run["seconds"]["all"])
            means = [round(statistics.mean(values), 1) for values in seconds.values()]
            result["mean seconds"] = dict(zip(seconds, means))
            result["last / first checkout"] = round(means[-1] / means[0], 3)
            write_json(cfg.json, result)


def steps(cfg, result: dict) -> None:
    """Milliseconds a step of one training command, in each checkout."""
    script, *args = cfg.steps
    commands = {}
    for name, folder in cfg.checkouts.items():
        cache, out = cfg.out / f"cache-{name}", cfg.out / f"steps-{name}-{time.time():.0f}"
        commands[name] = [sys.executable, __file__, "--worker", cache, folder / script, *args, "--out", out]
    seconds = in_turn(commands, cfg.rounds, warmup=5)

    row = {name: round(1000 * statistics.median(values), 1) for name, values in seconds.items()}
    turns = zip(*seconds.values())  # within a turn the drift of the machine cancels
    row["last / first checkout"] = round(statistics.median(turn[-1] / turn[0] for turn in turns), 3)
    result.setdefault("ms_per_step", {})[shlex.join(cfg.steps)] = row
    print(row)
    write_json(cfg.json, result)


def worker(cache: str, script: str, *args: str) -> None:
    """Run a training script, but after each step answer with its seconds and wait for a line on stdin."""
    os.environ["MAETOK_CACHE"] = cache
    sys.stdin.readline()
    begin = time.perf_counter()

    def after_step(optimizer, *_):
        nonlocal begin
        if isinstance(optimizer, torch.optim.AdamW):  # one step of it per training step, with or without Muon
            print(f"\n{MARK}{time.perf_counter() - begin}", flush=True)
            sys.stdin.readline()
            begin = time.perf_counter()

    register_optimizer_step_post_hook(after_step)
    sys.path[0] = str(Path(script).parent)
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkouts", nargs="+", metavar="NAME=FOLDER", help="checkouts; the last is compared with the first")
    add("--whole", action="store_true", help="run the whole default chain (this is so without --steps)")
    add("--steps", type=shlex.split, help="training command, without --out; time its steps")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of --whole")
    add("--rounds", type=int, default=80, help="steps of each checkout, after five to warm up")
    add("--out", type=Path, default=Path("out/default_speed"), help="folder for the runs")
    add("--json", type=Path, help="file to write; default OUT/default_speed.json")
    add("--args", type=json.loads, default={}, help='more flags of --whole: {"sample.py": ["--steps", 5]}')
    cfg = parser.parse_args()
    pairs = [word.rpartition("=") for word in cfg.checkouts]
    cfg.checkouts = {name: Path(folder).resolve() for name, _, folder in pairs}
    cfg.out = cfg.out.resolve()
    cfg.json = cfg.json or cfg.out / "default_speed.json"

    result = (read_json(cfg.json) if cfg.json.exists() else {}) | made_by("default_speed.py")
    if cfg.steps:
        steps(cfg, result)
    if cfg.whole or not cfg.steps:
        whole(cfg, result)
    return print(f"wrote {cfg.json}")


if __name__ == "__main__":
    main()
