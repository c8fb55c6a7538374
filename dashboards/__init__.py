"""Grafana dashboards as code; `python -m dashboards` writes them into `docker/grafana/dashboards/`.

`boards` says what is shown, `build` turns it into Grafana's objects.
"""

# The Grafana version of the dashboards. `pyproject.toml` pins the newest SDK with the same minor
# version.
GRAFANA = "11.6.16"
