"""Package × Python × JAX × backend: the cells, what this machine has for them, what came out."""
