"""Complete small reference models built from `fused_parallel.nn`."""
