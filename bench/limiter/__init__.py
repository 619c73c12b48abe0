"""Measures (`python -m bench.limiter`) and soaks (`python -m bench.limiter.soak`) the rate limiter."""
