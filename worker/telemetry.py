"""Puts together who is told what happens in this process. What traces need is loaded only where there are any."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.config import Settings
from app.registry import Registry
from app.startup import loading
from worker.metrics import WorkerMetrics
from worker.observer import Observer

if TYPE_CHECKING:
    from worker.exporters import Exporters


@dataclass(frozen=True, slots=True)
class Telemetry:
    """`exporters`: None where nothing is traced."""

    observer: Observer
    exporters: "Exporters | None" = None

    async def close(self, seconds: float) -> None:
        """Send on what is still to be sent, for so many seconds and no longer."""
        if self.exporters is not None:
            await self.exporters.close(seconds)


def open_telemetry(settings: Settings, *, worker: str, agents: Registry, metrics: WorkerMetrics) -> Telemetry:
    """`worker`: this process' name in spans."""
    if not settings.is_traced:
        return Telemetry(Observer(metrics=metrics, agents=agents))
    with loading():
        from app.redaction import Redaction  # noqa: PLC0415
        from worker.exporters import open_exporters  # noqa: PLC0415
        from worker.tracing import Tracer  # noqa: PLC0415

        redaction = Redaction(settings.secrets, settings.redact_patterns)
        tracer = Tracer(settings, worker=worker, redaction=redaction)
        exporters = open_exporters(settings, tracer.provider, metrics)
        tracer.skip = exporters.skip
    return Telemetry(Observer(metrics=metrics, agents=agents, tracer=tracer, scorer=exporters), exporters)
