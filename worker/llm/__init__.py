"""Asking a model: the protocol, the one client, the one layer that retries."""
