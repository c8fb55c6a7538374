"""The operator console: one page on the admin port, for the person who runs the service.

guard.py     who may ask: no foreign host name, no foreign page
routes.py    the page and its endpoints
facts.py     what is served: card, policy, settings, the defenses that the page offers
numbers.py   the workers' metrics as one small document
helper.py    the process that previews defenses, as the supervisor sees it
preview.py   the same process from within; only it loads a model
static/      the page itself: HTML, CSS, ES modules, no build step
"""
