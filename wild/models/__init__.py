"""One file for each package, with the package's import name."""
