"""Traces in a real Phoenix. Run by `make test-phoenix`, which makes its environment; `make test` passes this by."""
