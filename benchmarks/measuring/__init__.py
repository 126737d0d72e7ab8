"""How benchmarks measure: timing, noise, peak rates of machines, costs, and the provenance of records."""
