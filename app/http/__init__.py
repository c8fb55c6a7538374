"""The public port: connections, requests, protocols, answers."""
