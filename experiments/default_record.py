"""The default run of one or more checkouts of this repository, side by side, for several seeds.

    python experiments/default_record.py old=../old new=. --seeds 10 11 12 13 14
    python experiments/default_record.py new=. --json results/quick_cpu.json

For each seed all checkouts run at the same time, each on cores of its own and with an empty
cache. The cores rotate from seed to seed, so that the machine treats the checkouts alike. The
JSON file is written after each seed; a run that is in it, with its commit, is skipped. With one
checkout it also holds all metrics and log lines.
"""
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import commit, made_by, make_parser, read_json, read_log, run_script, write_json

GOAL = {"psnr": 26.5, "linear_probe": 0.92, "class_accuracy": 0.955}  # at least
NAMES = "psnr after stage 1", *GOAL, "fd_classifier"

def chain(folder: Path, at: Path, seed: int, cores, more: dict) -> dict:
    """Run the four commands of a checkout into `at`. Returns seconds and scores."""
    os.sched_setaffinity(0, cores)  # of this thread and what it starts
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True)
    tokenizer, model = at / "tokenizer/ckpt.pt", at / "diffusion/ckpt.pt"
    args = {
        "tokenizer.py": ["--seed", seed, "--out", tokenizer.parent],
        "diffusion.py": ["--seed", seed, "--tokenizer", tokenizer, "--out", model.parent],
        "sample.py": ["--seed", seed, "--model", model, "--out", at / "samples"],
        "fid.py": ["--samples", at / "samples/samples.npz"]}
    env = {"MAETOK_CACHE": str(at / "cache"), "OMP_NUM_THREADS": str(len(cores))}
    seconds = {}
    for name, words in args.items():
        how = {"folder": folder, "log": at / f"{name}.log"} | env
        seconds[name] = round(run_script(name, *words, *more.get(name, []), **how), 1)

    metrics = read_json(at / "tokenizer/metrics.json")
    found = metrics | {"psnr after stage 1": metrics["stage1"]["psnr"]} | metrics["stage2"]
    found |= read_json(at / "samples/metrics.json")["samples"]
    seconds["all"] = round(sum(seconds.values()), 1)
    return {"seconds": seconds} | {name: found[name] for name in NAMES if name in found}

def summary(runs: list[dict], names: list[str]) -> dict:
    """Mean and standard deviation of each checkout, whether it reaches the goal, ratio of times."""
    rows = {}
    for name in names:
        mine = [run for run in runs if run["checkout"] == name]
        row = rows[name] = {"seeds": len(mine)}
        for key in ("seconds", *NAMES):
            values = [run[key]["all"] if key == "seconds" else run[key] for run in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row[key] = [round(statistics.mean(values), 4), round(spread, 4)]
        reached = [row[key][0] >= least for key, least in GOAL.items()]
        row["goal"] = all(reached) and row["fd_classifier"][0] <= 1.15
    first, last = rows[names[0]]["seconds"][0], rows[names[-1]]["seconds"][0]
    return {"rows": rows, "seconds, last / first checkout": round(last / first, 3)}

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkouts", nargs="+", metavar="NAME=FOLDER", help="the last is compared with the first")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--out", type=Path, default=Path("out/default_record"), help="folder for the runs")
    add("--json", type=Path, help="file to write; default OUT/default_record.json")
    add("--args", type=json.loads, default={}, help='more flags: {"sample.py": ["--steps", "5"]}')
    cfg = parser.parse_args()
    pairs = [word.rpartition("=") for word in cfg.checkouts]
    names, folders = [pair[0] for pair in pairs], [Path(pair[2]).resolve() for pair in pairs]
    out, n = cfg.out.resolve(), len(pairs)
    path = cfg.json or out / "default_record.json"

    result = (read_json(path) if path.exists() else {}) | made_by("default_record.py")
    runs, cores = result.setdefault("runs", []), sorted(os.sched_getaffinity(0))
    share = len(cores) // n
    for seed in cfg.seeds:
        jobs = []
        with ThreadPoolExecutor(n) as pool:
            for i, (name, folder) in enumerate(zip(names, folders)):
                key = {"checkout": name, "commit": commit(folder), "seed": seed}
                if not any(key.items() <= run.items() for run in runs):
                    at, turn = out / f"{name}-{seed}", (i + seed) % n * share
                    mine = cores[turn:turn + share]
                    jobs.append((key, at, pool.submit(chain, folder, at, seed, mine, cfg.args)))
        for key, at, job in jobs:
            try:
                run = key | job.result()
            except RuntimeError as error:
                sys.exit(f"default_record.py: {error}")
            for part in ("tokenizer", "diffusion", "samples") if n == 1 else ():
                run[part] = read_json(at / part / "metrics.json")
                logs = at.glob(f"{part}/log.jsonl")  # samples have none
                run.setdefault("log", []).extend(line for log in logs for line in read_log(log))
            runs.append(run)
        result |= summary(runs, names)
        write_json(path, result)
        print(f"seed {seed}", json.dumps(result["rows"], indent=1), flush=True)
    print(f"wrote {path}; last / first: {result['seconds, last / first checkout']} of the seconds")

if __name__ == "__main__":
    main()
