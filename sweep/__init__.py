"""Types of PyTorch models through lorax_hf, at tiny sizes: `nox -s sweep-torch`."""
