"""Dockerfile, manifests and workflows. Run by `make verify-deploy`, which makes the environment of the tools that are
asked here; `make test` passes this by.
"""
