"""Measures the service, every part on this machine. Run by `make bench`."""
