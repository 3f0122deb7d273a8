"""Starts Phoenix, in its own environment, and on loopback alone: whatever it is told, its gRPC port is open to all."""

import importlib
import sys


def main() -> None:
    application = importlib.import_module("phoenix.server.app")

    class NoGrpc(application.GrpcServer):  # type: ignore[misc, name-defined]
        async def __aenter__(self) -> None:
            """Nobody here sends spans by gRPC."""

    application.GrpcServer = NoGrpc  # type: ignore[attr-defined]
    sys.argv = ["phoenix", "serve"]
    importlib.import_module("phoenix.server.main").main()


if __name__ == "__main__":
    main()
