"""A stranger with a URL and a query budget who trains a copy of the served model.

It never imports the service: all it knows it learns over HTTP. Needs the `attack` extra.
"""
