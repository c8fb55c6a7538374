"""The admin port: metrics, health, reload, and the operator console."""
