"""What the service exports on its admin port."""

from prometheus_client import CollectorRegistry

from app.admin.application import ProcessMetrics
from app.telemetry.incidents import Incidents
from app.telemetry.metrics import Metrics


class NoWorkers:
    """A supervisor without workers."""

    def ready(self):
        return True

    async def reload(self):
        return True

    def pids(self):
        return {}


def metric_names() -> set[str]:
    """Every metric, as it is scraped; histograms without `_bucket`, `_sum`, `_count`."""
    registry = CollectorRegistry()
    Metrics(registry)
    families = [*registry.collect(), *ProcessMetrics(NoWorkers()).collect(), *Incidents().collect()]
    return {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
