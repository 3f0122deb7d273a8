"""Outgoing HTTP of tools and webhooks: the only place that connects to hosts that others choose."""

from worker.egress.client import Egress

__all__ = ["Egress"]
