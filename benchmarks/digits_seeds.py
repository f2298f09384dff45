"""The demonstration's figures over several seeds, without a server: `make study`.

Each seed draws its own split, service, bundle and attacks. Prints one table and, with --json, a file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

FALSE_ALARM_RATE = 0.02


def one_seed(seed: int) -> dict[str, Any]:
    """Figures of one seed, and the seconds of its stages."""
    from fides_plugins.demo.digits import load_digits_split, train_service
    from fides_plugins.demo.hosts import Deployment, InProcessHost
    from fides_plugins.demo.run import fit_digits, measure

    times: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        times[name] = times.get(name, 0.0) + now - began
        began = now

    split = load_digits_split(seed)
    with tempfile.TemporaryDirectory() as folder:
        service = train_service(split.service, seed)
        (Path(folder) / "service.onnx").write_bytes(service)
        lap("train the service")
        bundle = fit_digits(Path(folder), split, seed, lambda stage, *_: lap(stage))
        lap("fit")
        with InProcessHost(Deployment(service, bundle, Path(folder), FALSE_ALARM_RATE, seed)) as host:
            figures = measure(host, host.deployment, split).as_json()
        lap("measure")
    return {"seed": seed, "seconds": {k: round(v, 1) for k, v in times.items()}, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(one_seed, range(arguments.seeds)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    for r in results:
        shares = {
            "service": r["service_accuracy"],
            "agreement": r["agreement"],
            "false alarms": r["false_alarms"],
            "simple rule's": r["disagreement_false_alarms"],
        }
        attacks = {n: f"{f['caught']['value']:.3f}/{f['recovered']['value']:.3f}" for n, f in r["attacks"].items()}
        print(f"seed {r['seed']}: " + ", ".join(f"{k} {v['value']:.4f}" for k, v in shares.items()))
        print(f"    caught/recovered {attacks}, seconds {r['seconds']}")
    for what in ("false_alarms", "agreement"):
        print(f"mean {what}: {sum(r[what]['value'] for r in results) / len(results):.4f}")
    for attack in results[0]["attacks"]:
        means = {
            k: sum(r["attacks"][attack][k]["value"] for r in results) / len(results)
            for k in ("caught", "caught_by_disagreement", "recovered")
        }
        print(f"mean {attack}: { ({k: round(v, 4) for k, v in means.items()}) }")


if __name__ == "__main__":
    main()
