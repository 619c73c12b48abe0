"""The console: the router inside Airflow's own UI. Its API and its page; `router_console.py` mounts them."""
