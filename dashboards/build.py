"""Converts a `Board`, which describes what is shown, to Grafana's objects and their JSON."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders import prometheus, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# A variable instead of the uid of a data source, so that any Grafana can import the files.
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 8
COLUMNS = 24


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of its series."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Graph:
    """Lines over time."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    maximum: float | None = None


@dataclass(frozen=True)
class Table:
    """The labels of a metric that is always 1."""

    title: str
    description: str
    expr: str
    width: int = COLUMNS


@dataclass(frozen=True)
class Board:
    """A dashboard; panels by row."""

    uid: str
    title: str
    description: str
    rows: Mapping[str, tuple[Graph | Table, ...]]


def render(board: Board) -> str:
    """The JSON that Grafana reads."""
    made = _dashboard(board).build()
    assert made.templating  # noqa: S101  # `_dashboard` adds variables
    for variable in made.templating.list_val or ():
        # The builder sets a member of every variable that only those of type interval may have.
        variable.auto = variable.auto_count = variable.auto_min = None
    return JSONEncoder(sort_keys=True, indent=2).encode(made) + "\n"


def _dashboard(board: Board) -> grafana.Dashboard:
    made = (
        grafana.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["scumble"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(grafana.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_job())
        .link(
            grafana.DashboardLink("Scumble")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["scumble"])
            .keep_time(True)
            .include_vars(True)
        )
    )
    for number, panel in enumerate(_panels(board), 1):
        if isinstance(panel, grafana.Row):
            made.with_row(panel.id(number))
        else:
            made.with_panel(panel.id(number))
    return made


def _job() -> grafana.QueryVariable:
    return (
        grafana.QueryVariable("job")
        .label("Service")
        .datasource(SOURCE)
        .query({"query": "label_values(scumble_workers, job)", "refId": "job"})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _panels(board: Board) -> Iterator[grafana.Row | timeseries.Panel | table.Panel]:
    for row, panels in board.rows.items():
        yield grafana.Row(row)
        for panel in panels:
            yield _graph(panel) if isinstance(panel, Graph) else _table(panel)


def _graph(graph: Graph) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(graph.title)
        .description(graph.description)
        .datasource(SOURCE)
        .unit(graph.unit)
        .min(0)
        .height(HEIGHT)
        .span(graph.width)
        .line_width(1)
        .fill_opacity(10)
    )
    if graph.maximum is not None:
        panel.max(graph.maximum)
    for ref, query in zip(string.ascii_uppercase, graph.queries, strict=False):
        panel.with_target(
            prometheus.Dataquery()
            .datasource(SOURCE)
            .ref_id(ref)
            .expr(query.expr)
            .legend_format(query.legend)
            .range()
        )
    return panel


def _table(shown: Table) -> table.Panel:
    return (
        table.Panel()
        .title(shown.title)
        .description(shown.description)
        .datasource(SOURCE)
        .height(HEIGHT // 2)
        .span(shown.width)
        .with_transformation(
            DataTransformerConfig(
                id_val="organize", options={"excludeByName": {"Time": True, "Value": True}}
            )
        )
        .with_target(
            prometheus.Dataquery()
            .datasource(SOURCE)
            .ref_id("A")
            .expr(shown.expr)
            .format(PromQueryFormat.TABLE)
            .instant()
        )
    )
