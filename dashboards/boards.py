"""The contents of the dashboards. Every exported metric is in a panel, which a test checks."""

from __future__ import annotations

from dashboards.build import Board, Graph, Query, Table

RATE = "$__rate_interval"
PREDICTIONS = 'job=~"$job",route=~"/v1/predict|.+/infer"'
ERRORS = f'{PREDICTIONS},code=~"5.."'
SERVED = Table(
    "Served",
    "What each service serves. Two defenses or files under one job: replicas differ.",
    "max by (job, model, version, precision, engine, defense, sha256) "
    '(scumble_model_info{job=~"$job"})',
)


JOB = '{job=~"$job"}'


def _rate(metric: str, by: str = "job", where: str = 'job=~"$job"') -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}[{RATE}]))"


def _mean(histogram: str, by: str = "job", where: str = 'job=~"$job"') -> str:
    return f"{_rate(f'{histogram}_sum', by, where)} / {_rate(f'{histogram}_count', by, where)}"


def _quantile(q: float, histogram: str, by: str = "job", where: str = 'job=~"$job"') -> str:
    return f"histogram_quantile({q}, {_rate(f'{histogram}_bucket', f'{by}, le', where)})"


def _or_zero(expr: str) -> str:
    """What only some services have, and 0 for the others."""
    return f"({expr}) or on (job) (0 * max by (job) (scumble_workers{JOB}))"


def _route_quantile(q: float) -> Graph:
    # The quantile of a route without requests is NaN, and `> 0` drops it from the legend.
    expr = f"{_quantile(q, 'scumble_request_seconds', 'job, route')} > 0"
    return Graph(
        f"Requests, p{q * 100:.0f}",
        f"{q:.0%} of a route's requests are answered within this time.",
        "s",
        (Query(expr, "{{job}} {{route}}"),),
    )


def _stage_quantile(q: float) -> Graph:
    return Graph(
        f"Stages, p{q * 100:.0f}",
        f"{q:.0%} of predictions spend at most this time in a stage.",
        "s",
        (
            Query(
                _quantile(q, "scumble_stage_seconds", "job, stage"),
                "{{job}} {{stage}}",
            ),
        ),
    )


def _stage(stage: str, description: str) -> Graph:
    where = f'job=~"$job",stage="{stage}"'
    return Graph(
        f"Stage {stage}",
        description,
        "s",
        (
            Query(_mean("scumble_stage_seconds", where=where), "{{job}} mean"),
            Query(_quantile(0.95, "scumble_stage_seconds", where=where), "{{job}} p95"),
        ),
    )


