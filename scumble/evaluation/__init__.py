"""The referee: what a defense is worth, measured against real servers over HTTP."""
