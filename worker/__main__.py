"""`python -m worker`."""

from app.startup import loading

with loading():
    from worker.main import main

main()