SERVICE = Board(
    "scumble-service",
    "Scumble: service",
    "Traffic, latency of routes and stages, queue, errors, what the workers use.",
    {
        "Throughput": (
            Graph(
                "Requests",
                "Answered requests by route, refused ones included.",
                "reqps",
                (Query(_rate("scumble_requests_total", "job, route"), "{{job}} {{route}}"),),
            ),
            Graph(
                "Requests by status",
                "2xx are answers, 4xx refusals of the client's mistakes, 5xx errors.",
                "reqps",
                (Query(_rate("scumble_requests_total", "job, code"), "{{job}} {{code}}"),),
            ),
            Graph(
                "Images",
                "Images answered with probabilities; one request may carry many.",
                "suffix: images/s",
                (
                    Query(
                        _rate("scumble_images_total", "job, model, precision"),
                        "{{job}} {{model}} {{precision}}",
                    ),
                ),
            ),
        ),
        "Latency": (
            *(_route_quantile(q) for q in (0.5, 0.95, 0.99)),
            *(_stage_quantile(q) for q in (0.5, 0.95, 0.99)),
        ),
        "Batches and queue": (
            Graph(
                "Batch size",
                "Images in one call of the engine. 1 is an idle service, SCUMBLE_BATCH__MAX_SIZE "
                "a full one; larger ones are large requests.",
                "short",
                (
                    Query(_mean("scumble_batch_size"), "{{job}} mean"),
                    Query(_quantile(0.95, "scumble_batch_size"), "{{job}} p95"),
                ),
            ),
            Graph(
                "Queue",
                "Images that wait for the engine. At SCUMBLE_LIMITS__MAX_QUEUE for each worker, "
                "requests are refused with 503.",
                "suffix: images",
                (Query('sum by (job) (scumble_queue_depth{job=~"$job"})', "{{job}}"),),
            ),
            Graph(
                "In flight",
                "Requests being answered.",
                "suffix: requests",
                (Query('sum by (job) (scumble_inflight{job=~"$job"})', "{{job}}"),),
            ),
        ),
        "Errors and saturation": (
            Graph(
                "Errors",
                "Share of predictions that ended in a 5xx; the objective is 0.1%.",
                "percentunit",
                (
                    Query(
                        f"({_rate('scumble_requests_total', where=ERRORS)} "
                        f"or 0 * {_rate('scumble_requests_total')}) "
                        f"/ {_rate('scumble_requests_total', where=PREDICTIONS)}",
                        "{{job}}",
                    ),
                ),
                width=6,
            ),
            Graph(
                "Slow predictions",
                "Share that took longer than 0.1 s; the objective is 1%.",
                "percentunit",
                (
                    Query(
                        "1 - "
                        + _rate("scumble_request_seconds_bucket", where=f'{PREDICTIONS},le="0.1"')
                        + f" / {_rate('scumble_request_seconds_count', where=PREDICTIONS)}",
                        "{{job}}",
                    ),
                ),
                width=6,
            ),
            Graph(
                "Queueing share",
                "How much of a prediction's time is waiting for the engine. Over a half: add "
                "workers or replicas.",
                "percentunit",
                (
                    Query(
                        _rate("scumble_stage_seconds_sum", where='job=~"$job",stage="queue"')
                        + f" / {_rate('scumble_stage_seconds_sum')}",
                        "{{job}}",
                    ),
                ),
                width=6,
                maximum=1,
            ),
            Graph(
                "Busy workers",
                "Mean processor use of a worker, in cores; with one engine thread 1 is saturated.",
                "short",
                (
                    Query(
                        _rate("scumble_worker_cpu_seconds_total")
                        + ' / sum by (job) (scumble_workers{job=~"$job"})',
                        "{{job}}",
                    ),
                ),
                width=6,
            ),
        ),
        "Server that runs the network (engine upstream)": (
            Graph(
                "Requests to it",
                "Batches sent to each replica, by outcome; 0 without such a server.",
                "reqps",
                (
                    Query(
                        _or_zero(_rate("scumble_upstream_requests_total", "job, replica, outcome")),
                        "{{job}} {{replica}} {{outcome}}",
                    ),
                ),
            ),
            Graph(
                "Its answers, p99",
                "99% of batches are answered within this time by each replica.",
                "s",
                (
                    Query(
                        _or_zero(_quantile(0.99, "scumble_upstream_seconds", "job, replica")),
                        "{{job}} {{replica}}",
                    ),
                ),
            ),
            Graph(
                "Replicas",
                "Whether each replica is usable, and whether its circuit is open after failures.",
                "short",
                (
                    Query(
                        _or_zero(f"min by (job, replica) (scumble_upstream_usable{JOB})"),
                        "{{job}} {{replica}} usable",
                    ),
                    Query(
                        _or_zero(f"max by (job, replica) (scumble_upstream_circuit_open{JOB})"),
                        "{{job}} {{replica}} circuit open",
                    ),
                ),
                maximum=1,
            ),
        ),
        "Workers": (
            Graph(
                "Processor",
                "Cores that each worker uses.",
                "short",
                (
                    Query(
                        _rate("scumble_worker_cpu_seconds_total", "job, instance, worker"),
                        "{{job}} {{instance}} {{worker}}",
                    ),
                ),
            ),
            Graph(
                "Memory",
                "Resident memory of each worker. It is flat; one that grows for hours is a fault.",
                "bytes",
                (
                    Query(
                        'scumble_worker_resident_bytes{job=~"$job"}',
                        "{{job}} {{instance}} {{worker}}",
                    ),
                ),
            ),
            Graph(
                "Workers",
                "Running worker processes; those replaced in an hour, by what ended them; "
                "reloads of the model in an hour, by how they went; minutes for which keys or a "
                "certificate could not be reloaded, and such failures in an hour.",
                "short",
                (
                    Query(
                        'max by (job, file) (scumble_reload_failing_seconds{job=~"$job"}) / 60',
                        "{{job}} {{file}} minutes",
                    ),
                    Query(
                        "sum by (job, file) "
                        '(increase(scumble_reload_failures_total{job=~"$job"}[1h]))',
                        "{{job}} {{file}} failures",
                    ),
                    Query('sum by (job) (scumble_workers{job=~"$job"})', "{{job}}"),
                    Query(
                        'sum by (job, result) (increase(scumble_reloads_total{job=~"$job"}[1h]))',
                        "{{job}} reload {{result}}",
                    ),
                    Query(
                        "sum by (job, reason) "
                        '(increase(scumble_worker_restarts_total{job=~"$job"}[1h]))',
                        "{{job}} {{reason}}",
                    ),
                ),
            ),
            SERVED,
        ),
    },
)

