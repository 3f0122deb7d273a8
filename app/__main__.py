"""`python -m app` is `agent-service`."""

from app.cli import main

main()
