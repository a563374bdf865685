"""The engine `process`: any program that serves models on a port."""
