"""What proves the audit: hashes, checkpoints, and the verifier of both.

Imports nothing of the service and, besides Python, only `cryptography`: an auditor can run this folder alone, wherever
it lies (so its modules name each other relatively), as `python -m app.audit EXPORT --public-key FILE`.
"""
