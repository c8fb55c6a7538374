"""What the service tells its operator: metrics, traces, logs."""
