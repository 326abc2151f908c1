"""Many runs: jobs, grids, search spaces and clusters."""
