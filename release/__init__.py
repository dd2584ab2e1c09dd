"""What is checked before a release, apart from the packages themselves: see noxfile.py."""
