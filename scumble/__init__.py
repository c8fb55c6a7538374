"""Scumble's neutral ground: what clients, workshop, attacker and referee share with nobody's secrets."""
