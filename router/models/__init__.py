"""The models in use: roster, traffic targets, and calling one through the Models Backend."""
