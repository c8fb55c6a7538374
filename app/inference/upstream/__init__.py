"""The engine `upstream`: another server runs the network, behind an API of its own.

`network_interface` is what such a network is to the service: `v2_network` asks in the Open
Inference Protocol V2, whose messages `v2_messages` writes and reads, `template_network` as a
template of a JSON API says. `client` sends the requests to replicas, each with a circuit breaker
(`circuit`), `monitor` compares answers with the golden ones, `batching` has several batches in
flight.
"""
