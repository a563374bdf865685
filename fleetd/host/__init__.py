"""The machine: processes, logs, probes, devices, durable state. The only package that uses subprocess, psutil, pynvml and watchfiles."""