DEFENSE = Board(
    "scumble-defense",
    "Scumble: defense",
    "What the defense does to answers and to latency, undefended beside defended, and who asks.",
    {
        "Answers": (
            Graph(
                "Perturbed answers",
                "Share of images whose probabilities the defense changed.",
                "percentunit",
                (
                    Query(
                        f"{_rate('scumble_defended_rows_total')} "
                        f"/ {_rate('scumble_response_l1_count')}",
                        "{{job}}",
                    ),
                ),
                width=6,
                maximum=1,
            ),
            Graph(
                "Perturbed rows",
                "Images whose probabilities the defense changed.",
                "suffix: images/s",
                (Query(_rate("scumble_defended_rows_total"), "{{job}}"),),
                width=6,
            ),
            Graph(
                "Withheld answers",
                "Images whose answer the defense withheld, by what was sent instead.",
                "suffix: images/s",
                (
                    Query(
                        _rate("scumble_withheld_images_total", "job, answer"), "{{job}} {{answer}}"
                    ),
                ),
                width=6,
            ),
            Graph(
                "L1 served",
                "Distance between clean and served probabilities, 0 to 2: what honest users pay.",
                "short",
                (
                    Query(_mean("scumble_response_l1"), "{{job}} mean"),
                    Query(_quantile(0.95, "scumble_response_l1"), "{{job}} p95"),
                ),
                width=6,
                maximum=2,
            ),
        ),
        "Latency, undefended beside defended": (
            _stage(
                "defend",
                "The defense alone, for a whole batch. 0 where it is part of the network's graph, "
                "then its time is among that of infer.",
            ),
            _stage("infer", "The engine, for a whole batch, with a defense inside the graph."),
            Graph(
                "Engine and defense together",
                "Mean of both stages: comparable whether or not the defense is inside the graph.",
                "s",
                (
                    Query(
                        _rate(
                            "scumble_stage_seconds_sum", where='job=~"$job",stage=~"infer|defend"'
                        )
                        + " / "
                        + _rate("scumble_stage_seconds_count", where='job=~"$job",stage="infer"'),
                        "{{job}}",
                    ),
                ),
            ),
        ),
        "Who asks": (
            Graph(
                "Images answered",
                "Of all clients together. A copy takes tens of thousands of images, so a plateau "
                "far above the usual is worth a look.",
                "suffix: images/s",
                (Query(_rate("scumble_images_total"), "{{job}}"),),
                width=6,
            ),
            Graph(
                "Images answered in 24 hours",
                "What all clients together could have learned from in a day.",
                "suffix: images",
                (
                    Query(
                        'sum by (job) (increase(scumble_images_total{job=~"$job"}[24h]))', "{{job}}"
                    ),
                ),
                width=6,
            ),
            Graph(
                "Refusals",
                "Refused requests by reason, and connections that no worker took.",
                "reqps",
                (
                    Query(_rate("scumble_rejections_total", "job, reason"), "{{job}} {{reason}}"),
                    Query(
                        _rate("scumble_connections_refused_total", "job, reason"),
                        "{{job}} connections: {{reason}}",
                    ),
                    Query(
                        _rate("scumble_admin_rejections_total", "job, reason"),
                        "{{job}} admin: {{reason}}",
                    ),
                ),
                width=6,
            ),
            Graph(
                "Not written down",
                "Budgets that the store did not count, and lines that the audit log lost: it "
                "should be none.",
                "reqps",
                (
                    Query(_rate("scumble_store_failures_total", "job"), "{{job}} budgets"),
                    Query(
                        _rate("scumble_audit_lines_total", "job, outcome"), "{{job}} {{outcome}}"
                    ),
                ),
                width=6,
            ),
            SERVED,
        ),
        "Clients with keys": (
            Graph(
                "Images by client",
                "Images answered with probabilities.",
                "suffix: images/s",
                (Query(_rate("scumble_client_images_total", "job, client"), "{{job}} {{client}}"),),
                width=8,
            ),
            Graph(
                "Images by client in 24 hours",
                "What each client could have learned from in a day.",
                "suffix: images",
                (
                    Query(
                        "sum by (job, client) "
                        '(increase(scumble_client_images_total{job=~"$job"}[24h]))',
                        "{{job}} {{client}}",
                    ),
                ),
                width=8,
            ),
            Graph(
                "Budget left",
                "Part of each budget that was left after the client's last request.",
                "percentunit",
                (
                    Query(
                        "min by (job, client, budget) "
                        '(scumble_client_budget_left_images{job=~"$job"}'
                        ' / (scumble_client_budget_images{job=~"$job"} > 0))',
                        "{{job}} {{client}} {{budget}}",
                    ),
                ),
                width=8,
                maximum=1,
            ),
            Graph(
                "Withheld by client",
                "Images whose answer the defense withheld: many of one client's are foreign.",
                "suffix: images/s",
                (
                    Query(
                        _rate("scumble_client_withheld_images_total", "job, client"),
                        "{{job}} {{client}}",
                    ),
                ),
                width=12,
            ),
            Graph(
                "Refused for want of budget",
                "429 by client.",
                "reqps",
                (
                    Query(
                        _rate("scumble_client_refused_total", "job, client"), "{{job}} {{client}}"
                    ),
                ),
                width=12,
            ),
        ),
    },
)

BOARDS = (SERVICE, DEFENSE)
