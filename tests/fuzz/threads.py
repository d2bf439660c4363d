"""Threads of one server: known and new forms of call, bad calls, exceptions, new weights, captures; is every good call right?

    python tests/fuzz/threads.py [--seconds 60] [--threads 8] [--backend eager] [--seed 0]

Each thread runs whole generations of one accelerated model with its own noise. Some are of a form that was seen before, some of
a new one; some calls are malformed, some runs end with an exception. One more thread replaces weights from time to time, with
all others held; one uses the original model. A good run is right if each of its results is that of an accelerated model which
no other thread ever saw: bit for bit with the eager backend. What is malformed must fail with an error of PyTorch's or of
ours in its own thread, and nowhere else.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import TIMESTEPS, TinyTransformer, every_other

import fxmask

FORMS = [(batch, tokens) for batch in (1, 2, 3) for tokens in (4, 6, 9)]
SCALES = (1.0, 1.5, 0.75)  # of the weights, one after the other


def calls_of(form: tuple[int, int], seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(*form, 4, generator=generator), "t": torch.tensor(int(t))} for t in TIMESTEPS]


def malformed(form: tuple[int, int], rng: random.Random) -> dict[str, Any]:
    x = torch.randn(*form, 4)
    return rng.choice(
        [
            {"x": torch.randn(*form, 5), "t": torch.tensor(900)},
            {"x": torch.randn(form[0], rng.randint(6, 30), 3), "t": torch.tensor(900)},
            {"x": x},
            {"x": x, "t": torch.tensor(900), "y": 3},
            {"x": "no tensor", "t": torch.tensor(900)},
            {"x": x.to(torch.complex64), "t": torch.tensor(900)},
        ]
    )


class Crowd:
    """One accelerated model, and threads that use it.

    Attributes:
        counts: of good runs, bad calls and what else happened.
        wrong: descriptions of what was not right.
    """

    def __init__(self, backend: str = "eager", seed: int = 0, forms: int = len(FORMS)) -> None:
        torch.manual_seed(seed)
        self.model = TinyTransformer().eval()
        self.weights = [p.detach().clone() for p in self.model.parameters()]
        self.backend, self.seed, self.forms = backend, seed, FORMS[:forms]
        self.accelerated = self._accelerated(self.model)
        self.scale = 0
        self.alone = [self._alone(k) for k in range(len(SCALES))]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._gate = threading.Condition()
        self._inside, self._closed = 0, False

    def _alone(self, scale: int) -> fxmask.AcceleratedModel:
        """One that was made in the same way, and has seen every form and these weights before any thread began."""
        model = TinyTransformer().eval()
        parameters = list(model.parameters())
        with torch.no_grad():
            for p, q in zip(parameters, self.weights, strict=True):
                p.copy_(q)
            accelerated = self._accelerated(model)
            for p, q in zip(parameters, self.weights, strict=True):
                p.copy_(q * SCALES[scale])
            for form in self.forms:
                for call in calls_of(form, 0):
                    accelerated(**call)
        return accelerated

    def _accelerated(self, model: torch.nn.Module) -> fxmask.AcceleratedModel:
        program = fxmask.capture(model, calls_of((2, 6), 0)[0])
        return fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend=self.backend)

    def expected(self, form: tuple[int, int], scale: int, seed: int) -> list[torch.Tensor]:
        accelerated = self.alone[scale]
        with accelerated.generation():
            return [accelerated(**call) for call in calls_of(form, seed)]

    def run(self, seconds: float, threads: int = 8) -> None:
        workers = [threading.Thread(target=self._guarded, args=(self._client, k)) for k in range(threads)]
        workers += [threading.Thread(target=self._guarded, args=(role, 99)) for role in (self._replace_weights, self._original)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for worker in workers:
                worker.start()
            time.sleep(seconds)
            self._stop.set()
            for worker in workers:
                worker.join()

    def _guarded(self, work: Any, k: int) -> None:
        try:
            work(random.Random(1000 * self.seed + k))
        except Exception as error:
            self.wrong.append(f"{work.__name__}: {''.join(traceback.format_exception(error))}")

    @torch.no_grad()
    def _client(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            with self._gate:
                self._gate.wait_for(lambda: not self._closed)
                self._inside += 1
            try:
                self._one(rng)
            finally:
                with self._gate:
                    self._inside -= 1
                    self._gate.notify_all()

    def _one(self, rng: random.Random) -> None:
        form, seed, kind = rng.choice(self.forms), rng.randrange(10**6), rng.random()
        if kind < 0.2:
            self._bad(malformed(form, rng))
            return
        calls, scale, found = calls_of(form, seed), self.scale, []
        leaves_after = rng.randrange(len(calls)) if kind < 0.3 else None
        try:
            with self.accelerated.generation():
                for k, call in enumerate(calls):
                    if k == leaves_after:
                        raise KeyboardInterrupt
                    found.append(self.accelerated(**call))
        except KeyboardInterrupt:
            self.counts["runs that were left"] += 1
        else:
            self.counts["whole runs"] += 1
        wanted = self.expected(form, scale, seed)
        for k, (a, b) in enumerate(zip(found, wanted, strict=False)):
            if not self._same(a, b):
                error = float((a - b).abs().max())
                self.wrong.append(f"{form}, step {k}, weights {scale}: by {error:.3g}")
                return

    def _same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a, b) if self.backend == "eager" else torch.allclose(a, b, 1e-4, 1e-5)

    def _bad(self, call: dict[str, Any]) -> None:
        try:
            result = self.accelerated(**call)
        except Exception:
            self.counts["bad calls that failed"] += 1
        else:
            self.wrong.append(f"a bad call gave {type(result).__name__}")

    def _replace_weights(self, rng: random.Random) -> None:
        """As whoever deploys does it: between the runs of all others."""
        while not self._stop.wait(2.0):
            with self._gate:
                self._closed = True
                self._gate.wait_for(lambda: self._inside == 0)
                self.scale = (self.scale + 1) % len(SCALES)
                for p, q in zip(list(self.model.parameters()), self.weights, strict=True):
                    value = q * SCALES[self.scale]
                    if rng.random() < 0.5:
                        p.data.copy_(value)
                    else:
                        p.data = value
                self.counts["new weights"] += 1
                self._closed = False
                self._gate.notify_all()

    @torch.no_grad()
    def _original(self, rng: random.Random) -> None:
        """The user's own model, while others capture it."""
        while not self._stop.wait(0.005):
            with self._gate:
                self._gate.wait_for(lambda: not self._closed)
                self._inside += 1
            try:
                for p in self.model.parameters():
                    if type(p) is not torch.nn.Parameter or type(p.data) is not torch.Tensor:
                        self.wrong.append(f"the model holds a {type(p.data).__name__}")
                        return
                call = calls_of((2, 6), rng.randrange(1000))[0]
                plain = self.alone[self.scale].original(**call)
                if not torch.equal(self.model(**call), plain):
                    self.wrong.append("the original model is not what it was")
                    return
                self.counts["calls of the original"] += 1
            finally:
                with self._gate:
                    self._inside -= 1
                    self._gate.notify_all()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    crowd = Crowd(options.backend, options.seed)
    crowd.run(options.seconds, options.threads)
    for name, count in sorted(crowd.counts.items()):
        print(f"{name:<24} {count}")
    print(f"variants kept            {len(crowd.accelerated._fxmask.variants)}")
    print(f"wrong                    {len(crowd.wrong)}")
    for text in crowd.wrong[:5]:
        print(f"--- {text}")
    return 1 if crowd.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
