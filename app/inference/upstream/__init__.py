"""The engine `upstream`: another server runs the network.

network_interface.py    what such a network is to the service
v2_network.py           one that is asked in the Open Inference Protocol V2 ...
v2_messages.py          ... and that protocol's messages
template_network.py     one that is asked as the template of a JSON API says
client.py, circuit.py   requests to replicas, each with a circuit breaker
monitor.py              compares the answers of replicas with the golden ones
batching.py             batches, of which several are in flight
pass_through_models.py  models whose V2 requests are passed through
defense_time.py         how long defenses take
assembly.py             all of them as the settings ask
engine.py               the same network for tools, which wait for answers
connect.py              makes the card of such a network
"""
