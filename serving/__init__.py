"""Bundles where people are: an HTTP server in the shapes that clients know, and a page.

Imports `runtime` alone. `python -m serving BUNDLE` starts the server; docs/serving.md says how.
"""
