"""Any program that serves models on a port."""
