"""Run a training script with several settings and seeds; put what comes out side by side.

    # Muon or AdamW for the generator?
    python experiments/compare.py "muon=diffusion.py --steps 400" \\
        "adamw=diffusion.py --steps 400 --optimizer adamw --lr 4e-3"
    # Do one and two processes train alike? A log line a step.
    python experiments/compare.py --processes 1 2 \\
        "fp32=tokenizer.py --steps 20 --stage2-steps 20 --save-every 1 --precision fp32"

A run whose metrics.json is in OUT is not repeated. A row of OUT/compare.json holds its metrics
and the last log line of each stage, and how far its losses are from the first number of
processes: the largest relative difference of the pixel loss or diffusion loss.
"""
import itertools  # noqa: I001
import shlex
from pathlib import Path

from common import made_by, make_parser, read_json, read_log, run_script, write_json

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("variants", nargs="+", metavar="NAME=COMMAND", help="without --seed and --out")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--processes", type=int, nargs="+", default=[1], help="numbers of processes")
    add("--out", type=Path, default=Path("out/compare"), help="folder for the runs")
    cfg = parser.parse_args()

    variants = dict(variant.split("=", 1) for variant in cfg.variants)
    result = made_by("compare.py") | {"variants": variants, "rows": {}}
    for name, seed, n in itertools.product(variants, cfg.seeds, cfg.processes):
        row = f"{name}, seed {seed}, {n} process(es)"
        out, (script, *args) = cfg.out / row, shlex.split(variants[name])
        if not (out / "metrics.json").exists():
            run_script(script, *args, "--seed", seed, "--out", out, processes=n)
        log, differences = read_log(out / "log.jsonl"), {}
        if n == cfg.processes[0]:
            first = log
        for a, b in zip(first, log, strict=True):
            loss = "recon" if "recon" in a else "loss"
            far = abs(a[loss] - b[loss]) / abs(a[loss])
            differences[a["stage"]] = max(far, differences.get(a["stage"], 0))
        result["rows"][row] = read_json(out / "metrics.json") | {
            "last log line": {line["stage"]: line for line in log}, "differences": differences}
        write_json(cfg.out / "compare.json", result)

if __name__ == "__main__":
    main()
