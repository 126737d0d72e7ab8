"""How anything is measured: clocks, noise, what a machine can do, costs, and where a record comes from."""
