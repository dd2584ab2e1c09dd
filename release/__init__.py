"""Checks of a release's metadata and notes; see `release-check` in noxfile.py."""
