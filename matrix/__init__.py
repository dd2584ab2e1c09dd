"""The matrix of package × Python × JAX × backend: its cells, devices, records and report."""
