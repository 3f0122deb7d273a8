"""Executes runs. Imports app, never app.api."""
