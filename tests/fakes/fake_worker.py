"""A worker that survives its leader, as VLLM::EngineCore does: SIZE IGNORE_TERM SETSID READY_FD.

It holds SIZE bytes and its inherited stdout until a signal kills it.
"""

# os.path, since pathlib would double the start-up time.
# ruff: noqa: PTH123

import os
import signal
import sys


def main() -> None:
    size, ignore_term, setsid, ready = (int(word) for word in sys.argv[1:5])
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write("FAKE::Worker")
    except OSError:
        pass
    if setsid:
        os.setsid()
    if ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory = bytearray(size)
    for offset in range(0, size, 4096):
        memory[offset] = 1
    os.write(ready, b".")
    os.close(ready)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
