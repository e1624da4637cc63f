"""Pixels and files: ranges, PNG in rows, metadata, contact sheets."""
