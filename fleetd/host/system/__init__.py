"""Memory, GPUs, mounts and ports of the machine."""
