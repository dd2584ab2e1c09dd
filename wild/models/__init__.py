"""One file for each package, named as the package is imported."""
