"""Run a training script with several settings and seeds, and put what comes out side by side.

    # Muon or AdamW for the generator?
    python experiments/compare.py "muon=diffusion.py --steps 400" \\
        "adamw=diffusion.py --steps 400 --optimizer adamw --lr 4e-3"
    # Do one and two processes train alike? A log line a step.
    python experiments/compare.py --processes 1 2 \\
        "fp32=tokenizer.py --steps 20 --stage2-steps 20 --save-every 1 --precision fp32"

A run whose metrics.json is in OUT is not repeated. A row of OUT/compare.json holds the metrics of a run and
the last log line of each stage. With two numbers of processes it also says how far the losses differ.
"""
import shlex
from pathlib import Path

from common import made_by, make_parser, read_json, read_log, run_script, write_json


def differences(one: list[dict], other: list[dict]) -> dict[str, float]:
    """The largest relative difference of the pixel loss or diffusion loss of two runs, for each stage."""
    worst = {line["stage"]: 0.0 for line in one}
    for a, b in zip(one, other, strict=True):
        name = "recon" if "recon" in a else "loss"
        worst[a["stage"]] = max(worst[a["stage"]], abs(a[name] - b[name]) / abs(a[name]))
    return worst


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("variants", nargs="+", metavar="NAME=COMMAND", help="script and flags, without --seed and --out")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--processes", type=int, nargs="+", default=[1], help="numbers of processes to run each with")
    add("--out", type=Path, default=Path("out/compare"), help="folder for the runs")
    cfg = parser.parse_args()

    variants = dict(variant.split("=", 1) for variant in cfg.variants)
    result = made_by("compare.py") | {"variants": variants, "rows": {}}
    for name, command in variants.items():
        script, *args = shlex.split(command)
        for seed in cfg.seeds:
            logs = []
            for processes in cfg.processes:
                row = f"{name}, seed {seed}, {processes} process(es)"
                out = cfg.out / row
                if not (out / "metrics.json").exists():
                    run_script(script, *args, "--seed", seed, "--out", out, processes=processes)
                logs.append(read_log(out / "log.jsonl"))
                last = {line["stage"]: line for line in logs[-1]}
                result["rows"][row] = read_json(out / "metrics.json") | {"last log line": last}
            if len(logs) == 2:
                result["rows"][row]["differences"] = differences(*logs)
            write_json(cfg.out / "compare.json", result)


if __name__ == "__main__":
    main()
