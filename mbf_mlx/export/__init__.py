"""Exports: what was learned, written as what other programs read; one file per target."""
