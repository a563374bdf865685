"""One log per process: written by the child itself or by the daemon's pump, rotated without losing or cutting a line."""
