"""Runs models from other packages through Lorax: `nox -s wild`.

Each file of `models/` imports one package from PyPI and builds models of it at tiny sizes. No code
is copied, so these are the models that users of the packages have.
"""
