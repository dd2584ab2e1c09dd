"""Runs PyTorch model types through lorax_hf at tiny sizes: `nox -s sweep-torch`."""
