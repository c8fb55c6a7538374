"""Model stealing attacks: with a URL and a query budget, train a copy of the served model.

It does not import the service: everything it knows comes over HTTP. Needs the `attack` extra.
"""
