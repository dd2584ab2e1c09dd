"""Models of other people's packages through Lorax: `nox -s wild`.

Each file of `models/` imports one package from PyPI and builds models of it at tiny sizes. Nothing
of theirs is copied, so what runs here is what their users have.
"""
