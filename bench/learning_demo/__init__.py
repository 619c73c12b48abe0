"""Shows learning over days of simulated traffic: `make demo-learning`."""
