"""The default run of one or more checkouts of this repository, side by side, for several seeds.

    python experiments/default_record.py old=../old new=. --seeds 10 11 12 13 14
    python experiments/default_record.py new=. --json results/quick_cpu.json

For each seed all checkouts run at the same time, each on cores of its own and with an empty cache. The cores
rotate from seed to seed, so that the machine treats the checkouts alike. The JSON file is written after each
seed; a run that is in it, with its commit, is skipped. With one checkout it also holds all metrics and log lines.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from common import commit, made_by, make_parser, read_json, read_log, run_script, write_json

SCRIPTS = ("tokenizer.py", "diffusion.py", "sample.py", "fid.py")
GOAL = {"psnr": 26.5, "linear_probe": 0.92, "class_accuracy": 0.955}  # at least; and
MOST = {"fd_classifier": 1.15}
NAMES = ("seconds", "psnr after stage 1", "psnr", "linear_probe", "fd_classifier", "class_accuracy")

def chain(folder: Path, at: Path, seed: int, cores: list, more: dict) -> None:
    """Run the four commands of a checkout into the empty folder `at`, and write at/seconds.json."""
    os.sched_setaffinity(0, cores)
    tokenizer, model = at / "tokenizer/ckpt.pt", at / "diffusion/ckpt.pt"
    args = {
        "tokenizer.py": ["--seed", seed, "--out", tokenizer.parent],
        "diffusion.py": ["--seed", seed, "--tokenizer", tokenizer, "--out", model.parent],
        "sample.py": ["--seed", seed, "--model", model, "--out", at / "samples"],
        "fid.py": ["--samples", at / "samples/samples.npz"],
    }
    seconds = {}
    for name in SCRIPTS:
        files = {"folder": folder, "log": at / f"{name}.log", "MAETOK_CACHE": str(at / "cache")}
        seconds[name] = round(run_script(name, *args[name], *more.get(name, []), **files), 1)
    write_json(at / "seconds.json", seconds | {"all": round(sum(seconds.values()), 1)})

def side_by_side(cfg, todo: dict[str, Path], seed: int) -> None:
    """Run the chains of several checkouts at once, each pinned to its share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // len(cfg.checkouts)
    children = []
    for name, at in todo.items():
        turn = (list(cfg.checkouts).index(name) + seed) % len(cfg.checkouts)
        mine = cores[turn * share:(turn + 1) * share]
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir(parents=True)
        words = [cfg.checkouts[name], at, seed, json.dumps(mine), json.dumps(cfg.args)]
        command = [sys.executable, __file__, "--chain", *map(str, words)]
        children.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(share)}))
    if sum(child.wait() for child in children):
        sys.exit(f"a run failed: see the logs in {cfg.out}")

def metrics_of(at: Path) -> dict:
    metrics = read_json(at / "tokenizer/metrics.json")
    found = metrics | metrics["stage2"] | read_json(at / "samples/metrics.json")["samples"]
    found |= {"psnr after stage 1": metrics["stage1"]["psnr"], "seconds": read_json(at / "seconds.json")}
    return {name: found[name] for name in NAMES if name in found}

def summary(runs: list[dict], names: list[str]) -> dict:
    """Mean and standard deviation of each checkout, whether it reaches the goal, ratio of the times."""
    rows = {}
    for name in names:
        mine = [run | {"seconds": run["seconds"]["all"]} for run in runs if run["checkout"] == name]
        row = rows[name] = {"seeds": len(mine)}
        for key in NAMES:
            values = [run[key] for run in mine]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            row[key] = [round(statistics.mean(values), 4), round(deviation, 4)]
        row["goal"] = (all(row[key][0] >= least for key, least in GOAL.items())
                       and all(row[key][0] <= most for key, most in MOST.items()))
    first, last = rows[names[0]]["seconds"][0], rows[names[-1]]["seconds"][0]
    return {"rows": rows, "seconds, last / first checkout": round(last / first, 3)}

def main():
    if sys.argv[1:2] == ["--chain"]:
        folder, at, seed, *more = sys.argv[2:]
        return chain(Path(folder), Path(at), int(seed), *map(json.loads, more))
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkouts", nargs="+", metavar="NAME=FOLDER", help="checkouts; the last is compared with the first")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--out", type=Path, default=Path("out/default_record"), help="folder for the runs")
    add("--json", type=Path, help="file to write; default OUT/default_record.json")
    add("--args", type=json.loads, default={}, help='more flags: {"sample.py": ["--steps", "5"]}')
    cfg = parser.parse_args()
    pairs = [word.rpartition("=") for word in cfg.checkouts]
    cfg.checkouts = {name: Path(folder).resolve() for name, _, folder in pairs}
    cfg.out = cfg.out.resolve()
    cfg.json = cfg.json or cfg.out / "default_record.json"

    result = (read_json(cfg.json) if cfg.json.exists() else {}) | made_by("default_record.py")
    runs = result.setdefault("runs", [])
    for seed in cfg.seeds:
        keys = {name: {"checkout": name, "commit": commit(folder), "seed": seed}
                for name, folder in cfg.checkouts.items()}
        todo = {name: cfg.out / f"{name}-{seed}" for name, key in keys.items()
                if not any(key.items() <= run.items() for run in runs)}
        side_by_side(cfg, todo, seed)
        for name, at in todo.items():
            run = keys[name] | metrics_of(at)
            if len(cfg.checkouts) == 1:
                run |= {part: read_json(at / part / "metrics.json") for part in ("tokenizer", "diffusion", "samples")}
                run["log"] = read_log(at / "tokenizer/log.jsonl") + read_log(at / "diffusion/log.jsonl")
            runs.append(run)
        result |= summary(runs, list(cfg.checkouts))
        write_json(cfg.json, result)
        print(f"seed {seed}", json.dumps(result["rows"], indent=1), flush=True)
    return print(f"wrote {cfg.json}; seconds, last / first: {result['seconds, last / first checkout']}")

if __name__ == "__main__":
    main()
