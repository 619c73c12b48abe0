"""The rate limiter: exact sliding windows, tokens and concurrency per model, decided in Redis."""
