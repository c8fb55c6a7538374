"""The operator console: one page on the admin port.

guard.py            refuses requests under foreign host names or from foreign pages
routes.py           the page and its endpoints
facts.py            what is served: card, policy, settings, the defenses that the page offers
numbers.py          the workers' metrics as one small document
preview_process.py  the process that previews defenses, as the supervisor sees it
preview_request.py  what the page asks that process
preview.py          the process itself; only it loads a model
static/             the page: HTML, CSS, ES modules, no build step
"""
