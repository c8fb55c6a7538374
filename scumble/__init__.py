"""What clients, workshop, attacker and referee share: client, data sets, command line."""
