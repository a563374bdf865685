"""The machine: processes, logs, probes, devices, state; the only user of subprocess, psutil, pynvml and watchfiles."""
