"""Grafana dashboards as code; `python -m dashboards` writes them into `docker/grafana/dashboards/`.

`boards` says what is shown, `build` turns it into Grafana's objects.
"""

# The Grafana that the dashboards are made for. The SDK that `pyproject.toml` pins is of the same
# minor version, the newest that it has.
GRAFANA = "11.6.16"
