"""The engine `upstream`: another server runs the network, over the Open Inference Protocol V2.

`protocol` writes requests and reads answers, `client` sends them to replicas, each with a circuit
breaker (`circuit`), `network` is what the bundle's card says of the network, `monitor` compares its
answers with the golden ones, `batching` has several batches in flight.
"""
