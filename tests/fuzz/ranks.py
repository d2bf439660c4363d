"""Ranks that are killed or stopped while they learn: do the others end, with an error of ours, in bounded time?

    python tests/fuzz/ranks.py [--moments 10] [--limit 10] [--seed 0]

Two ranks learn from a tiny model. At a random moment one of them (the first or the second) is killed, or stopped as a
debugger does it. The other must end with a DistributedError, within ``--limit`` seconds and a little: what a rank does
between two collectives.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from conftest import TinyTransformer, ddim
import fxmask
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = TinyTransformer(8, 4).eval()
inputs = {{"x": torch.randn(2, 6, 4)}}
runs = [fxmask.record(model, ddim(), num_inference_steps=10, example_inputs=inputs, seed=seed) for seed in range(4)]
program = fxmask.capture(model, runs[0].calls[0][0])
print("learning", flush=True)
try:
    while True:
        fxmask.learn(program, runs, speedup=1.7, progress=False)
except fxmask.DistributedError as error:
    print("DistributedError:", error, flush=True)
    os._exit(3)
"""
SLACK = 30.0  # seconds: a machine that does other things too


def try_once(rng: random.Random, limit: float) -> tuple[str, str, float]:
    """What was done to which rank; what the other one said; seconds until it ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "FXMASK_RANK_TIMEOUT": str(limit),
    }
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).resolve().parents[1]))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(k)}, **pipes) for k in range(2)]  # type: ignore[call-overload]
    try:
        for rank in ranks:
            assert rank.stdout.readline().strip() == "learning"
        time.sleep(rng.uniform(0.0, 6.0))
        victim, how = rng.randrange(2), rng.choice([signal.SIGKILL, signal.SIGSTOP])
        ranks[victim].send_signal(how)
        start, other = time.monotonic(), ranks[1 - victim]
        try:
            said, _ = other.communicate(timeout=limit + SLACK)
        except subprocess.TimeoutExpired:
            said = "nothing, and did not end"
        return f"rank {victim} {how.name}", f"{other.returncode}: {said.strip()[:100]}", time.monotonic() - start
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def is_right(said: str) -> bool:
    return said.startswith("3: DistributedError: rank ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--limit", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, wrong = random.Random(options.seed), 0
    for _ in range(options.moments):
        what, said, seconds = try_once(rng, options.limit)
        wrong += not is_right(said)
        print(f"{what:<16} {seconds:5.1f} s  {said}", flush=True)
    print(f"{options.moments} moments, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
