"""The file formats of adapters, one module each; `table` lists them."""
