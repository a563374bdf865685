"""Compare six workers on six models that all fit in memory with the same requests in sequence.

python -m bench.parallel [--requests 6] [--tokens 64] [--megabytes 8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from bench.rig import RunningFleet, chat, scratch
from bench.tiny_gguf import sized, write
from tests.support.ports import free_port

NAMES = [f"model-{index}" for index in range(6)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6, help="per worker")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with scratch("parallel") as folder:
        lines = []
        for seed, name in enumerate(NAMES):
            path = write(folder / f"{name}.gguf", sized(asked.megabytes, seed=seed))
            lines.append(
                f"  {name}: {{engine: llamacpp, preload: true, options: {{model: {path}, context_length: 512, parallel: 1, threads: 1}}}}"
            )
        with RunningFleet(folder, "models:\n" + "\n".join(lines) + "\n", free_port()) as fleet:
            for name in NAMES:
                chat(fleet.port, name)
            work = [name for _ in range(asked.requests) for name in NAMES]
            ratios = []
            for _ in range(asked.rounds):
                began = time.monotonic()
                for name in work:
                    chat(fleet.port, name, asked.tokens, stream=False)
                serial = time.monotonic() - began
                began = time.monotonic()
                with ThreadPoolExecutor(len(NAMES)) as workers:
                    list(
                        workers.map(
                            lambda name: [
                                chat(fleet.port, name, asked.tokens, stream=False) for _ in range(asked.requests)
                            ],
                            NAMES,
                        )
                    )
                parallel = time.monotonic() - began
                ratios.append(serial / parallel)
                print(
                    f"one after another {serial:.2f} s, six workers {parallel:.2f} s: {serial / parallel:.2f} times as fast"
                )
            print(f"median speed-up {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
